from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cprec.data.catalogue import Catalogue
from cprec.data.cleaning import clean_title
from cprec.data.leakage import (
    Grammar,
    Property,
    check_absent,
    check_documents,
    check_heads,
    read_events,
    row_hashes,
)
from cprec.data.ragged import Ragged
from cprec.text.encoding import PromptEncoder
from cprec.text.tokenizer import train_tokenizer

DOMAINS = ("books", "games", "toys")


@cache
def ours() -> Any:
    return train_tokenizer(["Domain: books\nHistory:\n- a\nNext: [books] [games] [toys] the Dune saga 2!"] * 9, 330)


@cache
def like_gpt2() -> Any:
    """Newlines are units of their own and stick to spaces around them, as in the tokenizers of GPT-2 and Qwen."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = ["Domain: books\nHistory:\n- a!\n- b.\nNext: [books] - [games] the end.\n- Next: -", "\n-", " -", ".\n-"]
    tokenizer.train_from_iterator(texts * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


TOKENIZERS = {"ours": ours, "like GPT-2": like_gpt2}


def grammar_of(encoder: PromptEncoder) -> Grammar:
    catalogue = encoder.catalogue
    return Grammar(
        heads=encoder.heads(),
        line=encoder.line_tokens,
        next=encoder.next_tokens,
        eos=encoder.eos_id,
        tags=Ragged.of([encoder.tag_tokens(number) for number in range(len(catalogue.domains))]),
        titles=encoder.titles(np.arange(len(catalogue))),
        domain=catalogue.domain,
    )


def catalogue_of(titles: dict[str, list[str]]) -> Catalogue:
    return Catalogue.from_tables(
        {
            domain: pa.table({"item_id": [f"{row:03}" for row in range(len(names))], "title": names})
            for domain, names in titles.items()
        }
    )


def test_a_text_before_the_first_line_is_found() -> None:
    encoder = PromptEncoder(ours(), catalogue_of({"books": ["Dune", "Emma"], "games": ["Go"]}))
    grammar = grammar_of(encoder)
    events = Ragged.of([[0, 1], [1, 0]])
    documents, _ = encoder.documents("specific", np.array([0, 0]), events)
    mixed, _ = encoder.documents("mixed", np.array([-1]), Ragged.of([[0, 2]]))
    clean = Ragged.concatenate([documents, mixed])
    assert check_heads("x", clean, np.array([0, 0, -1]), grammar).violations == 0
    planted = Ragged.of([documents[0], np.concatenate([encoder.titles(np.array([0])).values, documents[1]])])
    found = check_heads("x", planted, np.array([0, 0]), grammar)
    assert found.violations == 1 and found.examples == ["document 1"]
    assert check_heads("x", documents, np.array([1, 1]), grammar).violations == 2  # the head of another domain


# ---- reading ---------------------------------------------------------------------------------------------------------

words = st.sampled_from(
    ["Dune", "2", "-", "Next:", "[games]", "[books]", "end.", "(old)", "!", "Émile", "№", "don't", "a", "- -"]
)
titles = st.lists(words, min_size=1, max_size=4).map(" ".join).map(clean_title).filter(bool)
names = st.lists(titles, min_size=1, max_size=4)


@pytest.mark.slow
@settings(max_examples=100)
@given(st.tuples(names, names, names), st.sampled_from(sorted(TOKENIZERS)), st.sampled_from([2, 3, 32]), st.data())
def test_reading_inverts_writing(
    named: tuple[list[str], ...], tokenizer: str, max_title_tokens: int, data: st.DataObject
) -> None:
    catalogue = catalogue_of(dict(zip(DOMAINS, named, strict=True)))
    encoder = PromptEncoder(TOKENIZERS[tokenizer](), catalogue, max_title_tokens=max_title_tokens)
    grammar = grammar_of(encoder)
    number = grammar.title_of_row
    parts, domains, expected = [], [], []
    for kind in ("specific", "mixed"):
        for _ in range(data.draw(st.integers(0, 3))):
            domain = data.draw(st.integers(0, 2))
            rows = catalogue.rows_of(DOMAINS[domain]) if kind == "specific" else np.arange(len(catalogue))
            events = data.draw(st.lists(st.sampled_from(rows.tolist()), min_size=1, max_size=5))
            parts.append(encoder.documents(kind, np.array([domain]), Ragged.of([events]))[0])
            domains.append(domain if kind == "specific" else -1)
            expected.append(number[events].tolist())
    read = read_events(Ragged.concatenate(parts), np.array(domains, dtype=np.int64), grammar)
    assert [read.title[read.document == row].tolist() for row in range(len(parts))] == expected
    assert (np.diff(read.document) >= 0).all()


def test_titles_share_a_number_if_nothing_tells_them_apart() -> None:
    catalogue = catalogue_of({"books": ["Emma", "Emma", "Emma II"], "games": ["Emma"]})
    cut = PromptEncoder(ours(), catalogue, max_title_tokens=1)
    whole = PromptEncoder(ours(), catalogue)
    first, again, second, other = grammar_of(whole).title_of_row
    assert first == again and len({first, second, other}) == 3
    first, again, second, other = grammar_of(cut).title_of_row
    assert first == again == second != other


def test_hashes_tell_rows_apart() -> None:
    rows = [[], [0], [0, 0], [1], [0, 1], [1, 0], [65535], [5] * 5000, [5] * 4999 + [6]]
    assert len(set(row_hashes(Ragged.of(rows)).tolist())) == len(rows)
    shuffled = Ragged.of(rows[::-1])
    assert row_hashes(shuffled).tolist() == row_hashes(Ragged.of(rows)).tolist()[::-1]


@pytest.mark.parametrize(
    "spoilt",
    [
        "Domain: books\nHistory:\n- Dune and more\nNext: Emma<eos>",
        "Domain: books\nHistory:\n- Dun\nNext: Emma<eos>",
        "Domain: books\nHistory:\n-\nNext: Emma<eos>",
        "Domain: books\nHistory:\n- Dune\nNext: Emma Dune<eos>",
        "Domain: books\nHistory:\n- Dune\nNext: Emma<eos> Dune",
        "Domain: books\nHistory:\n- Dune\nNext: Go<eos>",
        "Domain: books\nHistory:\n- [books] Dune\nNext: Emma<eos>",
    ],
)
def test_a_line_that_is_no_title_of_the_domain_is_found(spoilt: str) -> None:
    catalogue = catalogue_of({"books": ["Dune", "Emma"], "games": ["Go"]})
    encoder = PromptEncoder(ours(), catalogue)
    read = read_events(Ragged.of([ours()(spoilt)["input_ids"]]), np.array([0]), grammar_of(encoder))
    assert (read.title == -1).sum() == 1


# ---- checking --------------------------------------------------------------------------------------------------------


@dataclass
class Shop:
    """Two users' logs and the documents made from them: (user, kind, events by title)."""

    train: dict[int, list[str]] = field(
        default_factory=lambda: {0: ["Dune", "Go", "Emma", "Emma"], 1: ["Emma", "Ludo"]}
    )
    held_out: dict[int, list[str]] = field(default_factory=lambda: {0: ["Ulysses", "Dune"], 1: ["Chess"]})
    documents: list[tuple[int, str, list[str]]] = field(
        default_factory=lambda: [
            (0, "books", ["Dune", "Emma", "Emma"]),
            (0, "mixed", ["Dune", "Go", "Emma", "Emma"]),
            (1, "mixed", ["Emma", "Ludo"]),
        ]
    )

    def check(self, *, per_document: bool = False) -> list[Property]:
        catalogue = catalogue_of({"books": ["Dune", "Emma", "Ulysses"], "games": ["Chess", "Go", "Ludo"]})
        row = {title: number for number, title in enumerate(catalogue.title)}
        encoder = PromptEncoder(ours(), catalogue)
        grammar = grammar_of(encoder)
        number = grammar.title_of_row
        parts = []
        for _, kind, names in self.documents:
            events = Ragged.of([[row[title] for title in names]])
            parts.append(encoder.documents("mixed" if kind == "mixed" else "specific", np.array([0]), events)[0])
        mixed = np.array([kind == "mixed" for _, kind, _ in self.documents])

        def pairs(log: dict[int, list[str]]) -> tuple[np.ndarray, np.ndarray]:
            users = [user for user, names in log.items() for _ in names]
            events = [row[title] for names in log.values() for title in names]
            return np.array(users, dtype=np.int64), number[np.array(events, dtype=np.int64)]

        return check_documents(
            "shards",
            read_events(Ragged.concatenate(parts), np.where(mixed, -1, 0), grammar),
            len(parts),
            np.array([user for user, _, _ in self.documents]),
            *pairs(self.train),
            *pairs(self.held_out),
            per_document=per_document,
            group=mixed.astype(int),
        )

    def violations(self, *, per_document: bool = False) -> list[int]:
        """Of the three properties: lines read, nothing held out, nothing beyond the log."""
        return [p.violations for p in self.check(per_document=per_document)]


