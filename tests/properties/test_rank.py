from __future__ import annotations

import math
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cprec.data.ragged import Ragged, offsets_of
from cprec.models import tiny_model
from cprec.search.attention import PromptTree
from cprec.search.decoding import search
from cprec.search.priors import Priors
from cprec.search.scoring import score_candidates
from cprec.search.trie import Trie

EOS = 1
# few tokens, so that titles repeat and begin alike
titles = st.lists(st.lists(st.integers(2, 4), min_size=1, max_size=4), min_size=1, max_size=12)


def trie_of(names: list[list[int]]) -> Trie:
    return Trie.build(Ragged.of([[*name, EOS] for name in names]))


def prefixes_of(trie: Trie) -> list[tuple[int, ...]]:
    """The tokens that lead to each node."""
    prefixes: list[tuple[int, ...]] = [()]
    for node in range(1, trie.num_nodes):
        prefixes.append((*prefixes[int(trie.parent(np.array([node]))[0])], int(trie.token[node])))
    return prefixes


@given(titles)
def test_the_trie_is_that_of_nested_dicts(names: list[list[int]]) -> None:
    reference: dict[int, Any] = {}
    for name in names:
        level = reference
        for token in [*name, EOS]:
            level = level.setdefault(token, {})

    trie = trie_of(names)

    prefixes = prefixes_of(trie)
    ended = [[*name, EOS] for name in names]
    items_below = {prefix: sum(tuple(name[: len(prefix)]) == prefix for name in ended) for prefix in prefixes}

    def check(node: int, level: dict[int, Any]) -> None:
        children = np.arange(trie.first_child[node], trie.first_child[node + 1])
        assert trie.token[children].tolist() == sorted(level)
        assert (trie.parent(children) == node).all()
        here = items_below[prefixes[node]]
        assert trie.num_items[node] == here
        below = [name for name in set(map(tuple, ended)) if name[: len(prefixes[node])] == prefixes[node]]
        assert trie.num_sharing[node] == min(ended.count([*name]) for name in below)
        for child in children if level else ():
            check(int(child), level[int(trie.token[child])])

    check(0, reference)
    assert len(set(prefixes)) == trie.num_nodes == len(trie.first_child) - 1
    for item, name in enumerate(names):
        assert prefixes[trie.leaf[item]] == (*name, EOS)
    assert trie.by_sequence.tolist() == sorted(range(len(names)), key=lambda item: [*names[item], EOS])
    depths = [len(prefix) for prefix in prefixes]
    assert depths == sorted(depths)


@given(titles, st.data())
def test_items_out_of_stock_are_not_counted(names: list[list[int]], data: st.DataObject) -> None:
    stock = data.draw(st.lists(st.booleans(), min_size=len(names), max_size=len(names)))
    trie = trie_of(names).with_stock(np.array(stock))
    for item, name in enumerate(names):
        same = [other for other, text in enumerate(names) if text == name]
        sharing = sum(stock[other] for other in same)
        assert trie.num_items[trie.leaf[item]] == sharing
        assert trie.num_sharing[trie.leaf[item]] == (sharing or np.iinfo(np.int32).max)
        assert np.isclose(trie.log_share(np.array([item]))[0], -np.log(sharing + (not stock[item])))
    assert trie.num_items[0] == sum(stock)
    for node, prefix in enumerate(prefixes_of(trie)):
        here = trie.by_sequence[trie.first_item[node] :][: trie.num_items[node]]
        below = [item for item, name in enumerate(names) if (*name, EOS)[: len(prefix)] == prefix and stock[item]]
        assert sorted(here.tolist()) == below


