from __future__ import annotations

from pathlib import Path

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
    assert trie.items_at(np.array([7, 4])).values.tolist() == [1, 3, 0]
    assert trie.num_items.tolist() == [4, 1, 3, 1, 1, 2, 1, 2]
    assert trie.longest.tolist() == [3, 3, 3, 3, 2, 3, 3, 3]
    assert trie.num_sharing.tolist() == [1, 1, 1, 1, 1, 2, 1, 2]
    assert np.exp(-trie.log_share(np.arange(4))).tolist() == pytest.approx([1, 2, 1, 2])
    nodes, counts = trie.paths(np.array([0, 1, 3]))
    assert dict(zip(nodes.tolist(), counts.tolist(), strict=True)) == {0: 3, 2: 3, 4: 1, 5: 2, 7: 2}


def test_added_items_stand_behind_the_others(trie: Trie) -> None:
    token, leaf = trie.token, trie.leaf
    assert trie.add(Ragged.of([[6, EOS], [5, EOS]])).tolist() == [4, 5]
    assert trie.add(Ragged.of([[6, 6, EOS]])).tolist() == [6]
    assert trie.token[:8].tolist() == token.tolist() and trie.leaf[:4].tolist() == leaf.tolist()
    assert trie.roots.tolist() == [0, 8]
    assert trie.leaf[5] == 4  # a title that was there
    assert trie.token[8:].tolist() == [-1, 6, EOS, 6, EOS]
    assert trie.num_items.tolist() == [5, 1, 4, 1, 2, 2, 1, 2, 2, 2, 1, 1, 1]
    assert trie.num_sharing.tolist() == [1, 1, 2, 1, 2, 2, 1, 2, 1, 1, 1, 1, 1]
    assert token.tolist() == [-1, 4, 5, 7, EOS, 7, EOS, EOS]  # what a running search holds has not changed


def test_withdrawn_items_count_no_more(trie: Trie) -> None:
    before = trie.num_items
    trie.withdraw(np.array([3, 0, 3]))
    assert trie.num_items.tolist() == [2, 1, 1, 1, 0, 1, 1, 1]
    assert trie.num_sharing.tolist() == [1, 1, 1, 1, np.iinfo(np.int32).max, 1, 1, 1]
    assert np.exp(-trie.log_share(np.arange(4))).tolist() == pytest.approx([1, 1, 1, 2])  # as if it were back
    assert before.tolist() == [4, 1, 3, 1, 1, 2, 1, 2]
    trie.withdraw(np.array([3]))
    trie.put_back(np.array([0, 3]))
    assert trie.num_items.tolist() == before.tolist()
    assert trie.num_sharing.tolist() == [1, 1, 1, 1, 1, 2, 1, 2]


def test_a_mask_leaves_the_items_of_one_domain(trie: Trie) -> None:
    trie.withdraw(np.array([1]))
    only = trie.only(np.array([False, True, True, True]))
    assert only.num_items.tolist() == [2, 1, 1, 1, 0, 1, 1, 1]
    assert only.in_stock.tolist() == [False, False, True, True]
    assert only.token is trie.token and trie.num_items[0] == 3


def test_saved_and_mapped_it_is_the_same(trie: Trie, tmp_path: Path) -> None:
    trie.add(Ragged.of([[6, EOS]]))
    trie.save(tmp_path)
    loaded = Trie.load(tmp_path, verify=True)
    assert isinstance(loaded.token, np.memmap)
    assert loaded.sha256() == trie.sha256()
    loaded.withdraw(np.array([0]))
    loaded.add(Ragged.of([[6, 2, EOS]]))
    assert loaded.sha256() != trie.sha256()
    assert Trie.load(tmp_path, verify=True).sha256() == trie.sha256()
    with (tmp_path / "token.npy").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\x09")
    with pytest.raises(DataError, match="not the one that was saved"):
        Trie.load(tmp_path, verify=True)
    (tmp_path / "trie.json").unlink()
    with pytest.raises(DataError, match="holds no whole trie"):
        Trie.load(tmp_path)


def test_titles_that_cannot_be_ranked_are_refused_by_name(trie: Trie) -> None:
    with pytest.raises(DataError, match="a trie needs at least one title"):
        Trie.build(Ragged.of([]))
    with pytest.raises(DataError, match="the title of item 1 has no tokens"):
        Trie.build(Ragged.of([[5, EOS], [EOS]]))
    with pytest.raises(DataError, match="the title of the red one has no tokens"):
        Trie.build(Ragged.of([[], [5, EOS]]), {0: "the red one"}.__getitem__)
    with pytest.raises(DataError, match=f"item 0, item 1, item 2, item 3, item 4 and 1 more has more than {LONGEST}"):
        Trie.build(Ragged.of([[5] * LONGEST + [EOS]] * 6))
    for broken in ([EOS, 5, EOS], [5, 6]):
        with pytest.raises(DataError, match="item 0 does not end with the end-of-sequence token, or has it within"):
            trie.add(Ragged.of([broken]))
    assert trie.num_nodes == 8


def test_a_million_titles_take_little(trie: Trie) -> None:
    random = np.random.default_rng(0)
    titles = [[*random.integers(2, 4000, size).tolist(), EOS] for size in random.integers(3, 12, 5000)]
    built = Trie.build(Ragged.of(titles))
    assert built.nbytes / len(titles) <= 100
    assert all(built.find(np.array(title)) == leaf for title, leaf in zip(titles, built.leaf, strict=True))
