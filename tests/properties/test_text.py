from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from cprec.data.catalogue import Catalogue
from cprec.data.cleaning import clean_title
from cprec.data.ragged import Ragged
from cprec.text.encoding import PromptEncoder
from cprec.text.packing import pack
from cprec.text.prompts import Template, render
from cprec.text.tokenizer import train_tokenizer

texts = st.text(st.characters(codec="utf-8"), max_size=30)
words = st.sampled_from(
    ["Dune", "2", "-", "№", "Émile", "[games]", "...", "(2nd", "Next:", "don't", "-1.5", "\u0301a", "!"]
)
titles = st.one_of(
    st.lists(words, min_size=1, max_size=6).map(" ".join), texts, st.tuples(texts, words).map(" ".join)
).map(clean_title).filter(bool)  # fmt: skip
domain_names = st.lists(
    st.sampled_from(["books", "games"]) | st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,8}", fullmatch=True),
    min_size=2,
    max_size=2,
    unique=True,
).map(lambda names: (names[0], names[1]))
catalogues = st.tuples(st.lists(titles, min_size=1, max_size=4), st.lists(titles, min_size=1, max_size=4))


@cache
def tokenizer() -> Any:
    fixed = "Domain: books\nHistory:\n- Domain: multiple\nNext: [books] [games]"
    return train_tokenizer([fixed] * 20 + ["the Dune saga, vol. 2 (illustrated)"], 340)


def catalogue_of(names: tuple[list[str], list[str]], domains: tuple[str, str] = ("books", "games")) -> Catalogue:
    return Catalogue.from_tables(
        {
            domain: pa.table({"item_id": [str(row) for row in range(len(mine))], "title": mine})
            for domain, mine in zip(domains, names, strict=True)
        }
    )


def ids(text: str) -> list[int]:
    return tokenizer()(text, add_special_tokens=False)["input_ids"]


@given(texts)
def test_any_text_round_trips(text: str) -> None:
    if "<eos>" not in text and "<pad>" not in text:
        assert tokenizer().decode(ids(text)) == text


@given(catalogues, st.sampled_from(["specific", "mixed"]), st.data())
def test_assembled_tokens_are_those_of_the_rendered_text(
    names: tuple[list[str], list[str]], kind: str, data: st.DataObject
) -> None:
    catalogue = catalogue_of(names, data.draw(domain_names))
    encoder = PromptEncoder(tokenizer(), catalogue, max_title_tokens=1000)
    with tempfile.TemporaryDirectory() as folder:
        encoder.save(Path(folder))
        saved = PromptEncoder.load(Path(folder), catalogue)
    rows = st.lists(st.integers(0, len(catalogue) - 1), min_size=1, max_size=5)
    events = data.draw(st.lists(rows, min_size=1, max_size=3))
    target_domain = catalogue.domain[[mine[-1] for mine in events]].astype(np.int64)
    named = [[(catalogue.domains[catalogue.domain[row]], str(catalogue.title[row])) for row in mine] for mine in events]

    documents, target_start = encoder.documents(kind, target_domain, Ragged.of(events))
    prompts = encoder.prompts(kind, target_domain, Ragged.of([mine[:-1] for mine in events]))
    for row, mine in enumerate(named):
        domain = catalogue.domains[target_domain[row]]
        assert documents[row].tolist() == ids(render(Template(), kind, domain, mine[:-1], mine[-1], "<eos>"))
        assert prompts[row].tolist() == ids(render(Template(), kind, domain, mine[:-1]))
        assert target_start[row] == len(prompts[row])
    again, starts = saved.documents(kind, target_domain, Ragged.of(events))
    assert (again.values.tolist(), starts.tolist()) == (documents.values.tolist(), target_start.tolist())


@given(catalogues, st.sampled_from(["specific", "mixed"]), st.integers(0, 120), st.data())
def test_fit_keeps_the_latest_events_that_fit(
    names: tuple[list[str], list[str]], kind: str, max_tokens: int, data: st.DataObject
) -> None:
    catalogue = catalogue_of(names)
    encoder = PromptEncoder(tokenizer(), catalogue)
    rows = st.lists(st.integers(0, len(catalogue) - 1), max_size=8)
    history = data.draw(st.lists(rows, max_size=4))
    domains = np.zeros(len(history), dtype=np.int64)

    kept = encoder.fit(kind, domains, Ragged.of(history), max_tokens)

    assert len(kept) == len(history)
    for row, events in enumerate(history):
        best = []
        for first in range(len(events), -1, -1):
            tried = encoder.prompts(kind, domains[:1], Ragged.of([events[first:]]))
            if tried.lengths[0] > max_tokens:
                break
            best = events[first:]
        assert kept[row].tolist() == best


@given(st.lists(st.integers(1, 32), max_size=120), st.integers(0, 3), st.sampled_from([7, 4096]))
def test_packing_neither_loses_nor_repeats_nor_overfills(lengths: list[int], seed: int, window: int) -> None:
    rows = pack(np.array(lengths, dtype=np.int64), 32, seed, window)
    assert sorted(rows.values.tolist()) == list(range(len(lengths)))
    for row in range(len(rows)):
        assert len(rows[row]) >= 1 and sum(lengths[document] for document in rows[row]) <= 32