@cache
def model() -> Any:
    net = tiny_model(6, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim == 2:
                parameter *= 12  # far from uniform, so that wrong attention shows
    return net.eval()


@cache
def log_probability(prompt: tuple[int, ...], name: tuple[int, ...]) -> float:
    ids = torch.tensor([[*prompt, *name, EOS]])
    with torch.no_grad():
        logp = model()(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    return float(sum(logp[place - 1, ids[0, place]].double() for place in range(len(prompt), ids.shape[1])))


def teacher_forced(prompt: list[int], name: list[int]) -> float:
    """The title's log-probability by one forward pass over everything, without a cache of keys and values."""
    return log_probability(tuple(prompt), tuple(name))


def of_item(prompt: list[int], names: list[list[int]], item: int) -> float:
    """The item's log-probability: that of its title, shared by all that have it."""
    return teacher_forced(prompt, names[item]) - math.log(names.count(names[item]))


def expected_ranking(prompt: list[int], names: list[list[int]], excluded: set[int], k: int) -> list[set[int]]:
    """Items by falling score, those of equal titles together, until there are `k`."""
    groups: dict[tuple[int, ...], set[int]] = {}
    for item, name in enumerate(names):
        if item not in excluded:
            groups.setdefault(tuple(name), set()).add(item)
    ranked = sorted(groups, key=lambda name: -of_item(prompt, names, names.index([*name])))
    out: list[set[int]] = []
    for name in ranked:
        if sum(map(len, out)) >= k:
            break
        out.append(groups[name])
    return out


@settings(max_examples=30)
@given(
    titles,
    st.lists(st.lists(st.integers(2, 5), min_size=1, max_size=6), min_size=1, max_size=3),
    st.integers(1, 6),
    st.sampled_from([(1, True), (3, True), (1000, False)]),
    st.data(),
)
def test_exact_search_and_a_beam_of_full_width_find_what_teacher_forcing_finds(
    names: list[list[int]], prompts: list[list[int]], k: int, how: tuple[int, bool], data: st.DataObject
) -> None:
    width, exact = how
    one = st.sets(st.integers(0, len(names) - 1))
    excluded = data.draw(st.lists(one, min_size=len(prompts), max_size=len(prompts)))
    with torch.inference_mode():
        tree = PromptTree(model(), [np.array(prompt) for prompt in prompts])
        positions = [np.array(sorted(mine), dtype=np.int64) for mine in excluded]
        found = search(tree, trie_of(names), k=k, width=width, exact=exact, excluded=positions)
        for prompt, mine, result in zip(prompts, excluded, found, strict=True):
            expected = expected_ranking(prompt, names, mine, k)
            got = result.items.tolist()
            at = 0
            assert result.exact and result.gap == 0
            for group in expected:  # equal titles may come in any order
                assert set(got[at : at + len(group)]) == group
                at += len(group)
            assert at == len(got)
            assert result.scores.tolist() == sorted(result.scores.tolist(), reverse=True)
            for item, score in zip(got, result.scores, strict=True):
                assert abs(score - of_item(prompt, names, item)) < 1e-3


@settings(max_examples=25)
@given(titles, st.lists(st.integers(2, 5), min_size=1, max_size=6), st.integers(1, 4), st.integers(1, 4), st.data())
def test_a_narrow_search_returns_k_items_without_repeats(
    names: list[list[int]], prompt: list[int], k: int, more: int, data: st.DataObject
) -> None:
    excluded = data.draw(st.sets(st.integers(0, len(names) - 1)))
    with torch.inference_mode():
        tree = PromptTree(model(), [np.array(prompt)])
        mine = np.array(sorted(excluded), dtype=np.int64)
        (found,) = search(tree, trie_of(names), k=k, width=k + more - 1, exact=False, excluded=[mine])
        items = found.items.tolist()
        assert len(items) == len(set(items)) >= min(k, len(names) - len(excluded))
        assert not excluded & set(items)
        missed = [item for item in range(len(names)) if item not in excluded and item not in items]
        for item in missed:  # the bound holds for each of them
            assert of_item(prompt, names, item) <= max(found.bound, found.kth) + 1e-3
        for item, score in zip(items, found.scores, strict=True):
            assert abs(score - of_item(prompt, names, item)) < 1e-3


@settings(max_examples=25)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(2, 5), min_size=1, max_size=6), st.one_of(st.just([]), titles)),
        min_size=1,
        max_size=3,
    )
)
def test_candidates_score_as_by_teacher_forcing(queries: list[tuple[list[int], list[list[int]]]]) -> None:
    with torch.inference_mode():
        tree = PromptTree(model(), [np.array(prompt) for prompt, _ in queries])
        offsets = offsets_of(np.array([len(names) for _, names in queries]))
        every = [name for _, names in queries for name in names]
        asked = [np.arange(start, stop) for start, stop in pairwise(offsets)]
        scores = score_candidates(tree, trie_of(every or [[2]]), asked)
        for (prompt, names), mine in zip(queries, scores, strict=True):
            expected = [teacher_forced(prompt, name) for name in names]
            assert np.allclose(mine, expected, atol=1e-3) and len(mine) == len(names)