def test_clean_documents_pass_and_everything_is_counted() -> None:
    lines, held_out, beyond = Shop().check()
    assert [lines.violations, held_out.violations, beyond.violations] == [0, 0, 0]
    assert lines.checked == 9 + 3 and held_out.checked == beyond.checked == 9
    assert lines.examples == held_out.examples == []


@pytest.mark.parametrize(("document", "title"), [(0, "Ulysses"), (1, "Ulysses"), (2, "Chess")])
@pytest.mark.parametrize("place", [0, -1])
def test_a_held_out_event_is_found_in_either_kind(document: int, title: str, place: int) -> None:
    shop = Shop()
    names = shop.documents[document][2]
    names.insert(len(names) if place else 0, title)
    lines, held_out, beyond = shop.check()
    assert [lines.violations, held_out.violations, beyond.violations] == [0, 1, 0]
    assert held_out.examples[0].startswith(f"user row {shop.documents[document][0]}, ")


def test_a_held_out_repeat_of_a_training_event_is_found() -> None:
    shop = Shop()
    shop.documents[0][2].append("Dune")  # trained on once, and tested on
    assert shop.violations() == [0, 1, 0]


def test_a_held_out_event_of_another_user_is_none() -> None:
    shop = Shop()
    shop.train[1].append("Ulysses")
    shop.documents[2][2].append("Ulysses")
    assert shop.violations() == [0, 0, 0]


