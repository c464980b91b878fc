from __future__ import annotations

import numpy as np
import pytest

from cprec.data.ragged import Ragged
from cprec.rank.trie import Trie

EOS = 1


def test_a_trie_by_hand() -> None:
    # "5", "5 7", "4 7" and once more "5 7"
    trie = Trie.build(Ragged.of([[5, EOS], [5, 7, EOS], [4, 7, EOS], [5, 7, EOS]]))
    assert trie.token.tolist() == [-1, 4, 5, 7, EOS, 7, EOS, EOS]
    assert trie.parent.tolist() == [-1, 0, 0, 1, 2, 2, 3, 5]
    assert trie.first_child.tolist() == [1, 3, 4, 6, 7, 7, 8, 8, 8]
    assert trie.leaf.tolist() == [4, 7, 6, 7]
    assert trie.items[7].tolist() == [1, 3]
    assert trie.num_leaves.tolist() == [3, 1, 2, 1, 1, 1, 1, 1]


def test_a_node_dies_when_all_below_it_is_excluded() -> None:
    trie = Trie.build(Ragged.of([[5, EOS], [5, 7, EOS], [4, 7, EOS], [5, 7, EOS]]))
    assert trie.dead_nodes(np.array([], dtype=np.int64)).tolist() == []
    assert trie.dead_nodes(np.array([1])).tolist() == []  # item 3 has the same title
    assert trie.dead_nodes(np.array([3, 1])).tolist() == [5, 7]
    assert trie.dead_nodes(np.array([0, 1, 3])).tolist() == [2, 4, 5, 7]
    assert trie.dead_nodes(np.arange(4)).tolist() == list(range(8))


def test_titles_without_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="a trie needs at least one title"):
        Trie.build(Ragged.of([]))
    with pytest.raises(ValueError, match="the title of item 1 has no tokens"):
        Trie.build(Ragged.of([[5, EOS], [EOS]]))
