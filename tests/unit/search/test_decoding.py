from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from cprec.data.ragged import Ragged
from cprec.errors import ConfigError, DataError
from cprec.search.attention import PromptTree
from cprec.search.cache import PrefixCache
from cprec.search.decoding import Found
from cprec.search.decoding import search as search_trie
from cprec.search.normaliser import OverCatalogue
from cprec.search.priors import Priors
from cprec.search.scoring import score_candidates
from cprec.search.trie import Trie
from cprec.search.writing import match, write

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
EVERYTHING = tuple(range(len(TITLES)))
TRIE, ALL = Trie.build(Ragged.of(ENDED)), np.arange(len(TITLES))

Score = Callable[[list[int], list[int]], float]
OfItem = Callable[..., float]


@pytest.fixture
def of_item(teacher_forced: Score) -> OfItem:
    """An item's log-probability by one forward pass: its title's, shared by the items in stock that have the title."""

    def score(prompt: list[int], item: int, stock: Sequence[int] = EVERYTHING) -> float:
        sharing = sum(TITLES[other] == TITLES[item] for other in {*stock, item})
        return teacher_forced(prompt, ENDED[item]) - math.log(sharing)

    return score


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


def test_every_item_gets_its_exact_score(model: Any, of_item: OfItem) -> None:
    for prompt, found in zip(PROMPTS, search(model, PROMPTS, k=9), strict=True):
        assert sorted(found.items.tolist()) == list(range(9))
        expected = [of_item(prompt, item) for item in found.items]
        assert found.scores.tolist() == pytest.approx(expected, abs=1e-4)
        assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
        scores = dict(zip(found.items.tolist(), found.scores.tolist(), strict=True))
        assert scores[1] == scores[5]


@pytest.mark.parametrize("k", [1, 2, 3, 5, 20])
def test_the_best_k_and_what_ties_with_the_last(model: Any, of_item: OfItem, k: int) -> None:
    for prompt, found in zip(PROMPTS, search(model, PROMPTS, k=k), strict=True):
        scores = {item: of_item(prompt, item) for item in EVERYTHING}
        last = sorted(scores.values(), reverse=True)[: min(k, 9)][-1]
        assert set(found.items.tolist()) == {item for item, score in scores.items() if score >= last - 1e-9}


def test_a_batch_is_answered_as_singly(model: Any) -> None:
    excluded = [[0], [], [1, 5, 6]]
    together = search(model, PROMPTS, excluded, width=3, k=3)
    for prompt, gone, found in zip(PROMPTS, excluded, together, strict=True):
        (alone,) = search(model, [prompt], [gone], width=3, k=3)
        assert alone.items.tolist() == found.items.tolist()
        assert alone.scores.tolist() == pytest.approx(found.scores.tolist(), abs=1e-5)


def test_excluded_items_make_room_for_others(model: Any, of_item: OfItem) -> None:
    """They stay in stock, so those that share a title with them keep their share."""
    for gone in ([1], [1, 5], [0, 1, 2, 5], [3, 4, 8], list(range(8))):
        for prompt, found in zip(PROMPTS, search(model, PROMPTS, [gone] * 3, k=2), strict=True):
            left = {item: of_item(prompt, item) for item in EVERYTHING if item not in gone}
            last = sorted(left.values(), reverse=True)[: min(2, len(left))][-1]
            assert set(found.items.tolist()) == {item for item, score in left.items() if score >= last - 1e-9}


def test_users_who_have_seen_everything_get_nothing(model: Any) -> None:
    nothing, something = search(model, PROMPTS[:2], [list(range(9)), []], k=2)
    assert nothing.items.tolist() == nothing.scores.tolist() == []
    assert len(something.items) >= 2
    assert [len(found.items) for found in search(model, PROMPTS[:1], [list(range(9))])] == [0]


def test_a_narrow_beam_still_finds_k_valid_items(model: Any, of_item: OfItem) -> None:
    for k in (1, 2, 4):
        for prompt, found in zip(PROMPTS, search(model, PROMPTS, k=k, width=k), strict=True):
            items = found.items.tolist()
            assert len(items) == len(set(items)) >= k
            assert found.scores.tolist() == pytest.approx([of_item(prompt, item) for item in items], abs=1e-4)


