from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from cprec.data.ragged import Ragged
from cprec.rank.attention import PromptTree
from cprec.rank.decoding import Found
from cprec.rank.decoding import search as search_trie
from cprec.rank.scoring import score_candidates
from cprec.rank.trie import Trie

EOS = 1
PROMPTS = [[40, 41, 42], [50], [60, 61, 62, 63, 64, 65, 66, 67]]
TITLES = [
    [5, 6, 7],
    [5, 6],  # begins the first
    [5],
    [9, 8, 7, 6, 5, 4, 3],
    [9, 8, 7, 6],
    [5, 6],  # equals another
    [30],
    [31, 5],
    [9, 8, 2],
]
ENDED = [[*title, EOS] for title in TITLES]

Score = Callable[[list[int], list[int]], float]


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.inference_mode():
        yield


def search(
    model: Any, prompts: list[list[int]], excluded: list[list[int]] | None = None, **settings: Any
) -> list[Found]:
    tree = PromptTree(model, [np.array(prompt) for prompt in prompts])
    gone = None if excluded is None else [np.array(mine, dtype=np.int64) for mine in excluded]
    return search_trie(tree, Trie.build(Ragged.of(ENDED)), excluded=gone, **({"k": 4, "width": 3} | settings))


def test_every_item_gets_its_exact_score(model: Any, teacher_forced: Score) -> None:
    for prompt, found in zip(PROMPTS, search(model, PROMPTS, k=9), strict=True):
        assert sorted(found.items.tolist()) == list(range(9))
        expected = [teacher_forced(prompt, ENDED[item]) for item in found.items]
        assert found.scores.tolist() == pytest.approx(expected, abs=1e-4)
        assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
        scores = dict(zip(found.items.tolist(), found.scores.tolist(), strict=True))
        assert scores[1] == scores[5]


@pytest.mark.parametrize("k", [1, 2, 3, 5, 20])
def test_the_best_k_and_what_ties_with_the_last(model: Any, teacher_forced: Score, k: int) -> None:
    for prompt, found in zip(PROMPTS, search(model, PROMPTS, k=k), strict=True):
        scores = {item: teacher_forced(prompt, title) for item, title in enumerate(ENDED)}
        last = sorted(scores.values(), reverse=True)[: min(k, 9)][-1]
        assert set(found.items.tolist()) == {item for item, score in scores.items() if score >= last - 1e-9}


def test_a_batch_is_answered_as_singly(model: Any) -> None:
    excluded = [[0], [], [1, 5, 6]]
    together = search(model, PROMPTS, excluded, width=3, k=3)
    for prompt, gone, found in zip(PROMPTS, excluded, together, strict=True):
        (alone,) = search(model, [prompt], [gone], width=3, k=3)
        assert alone.items.tolist() == found.items.tolist()
        assert alone.scores.tolist() == pytest.approx(found.scores.tolist(), abs=1e-5)


def test_excluded_items_make_room_for_others(model: Any, teacher_forced: Score) -> None:
    for gone in ([1], [1, 5], [0, 1, 2, 5], [3, 4, 8], list(range(8))):
        for prompt, found in zip(PROMPTS, search(model, PROMPTS, [gone] * 3, k=2), strict=True):
            left = {i: teacher_forced(prompt, title) for i, title in enumerate(ENDED) if i not in gone}
            last = sorted(left.values(), reverse=True)[: min(2, len(left))][-1]
            assert set(found.items.tolist()) == {item for item, score in left.items() if score >= last - 1e-9}


def test_users_who_have_seen_everything_get_nothing(model: Any) -> None:
    nothing, something = search(model, PROMPTS[:2], [list(range(9)), []], k=2)
    assert nothing.items.tolist() == nothing.scores.tolist() == []
    assert len(something.items) >= 2
    assert [len(found.items) for found in search(model, PROMPTS[:1], [list(range(9))])] == [0]


def test_a_narrow_beam_still_finds_k_valid_items(model: Any, teacher_forced: Score) -> None:
    for k in (1, 2, 4):
        for prompt, found in zip(PROMPTS, search(model, PROMPTS, k=k, width=k), strict=True):
            items = found.items.tolist()
            assert len(items) == len(set(items)) >= k
            assert found.scores.tolist() == pytest.approx([teacher_forced(prompt, ENDED[i]) for i in items], abs=1e-4)


def test_candidates_score_alike_whatever_stands_beside_them(model: Any, teacher_forced: Score) -> None:
    asked = [[0, 1, 2, 5], [], [8, 3, 3]]
    tree = PromptTree(model, [np.array(prompt) for prompt in PROMPTS])
    scores = score_candidates(tree, [Ragged.of([ENDED[item] for item in mine]) for mine in asked])
    for prompt, mine, got in zip(PROMPTS, asked, scores, strict=True):
        assert got.tolist() == pytest.approx([teacher_forced(prompt, ENDED[item]) for item in mine], abs=1e-4)


def test_no_candidates_at_all(model: Any) -> None:
    tree = PromptTree(model, [np.array(prompt) for prompt in PROMPTS])
    assert [len(mine) for mine in score_candidates(tree, [Ragged.of([])] * 3)] == [0, 0, 0]


def test_bf16_comes_close(model: Any, teacher_forced: Score) -> None:
    tree = PromptTree(model, [np.array(prompt) for prompt in PROMPTS], bf16=True)
    (scores, *_) = score_candidates(tree, [Ragged.of(ENDED)] * 3)
    assert scores.tolist() == pytest.approx([teacher_forced(PROMPTS[0], title) for title in ENDED], rel=0.1, abs=0.5)
