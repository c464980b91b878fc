from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cprec.data.ragged import Ragged
from cprec.text.distinct import Tokens, distinct_cuts, title_tokens
from cprec.text.encoding import PromptEncoder

titles = st.lists(st.lists(st.integers(0, 2), max_size=12).map(tuple), max_size=30)


def num_shared(texts: list[Tokens], of: list[Tokens]) -> int:
    """Titles whose text is also that of a different title."""
    owners = Counter(text for text, _ in {*zip(texts, of, strict=True)})
    return sum(owners[text] > 1 for text in texts)


@pytest.mark.parametrize(
    ("given_titles", "expected"),
    [
        ([(1, 2, 3, 4, 5, 8), (1, 2, 3, 4, 5, 9)], [(1, 2, 3, 8), (1, 2, 3, 9)]),  # they differ behind the cut
        ([(1, 2, 3, 4), (1, 2, 3, 4, 9)], [(1, 2, 3, 4), (1, 2, 3, 9)]),  # one ends at the cut
        ([(1, 2, 3, 4, 7), (1, 2, 3, 4, 7)], [(1, 2, 3, 4)] * 2),  # equal titles stay equal
        # Three that differ at once, two of them only further on: each has the token at which it leaves the others.
        ([(1, 2, 3, 4, 5, 6), (1, 2, 3, 4, 5, 7), (1, 2, 3, 4, 8)], [(1, 2, 3, 6), (1, 2, 3, 7), (1, 2, 3, 8)]),
        # (1, 2, 3, 8) is a title itself: the one that would take it keeps its plain cut.
        (
            [(1, 2, 3, 4, 8), (1, 2, 3, 4, 9), (1, 2, 3, 8)],
            [(1, 2, 3, 4), (1, 2, 3, 9), (1, 2, 3, 8)],
        ),
    ],
)
def test_cuts_worked_by_hand(given_titles: list[Tokens], expected: list[Tokens]) -> None:
    assert distinct_cuts(given_titles, 4) == expected


@given(titles, st.integers(1, 6), st.randoms(use_true_random=False))
def test_cuts_keep_the_budget_and_never_share_more(some: list[Tokens], most: int, random: Any) -> None:
    cuts = distinct_cuts(some, most)
    assert [len(cut) for cut in cuts] == [min(len(title), most) for title in some]
    assert num_shared(cuts, some) <= num_shared([title[:most] for title in some], some)
    order = random.sample(range(len(some)), len(some))
    assert distinct_cuts([some[at] for at in order], most) == [cuts[at] for at in order]


def test_an_encoder_tells_titles_of_a_domain_apart(tokenizer: Any, make_catalogue: Any, tmp_path: Any) -> None:
    same = "The long river runs along the old town and the blue hills"
    books = [f"{same} one", f"{same} two", "Dune"]
    old = make_catalogue(books=books)
    encoder = PromptEncoder(tokenizer, old, max_title_tokens=4, title_cut="distinct")
    found = encoder.titles(np.arange(3))
    assert len(np.unique(found.numbers())) == 3 and found.lengths.max() <= 4
    plain = PromptEncoder(tokenizer, old, max_title_tokens=4).titles(np.arange(3))
    assert len(np.unique(plain.numbers())) == 2
    encoder.save(tmp_path)
    for again in (
        PromptEncoder.load(tmp_path, old),
        PromptEncoder(tokenizer, old, max_title_tokens=4, title_cut="distinct"),
    ):
        assert encoder.same_titles(np.arange(3), again, np.arange(3))
    # A further item leaves the others as they are.
    more = encoder.with_catalogue(tokenizer, make_catalogue(books=[*books, f"{same} three"]))
    assert encoder.same_titles(np.arange(3), more, np.arange(3))


def test_titles_of_two_domains_are_not_compared(tokenizer: Any, make_catalogue: Any) -> None:
    same = "The long river runs along the old town and the blue hills"
    catalogue = make_catalogue(books=[f"{same} one"], games=[f"{same} two"])
    cuts: list[Ragged] = [
        PromptEncoder(tokenizer, catalogue, max_title_tokens=4, title_cut=cut).titles(np.arange(2))
        for cut in ("plain", "distinct")
    ]
    assert cuts[0].values.tolist() == cuts[1].values.tolist()


def test_titles_are_cut_where_they_differ() -> None:
    assert title_tokens(f"{'the ' * words}{n}" for words in (1, 9) for n in range(100)) == 12
    assert title_tokens(f"{'the ' * 40}{n}" for n in range(9)) == 32
    assert title_tokens([]) == title_tokens(["same", "same"]) == 8
