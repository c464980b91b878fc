"""Dense vectors of item texts."""

from __future__ import annotations

import numpy as np
import pytest

from cprec.data.ragged import Ragged
from cprec.data.titles import TitleWords, title_vectors
from cprec.errors import Unsuitable
from cprec.systems.vectors import mean_vectors, most_similar, text_vectors

WORDS = ["red", "green", "shoe", "boot", "tea", "lamp", "desk", "oil", "wool", "iron", "salt", "cup"]


def some_titles(number: int) -> list[str]:
    generator = np.random.default_rng(0)
    return [" ".join(generator.choice(WORDS, 3)) for _ in range(number)]


def test_vectors_are_the_strongest_singular_directions() -> None:
    titles = some_titles(60)
    left, strengths, _ = np.linalg.svd(title_vectors(titles).toarray())
    expected = left[:, :4] * strengths[:4]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    found = text_vectors(titles, size=4)
    assert found.dtype == np.float32
    assert np.allclose(found @ found.T, expected @ expected.T, atol=1e-5)


def test_more_directions_than_the_titles_have_are_zero() -> None:
    found = text_vectors(["red shoe", "green shoe", "shoe", ""], size=16)
    assert found.shape == (4, 16)
    assert np.allclose(np.linalg.norm(found, axis=1), [1, 1, 1, 0])
    assert not found[:, 3:].any()


def test_the_seed_decides_only_how_directions_are_found() -> None:
    titles = some_titles(60)
    first, again, other = (text_vectors(titles, size=6, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert np.allclose(first, other, atol=1e-4)


def test_the_most_similar_are_those_of_other_groups_by_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cprec.systems.vectors._COMPARED", 3)
    generator = np.random.default_rng(0)
    vectors, group = generator.standard_normal((10, 4)).astype(np.float32), np.arange(10) // 2
    among = np.array([7, 1, 2, 9, 4])
    found = most_similar(vectors.__getitem__, group, among, num=3)
    lengths = np.linalg.norm(vectors, axis=1)
    for row in range(10):
        cosines = {n: vectors[row] @ vectors[n] / lengths[row] / lengths[n] for n in among if group[n] != group[row]}
        assert found[row].tolist() == sorted(cosines, key=lambda n: -cosines[n])[:3]
    with pytest.raises(Unsuitable, match="4 neighbours are asked for, and some items or users have only 3"):
        most_similar(vectors.__getitem__, np.array([*group[:8], 0, 0]), among, num=4)


def test_a_history_has_the_mean_of_its_items_vectors() -> None:
    histories = Ragged.of([[0, 2], [1], [2, 2, 1]])
    means = mean_vectors(histories.take, np.array([[0, 0], [3, 0], [2, 6]], dtype=np.float32))
    np.testing.assert_allclose(means(np.array([2, 0])), [[7 / 3, 4], [1, 3]], rtol=1e-6)


def test_the_titles_nearest_to_others_are_weighed_by_their_cosines() -> None:
    """Red and tea weigh ln 2 and all else ln 4. Of four alike the first count; black tea has the cosine 1 with itself
    and ln2^2 / (ln2^2 + ln4^2) = 1/5 with green tea."""
    words = TitleWords(["red shoe", "red boot", "green tea", "black tea"])
    weights = words.nearest(["red tea", "shoe", "no word of them", "tea black"], 2).toarray()
    expected = [[0.5, 0.5, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1 / 6, 5 / 6]]
    assert weights == pytest.approx(np.array(expected))
    assert words.nearest([], 2).shape == (0, 4)


def test_titles_are_compared_with_those_that_have_a_word_of_theirs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of 4,000 titles has a word of its own; 3 new ones would have 12,000 cosines, of which 3 are not zero."""
    words = TitleWords([f"a word{number}" for number in range(4000)])
    new = ["a word7", "a", "word3999 word0"]
    expected = np.zeros((3, 4000))
    expected[0, 7], expected[2, [0, 3999]] = 1, 0.5

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("nothing may be as large as all cosines")

    monkeypatch.setattr("scipy.sparse.csr_array.toarray", refuse)
    for cells in (1, 8_000, 1_000_000):
        monkeypatch.setattr("cprec.data.titles._CELLS", cells)
        found = words.nearest(new, 10)
        assert found.nnz == 3
        for row in range(3):
            first, end = found.indptr[row : row + 2]
            assert dict(zip(found.indices[first:end], found.data[first:end], strict=True)) == pytest.approx(
                {place: weight for place, weight in enumerate(expected[row]) if weight}
            )
