from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cprec.data.ragged import Ragged
from cprec.models import tiny_model
from cprec.rank.attention import PromptTree
from cprec.rank.decoding import beam_search
from cprec.rank.scoring import score_candidates
from cprec.rank.trie import Trie

EOS = 1
# few tokens, so that titles repeat and begin alike
titles = st.lists(st.lists(st.integers(2, 4), min_size=1, max_size=4), min_size=1, max_size=12)


def trie_of(names: list[list[int]]) -> Trie:
    return Trie.build(Ragged.of([[*name, EOS] for name in names]))


def prefixes_of(trie: Trie) -> list[tuple[int, ...]]:
    """The tokens that lead to each node."""
    prefixes: list[tuple[int, ...]] = [()]
    for node in range(1, trie.num_nodes):
        prefixes.append((*prefixes[trie.parent[node]], int(trie.token[node])))
    return prefixes


@given(titles)
def test_the_trie_is_that_of_nested_dicts(names: list[list[int]]) -> None:
    reference: dict[int, Any] = {}
    for name in names:
        level = reference
        for token in [*name, EOS]:
            level = level.setdefault(token, {})

    trie = trie_of(names)

    def check(node: int, level: dict[int, Any]) -> int:
        children = np.arange(trie.first_child[node], trie.first_child[node + 1])
        assert trie.token[children].tolist() == sorted(level)
        assert (trie.parent[children] == node).all()
        leaves = sum(check(int(child), level[int(trie.token[child])]) for child in children) if level else 1
        assert trie.num_leaves[node] == leaves
        return leaves

    check(0, reference)
    prefixes = prefixes_of(trie)
    assert len(set(prefixes)) == trie.num_nodes == len(trie.items) == len(trie.first_child) - 1
    for item, name in enumerate(names):
        assert prefixes[trie.leaf[item]] == (*name, EOS)
        assert item in trie.items[trie.leaf[item]]
    assert sorted(trie.items.values.tolist()) == list(range(len(names)))
    depths = [len(prefix) for prefix in prefixes]
    assert depths == sorted(depths)


@given(titles, st.data())
def test_dead_nodes_lead_to_excluded_items_only(names: list[list[int]], data: st.DataObject) -> None:
    trie = trie_of(names)
    excluded = data.draw(st.lists(st.integers(0, len(names) - 1), max_size=15))
    prefixes = prefixes_of(trie)
    dead = [
        node
        for node, prefix in enumerate(prefixes)
        if all(item in excluded for item, name in enumerate(names) if (*name, EOS)[: len(prefix)] == prefix)
    ]
    assert trie.dead_nodes(np.array(excluded, dtype=np.int64)).tolist() == dead


@cache
def model() -> Any:
    net = tiny_model(6, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim == 2:
                parameter *= 12  # far from uniform, so that wrong attention shows
    return net.eval()


def teacher_forced(prompt: list[int], name: list[int]) -> float:
    """The title's log-probability by one forward pass over everything, without a cache."""
    ids = torch.tensor([[*prompt, *name, EOS]])
    logp = model()(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    return float(sum(logp[place - 1, ids[0, place]].double() for place in range(len(prompt), ids.shape[1])))


def expected_ranking(prompt: list[int], names: list[list[int]], excluded: set[int], k: int) -> list[set[int]]:
    """Items by falling score, those of equal titles together, until there are `k`."""
    groups: dict[tuple[int, ...], set[int]] = {}
    for item, name in enumerate(names):
        if item not in excluded:
            groups.setdefault(tuple(name), set()).add(item)
    ranked = sorted(groups, key=lambda name: -teacher_forced(prompt, list(name)))
    out: list[set[int]] = []
    for name in ranked:
        if sum(map(len, out)) >= k:
            break
        out.append(groups[name])
    return out


@settings(max_examples=25)
@given(
    titles,
    st.lists(st.lists(st.integers(2, 5), min_size=1, max_size=6), min_size=1, max_size=3),
    st.integers(1, 6),
    st.data(),
)
def test_full_width_search_is_exact(
    names: list[list[int]], prompts: list[list[int]], k: int, data: st.DataObject
) -> None:
    one = st.sets(st.integers(0, len(names) - 1))
    excluded = data.draw(st.lists(one, min_size=len(prompts), max_size=len(prompts)))
    with torch.inference_mode():
        tree = PromptTree(model(), [np.array(prompt) for prompt in prompts])
        positions = [np.array(sorted(mine), dtype=np.int64) for mine in excluded]
        found = beam_search(tree, trie_of(names), k=k, width=1000, excluded=positions)
        for prompt, mine, result in zip(prompts, excluded, found, strict=True):
            expected = expected_ranking(prompt, names, mine, k)
            got = result.items.tolist()
            at = 0
            for group in expected:  # equal titles may come in any order
                assert set(got[at : at + len(group)]) == group
                at += len(group)
            assert at == len(got)
            assert result.scores.tolist() == sorted(result.scores.tolist(), reverse=True)
            for item, score in zip(got, result.scores, strict=True):
                assert abs(score - teacher_forced(prompt, names[item])) < 1e-3


@settings(max_examples=25)
@given(titles, st.lists(st.integers(2, 5), min_size=1, max_size=6), st.integers(1, 4), st.integers(1, 4), st.data())
def test_a_narrow_search_returns_k_items_without_repeats(
    names: list[list[int]], prompt: list[int], k: int, more: int, data: st.DataObject
) -> None:
    excluded = data.draw(st.sets(st.integers(0, len(names) - 1)))
    with torch.inference_mode():
        tree = PromptTree(model(), [np.array(prompt)])
        mine = np.array(sorted(excluded), dtype=np.int64)
        (found,) = beam_search(tree, trie_of(names), k=k, width=k + more - 1, excluded=[mine])
        items = found.items.tolist()
        assert len(items) == len(set(items)) >= min(k, len(names) - len(excluded))
        assert not excluded & set(items)
        for item, score in zip(items, found.scores, strict=True):
            assert abs(score - teacher_forced(prompt, names[item])) < 1e-3


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
        scores = score_candidates(tree, [Ragged.of([[*name, EOS] for name in names]) for _, names in queries])
        for (prompt, names), mine in zip(queries, scores, strict=True):
            expected = [teacher_forced(prompt, name) for name in names]
            assert np.allclose(mine, expected, atol=1e-3) and len(mine) == len(names)
