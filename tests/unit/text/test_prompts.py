from __future__ import annotations

from pathlib import Path

import pytest

from cprec.text.prompts import Template, render

GOLDEN = Path(__file__).parents[2] / "golden"
BOOKS = [("books", "Dune"), ("books", "War & Peace, Vol. 2")]
BOTH = [("books", "Dune"), ("games", "Go 19x19 (wood)")]
EMILE = ("books", "Émile")


@pytest.mark.parametrize(
    ("golden", "kind", "history", "target"),
    [
        ("prompt_specific", "specific", BOOKS, EMILE),
        ("prompt_mixed", "mixed", BOTH, EMILE),
        ("prompt_specific_question", "specific", BOOKS, None),
        ("prompt_mixed_question", "mixed", BOTH, None),
        ("prompt_empty_history", "specific", [], None),
    ],
)
def test_the_template_is_byte_for_byte_what_models_were_trained_on(
    golden: str, kind: str, history: list[tuple[str, str]], target: tuple[str, str] | None
) -> None:
    text = render(Template(), kind, "books", history, target, eos="<eos>" if target else "")
    assert text.encode() == (GOLDEN / f"{golden}.txt").read_bytes()


def test_a_question_is_the_start_of_its_document() -> None:
    for kind in ("specific", "mixed"):
        question = render(Template(), kind, "books", BOTH)
        assert render(Template(), kind, "books", BOTH, EMILE, "<eos>") == question + " Émile<eos>"


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="kind='all' is not one of specific, mixed"):
        render(Template(), "all", "books", [])
