from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cprec.data.catalogue import Catalogue
from cprec.data.ragged import Ragged
from cprec.errors import ConfigError
from cprec.text.encoding import PromptEncoder, TemplateMarks
from cprec.text.prompts import Template, render

GOLDEN = Path(__file__).parents[2] / "golden"
BOOKS, GAMES = 0, 1


@pytest.fixture(scope="session")
def encoder(tokenizer: Any, catalogue: Catalogue) -> PromptEncoder:
    return PromptEncoder(tokenizer, catalogue)


def rows_of(ragged: Ragged) -> list[list[int]]:
    return [ragged[row].tolist() for row in range(len(ragged))]


def tokens_of(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(("kind", "events"), [("specific", [0, 1, 2]), ("mixed", [0, 3, 2])])
def test_documents_have_the_tokens_of_the_golden_text(
    tokenizer: Any, encoder: PromptEncoder, kind: str, events: list[int]
) -> None:
    tokens, target_start = encoder.documents(kind, np.array([BOOKS]), Ragged.of([events]))
    assert tokens[0].tolist() == tokens_of(tokenizer, (GOLDEN / f"prompt_{kind}.txt").read_text())
    assert tokenizer.decode(tokens[0][target_start[0] :]) == " Émile<eos>"


@pytest.mark.parametrize(
    ("kind", "history", "golden"),
    [("specific", [0, 1], "specific_question"), ("mixed", [0, 3], "mixed_question"), ("specific", [], "empty_history")],
)
def test_prompts_have_the_tokens_of_the_golden_text(
    tokenizer: Any, encoder: PromptEncoder, kind: str, history: list[int], golden: str
) -> None:
    prompts = encoder.prompts(kind, np.array([BOOKS]), Ragged.of([history]))
    assert prompts[0].tolist() == tokens_of(tokenizer, (GOLDEN / f"prompt_{golden}.txt").read_text())


def test_a_document_is_its_prompt_and_its_title(encoder: PromptEncoder) -> None:
    events, domains = Ragged.of([[0, 1], [2], [4, 3, 5]]), np.array([BOOKS, BOOKS, GAMES])
    history = Ragged.of([[0], [], [4, 3]])
    for kind in ("specific", "mixed"):
        documents, target_start = encoder.documents(kind, domains, events)
        prompts = encoder.prompts(kind, domains, history)
        titles = encoder.titles(np.array([1, 2, 5]), end=True)
        for row in range(3):
            assert documents[row].tolist() == [*prompts[row], *titles[row]]
            assert target_start[row] == len(prompts[row])


def test_many_rows_and_no_rows(encoder: PromptEncoder) -> None:
    none = Ragged.of([])
    for kind in ("specific", "mixed"):
        assert len(encoder.documents(kind, np.array([], dtype=np.int64), none)[0]) == 0
        assert len(encoder.prompts(kind, np.array([], dtype=np.int64), none)) == 0
        assert len(encoder.fit(kind, np.array([], dtype=np.int64), none, 10)) == 0
    assert len(encoder.titles(np.array([], dtype=np.int64), end=True)) == 0


def test_titles_are_cut_and_closed(tokenizer: Any, catalogue: Catalogue) -> None:
    rows = np.array([1, 0])
    whole = PromptEncoder(tokenizer, catalogue).titles(rows)
    cut = PromptEncoder(tokenizer, catalogue, max_title_tokens=3)
    assert whole.lengths.max() > 3
    for row in range(2):
        assert cut.titles(rows)[row].tolist() == whole[row].tolist()[:3]
        assert cut.titles(rows, end=True)[row].tolist() == [*whole[row].tolist()[:3], tokenizer.eos_token_id]


def test_the_cut_title_stands_in_documents_too(tokenizer: Any, catalogue: Catalogue) -> None:
    cut = PromptEncoder(tokenizer, catalogue, max_title_tokens=3)
    document = cut.documents("specific", np.array([BOOKS]), Ragged.of([[0, 1]]))[0][0]
    assert document[-4:].tolist() == cut.titles(np.array([1]), end=True)[0].tolist()


def test_another_template_is_followed(tokenizer: Any, catalogue: Catalogue) -> None:
    template = Template(scope="Shop", history=" bought", line=" |", next=" then", mixed_scope="all")
    encoder = PromptEncoder(tokenizer, catalogue, template=template)
    document = encoder.documents("specific", np.array([BOOKS]), Ragged.of([[0, 2]]))[0][0]
    assert tokenizer.decode(document) == "Shop books bought | Dune then Émile<eos>"


def test_other_fields_follow_the_title_each_cut_for_itself(tokenizer: Any, tmp_path: Path) -> None:
    catalogue = Catalogue.from_tables(
        {
            "books": pa.table(
                {
                    "item_id": ["a", "b"],
                    "title": ["Dune", "Dune"],
                    "brand": ["Ace", None],
                    "categories": ["Science\n&amp; Fiction", "Go"],
                }
            )
        }
    )
    template = Template(item_fields=("title", "brand", "categories"))
    encoder = PromptEncoder(tokenizer, catalogue, template=template)
    whole = [" Dune; Ace; Science & Fiction", " Dune; Go"]
    assert [tokenizer.decode(ids) for ids in rows_of(encoder.titles(np.arange(2)))] == whole
    history = [("books", text.strip()) for text in whole]
    document, _ = encoder.documents("specific", np.array([0]), Ragged.of([[0, 1]]))
    text = render(template, "specific", "books", history[:1], history[1], "<eos>")
    assert document[0].tolist() == tokens_of(tokenizer, text)

    cut = PromptEncoder(tokenizer, catalogue, max_title_tokens=2, template=template)
    parts = [[" Dune", "; Ace", "; Science & Fiction"], [" Dune", "; Go"]]
    expected = [[i for part in item for i in tokens_of(tokenizer, part)[:2]] for item in parts]
    assert rows_of(cut.titles(np.arange(2))) == expected
    assert cut.max_item_tokens == 6 >= max(map(len, expected))
    cut.save(tmp_path)
    assert PromptEncoder.load(tmp_path, catalogue).template == template
    for wrong in (("brand",), ("title", "price"), ("title", "brand", "brand"), ()):
        with pytest.raises(ConfigError, match="begin with title, then brand or categories, each once"):
            Template(item_fields=wrong)


def test_token_counts_add_up(encoder: PromptEncoder) -> None:
    domains, history = np.array([BOOKS, GAMES]), Ragged.of([[0, 1], [3, 4, 5]])
    for kind in ("specific", "mixed"):
        counted = encoder.frame_tokens(kind, domains) + [
            encoder.event_tokens(kind, history[row]).sum() for row in range(2)
        ]
        assert encoder.prompts(kind, domains, history).lengths.tolist() == counted.tolist()


@pytest.mark.parametrize("special", ["<eos>", "<pad>"])
def test_a_title_cannot_write_special_tokens(
    tokenizer: Any, make_catalogue: Callable[..., Catalogue], special: str
) -> None:
    encoder = PromptEncoder(tokenizer, make_catalogue(books=[f"The {special} story", "Dune"]))
    tokens = encoder.titles(np.array([0]))[0]
    assert not set(tokens.tolist()) & {tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert tokenizer.decode(tokens) == f" The {special} story"


def test_a_tokenizer_without_end_of_sequence_is_refused(tokenizer: Any, catalogue: Catalogue) -> None:
    class Endless:
        eos_token_id = None

    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        PromptEncoder(Endless(), catalogue)


def test_a_saved_encoder_gives_the_same_documents(tokenizer: Any, catalogue: Catalogue, tmp_path: Path) -> None:
    template = Template(mixed_scope="many", next="\nThen:")
    encoder = PromptEncoder(tokenizer, catalogue, max_title_tokens=4, template=template)
    encoder.save(tmp_path / "encoder")
    loaded = PromptEncoder.load(tmp_path / "encoder", catalogue)
    assert (loaded.template, loaded.max_title_tokens, loaded.eos_id) == (template, 4, encoder.eos_id)
    assert loaded.vocabulary_size == encoder.vocabulary_size
    events, domains = Ragged.of([[0, 1], [2], [4, 3, 5]]), np.array([BOOKS, BOOKS, GAMES])
    for kind in ("specific", "mixed"):
        (tokens, starts), (again, starts_again) = (one.documents(kind, domains, events) for one in (encoder, loaded))
        assert tokens.values.dtype == again.values.dtype == np.uint16
        assert tokens.values.tolist() == again.values.tolist()
        assert tokens.offsets.tolist() == again.offsets.tolist()
        assert starts.tolist() == starts_again.tolist()
        prompts = [one.prompts(kind, domains, events).values.tolist() for one in (encoder, loaded)]
        assert prompts[0] == prompts[1]
    assert loaded.line_tokens.tolist() == encoder.line_tokens.tolist()
    assert loaded.next_tokens.tolist() == encoder.next_tokens.tolist()
    assert loaded.heads().values.tolist() == encoder.heads().values.tolist()
    assert [loaded.tag_tokens(domain).tolist() for domain in (BOOKS, GAMES)] == [
        encoder.tag_tokens(domain).tolist() for domain in (BOOKS, GAMES)
    ]


def test_titles_are_tokenised_in_batches(tokenizer: Any, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.arange(len(catalogue))
    expected = PromptEncoder(tokenizer, catalogue).titles(rows)
    for size in (1, 4, 6):
        monkeypatch.setattr("cprec.text.encoding.BATCH", size)
        found = PromptEncoder(tokenizer, catalogue).titles(rows)
        assert (found.values.tolist(), found.offsets.tolist()) == (expected.values.tolist(), expected.offsets.tolist())


@pytest.mark.parametrize("kind", ["specific", "mixed"])
def test_what_begins_a_document_changes_nothing_else(tokenizer: Any, catalogue: Catalogue, kind: str) -> None:
    plain, begun = (PromptEncoder(tokenizer, catalogue, begin=begin) for begin in ([], [7, 9]))
    events, domains = Ragged.of([[0, 1, 2], [2]]), np.array([0, 0])
    (tokens, targets), (before, targets_before) = (each.documents(kind, domains, events) for each in (begun, plain))
    assert [tokens[row].tolist() for row in range(2)] == [[7, 9, *before[row]] for row in range(2)]
    assert (targets == targets_before + 2).all()
    assert (begun.frame_tokens(kind, domains) == plain.frame_tokens(kind, domains) + 2).all()
    shown = begun.fit(kind, domains[:1], Ragged.of([[0, 1, 2]]), 60)
    assert len(begun.prompts(kind, domains[:1], shown)[0]) <= 60
    marks = [TemplateMarks(tokenizer, Template(), catalogue.domains, begin) for begin in ([7, 9], [])]
    in_titles, in_titles_before = (
        mark.in_titles(Ragged(of.values.astype(np.int64), of.offsets))
        for mark, of in zip(marks, (tokens, before), strict=True)
    )
    assert in_titles.sum() == in_titles_before.sum() > 0
    assert not in_titles[tokens.offsets[:-1]].any() and not in_titles[tokens.offsets[:-1] + 1].any()