def test_candidates_score_alike_whatever_stands_beside_them(model: Any, teacher_forced: Score) -> None:
    asked = [[0, 1, 2, 5], [], [8, 3, 3]]
    tree = PromptTree(model, [np.array(prompt) for prompt in PROMPTS])
    scores = score_candidates(tree, TRIE, [np.array(mine, dtype=np.int64) for mine in asked])
    for prompt, mine, got in zip(PROMPTS, asked, scores, strict=True):
        assert got.tolist() == pytest.approx([teacher_forced(prompt, ENDED[item]) for item in mine], abs=1e-4)


def test_no_candidates_at_all(model: Any) -> None:
    tree = PromptTree(model, [np.array(prompt) for prompt in PROMPTS])
    assert [len(mine) for mine in score_candidates(tree, TRIE, [np.empty(0, dtype=np.int64)] * 3)] == [0, 0, 0]


def test_bf16_comes_close(model: Any, teacher_forced: Score) -> None:
    tree = PromptTree(model, [np.array(prompt) for prompt in PROMPTS], bf16=True)
    (scores, *_) = score_candidates(tree, TRIE, [ALL] * 3)
    assert scores.tolist() == pytest.approx([teacher_forced(PROMPTS[0], title) for title in ENDED], rel=0.1, abs=0.5)


# ---- certificates, budgets, filters ----------------------------------------------------------------------------------


def brute(
    of_item: OfItem,
    prompt: list[int],
    items: Sequence[int],
    k: int,
    per_token: bool = False,
    stock: Sequence[int] = EVERYTHING,
) -> set[int]:
    """The `k` best of some items, and those that tie with the last."""
    scores = {i: of_item(prompt, i, stock) / (len(ENDED[i]) if per_token else 1) for i in items}
    last = sorted(scores.values(), reverse=True)[: min(k, len(items))][-1]
    return {item for item, score in scores.items() if score >= last - 1e-6}


def test_what_was_left_unread_is_bounded(model: Any, of_item: OfItem) -> None:
    for width in (1, 2, 3):
        for prompt, found in zip(PROMPTS, search(model, PROMPTS, k=2, width=width, exact=False), strict=True):
            missed = [of_item(prompt, item) for item in EVERYTHING if item not in found.items]
            assert found.kth == (found.scores[1] if len(found.items) > 1 else -np.inf)
            assert max(missed) <= max(found.bound, found.kth) + 1e-4
            assert found.gap == (0 if found.exact else found.bound - found.kth)
            if found.exact:
                assert set(found.items.tolist()) == brute(of_item, prompt, EVERYTHING, 2)


def test_the_exact_search_reads_little_more_than_it_must(model: Any, teacher_forced: Score) -> None:
    for prompt, found in zip(PROMPTS, search(model, PROMPTS, k=1, width=1), strict=True):
        prefixes = {tuple(title[:length]) for title in ENDED for length in range(1, len(title))}
        needed = 0
        for prefix in prefixes:
            needed += teacher_forced(prompt, list(prefix)) >= found.kth
        assert needed <= found.expanded <= needed + max(map(len, ENDED))  # the beam that comes first may err


def test_a_budget_gives_the_best_so_far_and_the_gap(model: Any) -> None:
    whole = search(model, PROMPTS, k=3, width=1)
    for budget in (0, 1, 3, 100):
        for found, best in zip(search(model, PROMPTS, k=3, width=1, max_nodes=budget), whole, strict=True):
            assert found.expanded <= budget
            if found.exact:
                assert found.items.tolist() == best.items.tolist()
            else:
                assert found.gap > 0 and best.scores[2] <= max(found.bound, found.kth) + 1e-4
    beam = search(model, PROMPTS, k=3, width=4, exact=False)
    for limit in ({"seconds": 0.0}, {"stop": lambda: True}):
        stopped = search(model, PROMPTS, k=3, width=4, **limit)
        assert [found.items.tolist() for found in stopped] == [found.items.tolist() for found in beam]