def test_repeats_beyond_the_log_are_found_across_documents() -> None:
    shop = Shop()
    shop.documents[0][2].append("Emma")  # a third time
    assert shop.violations() == [0, 0, 1]
    shop = Shop()
    shop.documents.append((0, "books", ["Emma"]))
    assert shop.violations() == [0, 0, 1]


def test_events_of_nobody_are_found() -> None:
    shop = Shop()
    shop.documents[2][2].append("Go")
    assert shop.violations() == [0, 0, 1]


def test_examples_may_share_their_histories() -> None:
    shop = Shop(documents=[(0, "books", ["Dune", "Emma"]), (0, "books", ["Dune", "Emma", "Emma"])])
    assert shop.violations(per_document=True) == [0, 0, 0]
    assert shop.violations() == [0, 1, 1]  # as shards: Dune, also held out, once too often, and Emma
    shop.documents[1][2].append("Ulysses")
    assert shop.violations(per_document=True) == [0, 1, 0]
    shop.documents[0][2].append("Dune")
    assert shop.violations(per_document=True) == [0, 2, 0]


def test_a_log_without_training_or_held_out_events() -> None:
    assert Shop(held_out={}).violations() == [0, 0, 0]
    assert Shop(train={}).violations() == [0, 2, 5]  # Dune is held out, in both kinds; the others are nobody's
    assert Shop(train={}, held_out={}, documents=[]).violations() == [0, 0, 0]


def test_documents_without_lines_are_found() -> None:
    catalogue = catalogue_of({"books": ["Dune"]})
    grammar = grammar_of(PromptEncoder(ours(), catalogue))
    documents = Ragged.of([ours()(text)["input_ids"] for text in ("Domain: books\nHistory:<eos>", "Dune<eos>")])
    events = read_events(documents, np.array([0, 0]), grammar)
    none = np.empty(0, dtype=np.int64)
    lines, *_ = check_documents(
        "shards", events, 2, np.array([0, 0]), none, none, none, none, per_document=False, group=np.zeros(2, dtype=int)
    )
    assert lines.violations == 2 and lines.examples == ["document 0 has no line", "document 1 has no line"]


def test_what_must_be_absent_is_found_and_named() -> None:
    found = check_absent("no unseen item", np.array([3, 5, 5, 7]), np.array([5, 9]), {5: "Dune", 9: "Emma"})
    assert (found.checked, found.violations, found.examples) == (4, 2, ["Dune"])
    assert check_absent("no unseen user", np.array([3]), np.array([], dtype=np.int64), {}).violations == 0
    assert asdict(found) == {"name": "no unseen item", "checked": 4, "violations": 2, "examples": ["Dune"]}
