from __future__ import annotations

import numpy as np
import pytest

from cprec.data.ragged import Ragged
from cprec.errors import DataError
from cprec.search.trie import LONGEST, Trie

EOS = 1
TITLES = [[5, EOS], [5, 7, EOS], [4, 7, EOS], [5, 7, EOS]]  # "5", "5 7", "4 7" and once more "5 7"


@pytest.fixture
def trie() -> Trie:
    return Trie.build(Ragged.of(TITLES))


def test_a_trie_by_hand(trie: Trie) -> None:
    assert trie.token.tolist() == [-1, 4, 5, 7, EOS, 7, EOS, EOS]
    assert trie.parent(np.arange(1, 8)).tolist() == [0, 0, 1, 2, 2, 3, 5]
    assert trie.first_child.tolist() == [1, 3, 4, 6, 7, 7, 8, 8, 8]
    assert trie.leaf.tolist() == [4, 7, 6, 7]
    assert trie.by_sequence.tolist() == [2, 0, 1, 3]
    assert trie.first_item.tolist() == [0, 0, 1, 0, 1, 2, 0, 2]
    assert trie.num_items.tolist() == [4, 1, 3, 1, 1, 2, 1, 2]
    assert trie.longest.tolist() == [3, 3, 3, 3, 2, 3, 3, 3]
    assert trie.tail.tolist() == [0, 2, 0, 1, 0, 1, 0, 0]
    assert trie.num_sharing.tolist() == [1, 1, 1, 1, 1, 2, 1, 2]
    assert np.exp(-trie.log_share(np.arange(4))).tolist() == pytest.approx([1, 2, 1, 2])
    nodes, counts = trie.paths(np.array([0, 1, 3]))
    assert dict(zip(nodes.tolist(), counts.tolist(), strict=True)) == {0: 3, 2: 3, 4: 1, 5: 2, 7: 2}


def test_withdrawn_items_count_no_more(trie: Trie) -> None:
    less = trie.with_stock(np.array([False, True, True, False]))
    assert less.num_items.tolist() == [2, 1, 1, 1, 0, 1, 1, 1]
    assert less.by_sequence.tolist() == [2, 1] and less.first_item.tolist() == [0, 0, 1, 0, 1, 1, 0, 1]
    assert less.num_sharing.tolist() == [1, 1, 1, 1, np.iinfo(np.int32).max, 1, 1, 1]
    assert np.exp(-less.log_share(np.arange(4))).tolist() == pytest.approx([1, 1, 1, 2])  # as if it were back
    assert less.token is trie.token and trie.num_items[0] == 4
    assert less.with_stock(trie.in_stock).num_sharing.tolist() == trie.num_sharing.tolist()


def test_sequences_that_cannot_be_ranked_are_refused_by_name() -> None:
    with pytest.raises(DataError, match="a trie needs at least one item"):
        Trie.build(Ragged.of([]))
    with pytest.raises(DataError, match="item 1 has no tokens"):
        Trie.build(Ragged.of([[5, EOS], [EOS]]))
    with pytest.raises(DataError, match="the red one has no tokens"):
        Trie.build(Ragged.of([[], [5, EOS]]), {0: "the red one"}.__getitem__)
    with pytest.raises(DataError, match=f"item 0, item 1, item 2, item 3, item 4 and 1 more has more than {LONGEST}"):
        Trie.build(Ragged.of([[5] * LONGEST + [EOS]] * 6))
    for broken in ([EOS, 5, EOS], [5, 6]):
        with pytest.raises(DataError, match="item 0 does not end with the end token, or has it within"):
            Trie.build(Ragged.of([broken, [5, EOS]]))


def test_a_million_titles_take_little() -> None:
    random = np.random.default_rng(0)
    titles = [[*random.integers(2, 4000, size).tolist(), EOS] for size in random.integers(3, 12, 5000)]
    built = Trie.build(Ragged.of(titles))
    arrays = (built.token, built.first_child, built.num_items, built.leaf, built.in_stock)
    assert sum(array.nbytes for array in arrays) / len(titles) <= 100