def passes_of(tree: PromptTree) -> list[list[int]]:
    """The tokens of each pass that the tree is asked for from now on."""
    extend, passes = tree.extend, []

    def noted(tokens: torch.Tensor, users: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        passes.append(tokens.tolist())
        return extend(tokens, users, parents)

    tree.extend = noted  # type: ignore[method-assign]
    return passes


def test_what_one_sequence_alone_goes_on_from_is_read_to_its_end_at_once(model: Any, of_item: OfItem) -> None:
    tree = PromptTree(model, [np.array(PROMPTS[0])])
    passes = passes_of(tree)
    (found,) = search_trie(tree, TRIE, k=9, width=9)
    # After 30 and 31 nothing branches; behind "9 8 7 6" there is an end, or "5 4 3".
    assert passes == [[5, 9, 30, 31, 5], [6, 8], [7, 2, 7], [6], [5, 4, 3]]
    assert found.expanded == sum(map(len, passes)) == len({tuple(t[:n]) for t in TITLES for n in range(1, len(t) + 1)})
    assert found.scores.tolist() == pytest.approx([of_item(PROMPTS[0], item) for item in found.items], abs=1e-4)


def test_what_is_certain_is_not_read(model: Any) -> None:
    tree = PromptTree(model, [np.array(PROMPTS[0])])
    passes = passes_of(tree)
    (found,) = search_trie(tree, TRIE, k=9, width=9, normaliser=OverCatalogue(TRIE))
    assert passes == [[5, 9], [6, 8], [7], [6]]
    (scores,) = score_candidates(tree, TRIE, [found.items], OverCatalogue(TRIE))
    assert passes[4:] == [[5, 9, 6, 8, 7, 6]]
    assert found.scores.tolist() == pytest.approx((scores + TRIE.log_share(found.items)).tolist(), abs=1e-5)


def test_an_only_item_is_certain(model: Any) -> None:
    trie = Trie.build(Ragged.of([[9, 8, EOS]]))
    tree = PromptTree(model, [np.array(PROMPTS[0])])
    (found,) = search_trie(tree, trie, k=1, width=1, normaliser=OverCatalogue(trie))
    assert found.items.tolist() == [0] and found.scores.tolist() == [0] and found.expanded == 0
    (scores,) = score_candidates(tree, trie, [np.array([0])], OverCatalogue(trie))
    assert scores.tolist() == [0]


def test_passes_of_a_proof_grow(model: Any) -> None:
    """Sixty titles of their own first tokens, K = 8: a beam of eight, then eight, twelve, 18 and what is left."""
    trie = Trie.build(Ragged.of([[token, EOS] for token in range(2, 62)]))
    tree = PromptTree(model, [np.array(PROMPTS[0])])
    passes = passes_of(tree)
    search_trie(tree, trie, k=60, width=8)
    assert list(map(len, passes)) == [8, 8, 12, 18, 14]


def test_a_budget_counts_what_is_read_to_its_end(model: Any) -> None:
    trie = Trie.build(Ragged.of([[9, 8, 7, 6, EOS]]))
    for budget, read in ((3, 0), (4, 4)):
        (found,) = search_trie(PromptTree(model, [np.array(PROMPTS[0])]), trie, k=1, width=1, max_nodes=budget)
        assert found.expanded == read and found.exact == (read > 0)


def test_the_place_of_one_item_is_found_with_less_reading(model: Any, of_item: OfItem) -> None:
    whole = search(model, PROMPTS, k=2, width=3)
    for item in EVERYTHING:
        asked = [of_item(prompt, item) for prompt in PROMPTS]
        for full, found in zip(whole, search(model, PROMPTS, k=2, width=3, place_of=asked), strict=True):
            assert (item in found.items) == (item in full.items)
            if item in full.items:
                least = full.scores[full.items == item] - 1e-4
                assert found.items[found.scores >= least].tolist() == full.items[full.scores >= least].tolist()
            assert found.expanded <= full.expanded


def test_only_allowed_items_are_found(model: Any, of_item: OfItem) -> None:
    allowed = [np.array([0, 3, 7]), None, np.array([], dtype=np.int64)]
    one, everything, nothing = search(model, PROMPTS, [[3], [], [1]], k=2, allowed=allowed)
    assert set(one.items.tolist()) == {0, 7}
    assert set(everything.items.tolist()) == brute(of_item, PROMPTS[1], EVERYTHING, 2)
    assert nothing.items.tolist() == [] and nothing.exact


def test_mean_scores_are_searched_exactly(model: Any, of_item: OfItem) -> None:
    for k in (1, 3, 5):
        for prompt, found in zip(PROMPTS, search(model, PROMPTS, k=k, width=1, per_token=True), strict=True):
            assert found.exact
            assert set(found.items.tolist()) == brute(of_item, prompt, EVERYTHING, k, per_token=True)
            expected = [of_item(prompt, item) / len(ENDED[item]) for item in found.items]
            assert found.scores.tolist() == pytest.approx(expected, abs=1e-4)


def test_only_items_in_stock_are_found(model: Any, of_item: OfItem) -> None:
    trie = Trie.build(Ragged.of(ENDED))
    tree = PromptTree(model, [np.array(PROMPTS[0])])
    for gone in ([], [5], [1], [1, 5], [0, 3, 5]):
        stock = [item for item in EVERYTHING if item not in gone]
        for k in (1, 3, 8):
            tree.forget()
            (found,) = search_trie(tree, trie.with_stock(~np.isin(EVERYTHING, gone)), k=k, width=2)
            assert found.exact and set(found.items.tolist()) == brute(of_item, PROMPTS[0], stock, k, stock=stock)
            expected = [of_item(PROMPTS[0], item, stock) for item in found.items]
            assert found.scores.tolist() == pytest.approx(expected, abs=1e-4)


def test_items_of_a_title_share_its_probability(model: Any, teacher_forced: Score) -> None:
    """Below every leaf the probabilities of the items in stock add up to that of the title."""
    titles = Ragged.of(ENDED + ENDED[1:2] + ENDED[3:4])  # "5 6" three times, item 3 twice
    items = np.arange(len(titles))
    trie = Trie.build(titles).with_stock(items != 5)
    (scores,) = score_candidates(PromptTree(model, [np.array(PROMPTS[0])]), trie, [items])
    scores = scores + trie.log_share(items)
    sums: dict[int, float] = {}
    for item in np.flatnonzero(trie.in_stock):
        sums[trie.leaf[item]] = sums.get(trie.leaf[item], 0) + np.exp(scores[item])
    expected = {trie.leaf[item]: np.exp(teacher_forced(PROMPTS[0], ENDED[item])) for item in EVERYTHING}
    assert sums == pytest.approx(expected, rel=1e-4)
    assert scores[5] == pytest.approx(
        teacher_forced(PROMPTS[0], ENDED[5]) - math.log(3), abs=1e-4
    )  # as if it were back


def test_a_large_family_does_not_fill_the_list(model: Any, teacher_forced: Score) -> None:
    """Fifty items have the likeliest title. Each has a fiftieth of its probability, which others exceed."""
    best = max(range(len(ENDED)), key=lambda item: teacher_forced(PROMPTS[0], ENDED[item]))
    singles = [title for item, title in enumerate(ENDED) if item not in (best, 5)]
    trie = Trie.build(Ragged.of([ENDED[best]] * 50 + singles))
    scores = {50 + number: teacher_forced(PROMPTS[0], title) for number, title in enumerate(singles)}
    member = teacher_forced(PROMPTS[0], ENDED[best]) - math.log(50)
    ahead = {item for item, score in scores.items() if score > member}
    assert ahead, "this model is so sure of one title that nothing is tested"
    for how in ({"width": 1}, {"width": 1000, "exact": False}):
        (found,) = search_trie(PromptTree(model, [np.array(PROMPTS[0])]), trie, k=len(ahead), **how)  # type: ignore[arg-type]
        assert found.exact and set(found.items.tolist()) == ahead


@pytest.mark.parametrize("width", [1, 2, 4])
def test_titles_that_are_impossible_come_last(model: Any, of_item: OfItem, width: int) -> None:
    """As where an engine masks tokens: their prefixes are told from what fills up a batch of users."""
    tree = PromptTree(model, [np.array(prompt) for prompt in PROMPTS])
    log_probs = tree.log_probs

    def masked(hidden: Any, row: Any, token: Any) -> Any:
        return log_probs(hidden, row, token).masked_fill(token == 9, -torch.inf)

    tree.log_probs = masked  # type: ignore[method-assign]
    possible, impossible = {0, 1, 2, 5, 6, 7}, {3, 4, 8}
    allowed = [None, np.array([0, 3]), np.array([8])]
    found = search_trie(tree, Trie.build(Ragged.of(ENDED)), k=9, width=width, allowed=allowed, max_nodes=100)
    for result, mine in zip(found, (possible | impossible, {0, 3}, {8}), strict=True):
        assert result.exact and set(result.items.tolist()) == mine
        assert set(result.items[np.isinf(result.scores)].tolist()) == mine & impossible


def test_all_items_at_once(model: Any, teacher_forced: Score, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cprec.search.scoring.SEQUENCES", 7)  # several blocks
    tree = PromptTree(model, [np.array(prompt) for prompt in PROMPTS])
    for prompt, mine in zip(PROMPTS, score_candidates(tree, TRIE, [ALL] * len(PROMPTS)), strict=True):
        assert mine.tolist() == pytest.approx([teacher_forced(prompt, title) for title in ENDED], abs=1e-4)


def test_nothing_to_search_for_is_refused(model: Any) -> None:
    with pytest.raises(ConfigError, match="k=0 and width=3 must be at least 1"):
        search(model, PROMPTS, k=0)


# ---- priors ----------------------------------------------------------------------------------------------------------


def test_priors_join_the_score_and_tell_items_of_one_title_apart(model: Any, of_item: OfItem) -> None:
    values = np.zeros((3, len(TITLES)))
    values[0, 5], values[1, 3], values[2, :] = 30, 30, np.arange(9)
    found = search(model, PROMPTS, k=2, width=1, priors=Priors(values, 0.5))
    assert found[0].items[0] == 5 and found[1].items[0] == 3
    for prompt, mine, prior in zip(PROMPTS, found, values, strict=True):
        scores = [0.5 * of_item(prompt, item) + prior[item] for item in EVERYTHING]
        assert mine.exact and mine.scores[:2].tolist() == pytest.approx(sorted(scores)[:-3:-1], abs=1e-4)


def test_equal_priors_of_all_change_no_list(model: Any) -> None:
    for plain, shifted in zip(
        search(model, PROMPTS, k=3), search(model, PROMPTS, k=3, priors=Priors(np.full((3, 9), -7.0))), strict=True
    ):
        assert plain.items.tolist() == shifted.items.tolist()
        assert shifted.scores.tolist() == pytest.approx((plain.scores - 7).tolist())


def test_an_item_that_a_user_may_not_be_given_raises_no_bound(model: Any) -> None:
    """The excluded item has by far the greatest prior: no prefix is read for its sake."""
    values = np.zeros((3, len(TITLES)))
    values[:, 3] = 100
    (lured, *_) = search(model, PROMPTS, k=1, width=1, priors=Priors(values))
    assert lured.items.tolist() == [3]
    gone = [[3]] * 3
    for plain, mine in zip(
        search(model, PROMPTS, gone, k=1, width=1),
        search(model, PROMPTS, gone, k=1, width=1, priors=Priors(values)),
        strict=True,
    ):
        assert plain.items.tolist() == mine.items.tolist() and plain.expanded == mine.expanded


def test_impossible_titles_are_ranked_by_priors_alone_where_the_model_has_no_weight(model: Any) -> None:
    tree = PromptTree(model, [np.array(PROMPTS[0])])
    tree.log_probs = lambda hidden, row, token: torch.full(row.shape, -torch.inf).double()  # type: ignore[method-assign]
    values = np.arange(9.0)[None]
    (found,) = search_trie(tree, Trie.build(Ragged.of(ENDED)), k=2, width=1, priors=Priors(values, 0.0))
    assert found.exact and found.items.tolist() == [8, 7] and found.scores.tolist() == [8, 7]


@pytest.mark.parametrize(
    ("values", "weight", "message"),
    [
        ([[0.0, math.nan]], 1.0, "the prior of item 1 for query 0 is nan: priors must be finite"),
        ([[0.0], [-math.inf]], 1.0, "the prior of item 0 for query 1 is -inf"),
        ([0.0], 1.0, r"priors of shape \(1,\) and type float64: give float64 values, a row for each query"),
        ([[1]], 1.0, "type int64"),
        ([[1.0]], -0.5, "weight -0.5 of the model among priors must be a number"),
        ([[1.0]], math.nan, "weight nan"),
    ],
)
def test_priors_that_are_no_numbers_are_refused(values: Any, weight: float, message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        Priors(np.array(values), weight)


def test_priors_of_another_catalogue_are_refused(model: Any) -> None:
    with pytest.raises(DataError, match="priors of 3 queries and 8 items were given for 3 queries and 9 items"):
        search(model, PROMPTS, priors=Priors(np.zeros((3, 8))))


# ---- the tree, the cache, free writing -------------------------------------------------------------------------------


def test_a_known_beginning_is_not_read_again(model: Any, teacher_forced: Score) -> None:
    cache = PrefixCache(1 << 20)
    long = list(range(2, 42))
    PromptTree(model, [np.array(long), np.array(PROMPTS[1])], cache=cache)
    prompts = [[*long, 50, 51], [60, 61], long, [*long[:20], 70]]
    tree = PromptTree(model, [np.array(prompt) for prompt in prompts], cache=cache)
    assert tree.num_read == 2 + 2 + 1 + 1  # the last token always is
    assert cache.hits == 40 + 39 + 20
    for prompt, scores in zip(prompts, score_candidates(tree, TRIE, [ALL] * 4), strict=True):
        assert scores.tolist() == pytest.approx([teacher_forced(prompt, title) for title in ENDED], abs=1e-4)


@pytest.mark.parametrize("other", [[7, 3, 9], [*range(40, 67)]])
def test_continuations_of_known_and_new_prompts_in_one_batch(model: Any, teacher_forced: Any, other: list[int]) -> None:
    """The known beginning (16) and the longest new end (27) are longer together than any prompt."""
    known = list(range(2, 29))
    cache = PrefixCache(1 << 20)
    PromptTree(model, [np.array(known)], cache=cache)
    prompts = [known, other, list(range(70, 97))]
    tree = PromptTree(model, [np.array(prompt) for prompt in prompts], cache=cache)
    title = [11, 12, EOS]
    scores = score_candidates(tree, Trie.build(Ragged.of([title])), [np.array([0])] * 3)
    expected = [teacher_forced(prompt, title) for prompt in prompts]
    assert np.concatenate(scores).tolist() == pytest.approx(expected, abs=1e-4)


def test_the_cache_keeps_within_its_bytes(model: Any) -> None:
    one = PrefixCache(1 << 20)
    PromptTree(model, [np.arange(2, 30)], cache=one)
    small = PrefixCache(int(2.5 * one.num_bytes))
    for start in range(2, 8):
        PromptTree(model, [np.arange(start, start + 28)], cache=small)
        assert small.num_bytes <= small.max_bytes
    assert len(small) == 2
    assert small.find(np.arange(7, 36))[0] == 28 and small.find(np.arange(2, 30))[0] == 0
    PromptTree(model, [np.arange(2, 200)], cache=small)
    assert len(small) == 2  # larger than all of it


def test_free_writing_is_greedy(model: Any) -> None:
    tree = PromptTree(model, [np.array(prompt) for prompt in PROMPTS])
    for prompt, tokens in zip(PROMPTS, write(tree, EOS, 6), strict=True):
        ids = [*prompt]
        for _ in range(6):
            best = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            if best == EOS:
                break
            ids.append(best)
        assert tokens.tolist() == ids[len(prompt) :]


def test_what_was_written_is_matched_to_one_candidate() -> None:
    titles = ["Dune", "Dune Messiah", "Emma", "Emma"]
    assert match(" dune messiah", titles) == 1
    assert match("Dune ", titles) == 0
    assert match("I would take Dune next", titles) == 0
    assert match("Dune Messiah and then", titles) is None  # two titles occur
    assert match("Emma", titles) is None  # two candidates have it
    assert match("Ulysses", titles) is None


def test_logits_that_a_model_scales_are_scaled_here() -> None:
    from transformers import GraniteConfig, GraniteForCausalLM

    torch.manual_seed(0)
    granite = GraniteForCausalLM(
        GraniteConfig(
            vocab_size=100, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, logits_scaling=6.0, pad_token_id=0, eos_token_id=1, bos_token_id=2,
        )
    ).eval()  # fmt: skip
    granite.get_output_embeddings().weight.mul_(40)
    expected = granite(input_ids=torch.tensor([[*PROMPTS[0], *ENDED[8]]])).logits[0].log_softmax(-1)
    expected = sum(float(expected[2 + place, token]) for place, token in enumerate(ENDED[8]))
    (scores,) = score_candidates(PromptTree(granite, [np.array(PROMPTS[0])]), TRIE, [np.array([8])])
    assert scores.tolist() == pytest.approx([expected], abs=1e-4)