@settings(max_examples=30)
@given(
    titles,
    st.integers(1, 3),
    st.integers(1, 6),
    st.sampled_from([0.0, 0.3, 1.0, 20.0]),
    st.booleans(),
    st.sampled_from([{}, {"max_nodes": 2}, {"exact": False}]),
    st.data(),
)
def test_a_search_with_priors_finds_the_best_of_all_sums(
    names: list[list[int]],
    users: int,
    k: int,
    weight: float,
    per_token: bool,
    budget: dict[str, Any],
    data: st.DataObject,
) -> None:
    """Priors that repeat, so that items tie, or turn the model's order round; filters, stock and shared titles."""
    subset = st.sets(st.integers(0, len(names) - 1)).map(lambda mine: np.array(sorted(mine), dtype=np.int64))
    filters = [data.draw(st.lists(each, min_size=users, max_size=users)) for each in (subset, st.none() | subset)]
    stock = ~np.isin(np.arange(len(names)), data.draw(subset))
    one = st.lists(st.sampled_from([-30.0, -1.0, 0.0, 0.25, 30.0]), min_size=len(names), max_size=len(names))
    values = np.array(data.draw(st.lists(one, min_size=users, max_size=users)))
    trie = trie_of(names).with_stock(stock)
    with torch.inference_mode():
        tree = PromptTree(model(), [np.array([2, 3 + user, 4]) for user in range(users)])
        log_probs = score_candidates(tree, trie, [np.arange(len(names))] * users)
        found = search(
            tree,
            trie,
            k=k,
            width=2,
            excluded=filters[0],
            allowed=filters[1],
            per_token=per_token,
            priors=Priors(values, weight),
            **budget,
        )
    tokens = np.array([len(name) + 1 for name in names]) if per_token else 1
    for user, result in enumerate(found):
        scores = weight * (log_probs[user] + trie.log_share(np.arange(len(names)))) / tokens + values[user]
        may = stock & ~np.isin(np.arange(len(names)), filters[0][user])
        if filters[1][user] is not None:
            may &= np.isin(np.arange(len(names)), filters[1][user])
        assert may[result.items].all() and len(set(result.items)) == len(result.items)
        assert np.allclose(result.scores, scores[result.items], rtol=0, atol=1e-5 * max(weight, 1))
        assert (np.diff(result.scores) <= 0).all()
        assert result.kth == (result.scores[k - 1] if len(result.items) >= k else -np.inf)
        missed = may & ~np.isin(np.arange(len(names)), result.items)
        assert (scores[missed] <= max(result.bound, result.kth) + 1e-5 * max(weight, 1)).all()
        assert result.exact or budget
        if result.exact:
            assert len(result.items) >= min(k, may.sum())
            for item in np.flatnonzero(missed):  # none that ties with the last one was left out
                twins = [other for other in result.items if names[other] == names[item]]
                assert not any(values[user, other] == values[user, item] for other in twins)
