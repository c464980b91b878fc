"""Probabilities that sum to one over the catalogue: brute force is one forward pass a title, and a softmax over the
tokens with which titles in stock go on."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from cprec.data.ragged import Ragged
from cprec.errors import ModelError
from cprec.search.attention import PromptTree
from cprec.search.decoding import search
from cprec.search.normaliser import Over, OverCatalogue, normaliser_of
from cprec.search.scoring import score_candidates
from cprec.search.trie import Trie

EOS = 1
PROMPTS = [[40, 41, 42], [50]]
TITLES = [[5, 6, 7], [5, 6], [5], [9, 8, 7, 6, 5, 4, 3], [9, 8, 7, 6], [5, 6], [30], [31, 5], [9, 8, 2]]
ENDED = [[*title, EOS] for title in TITLES]
TRIE = Trie.build(Ragged.of(ENDED))
ALL = np.arange(len(TITLES))
STOCKS = [set(range(9)), {0, 1, 2, 3}, {3}, {1, 5, 8}, set(range(1, 9))]


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.inference_mode():
        yield


@functools.cache
def logits_after(model: Any, prompt: tuple[int, ...], title: tuple[int, ...]) -> torch.Tensor:
    """Of one forward pass: what may stand at each place of a title."""
    logits: torch.Tensor = model(input_ids=torch.tensor([[*prompt, *title]])).logits[0, len(prompt) - 1 :].double()
    return logits


def brute(model: Any, prompt: list[int], item: int, stock: set[int]) -> float:
    """log P(item) over those in stock, and itself."""
    title, total = ENDED[item], 0.0
    logits = logits_after(model, tuple(prompt), tuple(title))
    for place, token in enumerate(title):
        children = {ENDED[other][place] for other in stock | {item} if ENDED[other][:place] == title[:place]}
        total += float(logits[place, token] - logits[place, sorted(children)].logsumexp(0))
    return total - math.log(sum(ENDED[other] == title for other in stock | {item}))


def with_stock(stock: set[int]) -> Trie:
    return TRIE.with_stock(np.isin(ALL, list(stock)))


def trees(model: Any) -> PromptTree:
    return PromptTree(model, [np.array(prompt) for prompt in PROMPTS])


@pytest.mark.parametrize("stock", STOCKS)
def test_all_items_in_stock_sum_to_one(model: Any, stock: set[int]) -> None:
    trie = with_stock(stock)
    for found in search(trees(model), trie, k=9, width=3, normaliser=OverCatalogue(trie)):
        assert set(found.items.tolist()) == stock
        assert np.exp(found.scores).sum() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("stock", STOCKS)
def test_scores_are_those_of_brute_force(model: Any, stock: set[int]) -> None:
    """Candidates out of stock count themselves, each alone."""
    trie = with_stock(stock)
    expected = [[brute(model, prompt, item, stock) for item in ALL] for prompt in PROMPTS]
    given = score_candidates(trees(model), trie, [ALL, ALL[::-1]], OverCatalogue(trie))
    given = [given[0] + trie.log_share(ALL), given[1][::-1] + trie.log_share(ALL)]
    np.testing.assert_allclose(given, expected, atol=1e-5)
    for mine, found in zip(
        expected, search(trees(model), trie, k=9, width=2, normaliser=OverCatalogue(trie)), strict=True
    ):
        np.testing.assert_allclose(found.scores, np.array(mine)[found.items], atol=1e-5)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("gone", [[], [1], [0, 1, 2, 5], [3, 4, 8]])
def test_what_a_query_leaves_out_still_counts(model: Any, gone: Sequence[int], per_token: bool, exact: bool) -> None:
    excluded = [np.array(gone, dtype=np.int64)] * 2
    how: dict[str, Any] = {"k": 3, "width": 9 if not exact else 1, "per_token": per_token, "exact": exact}
    for prompt, found in zip(
        PROMPTS, search(trees(model), TRIE, excluded=excluded, normaliser=OverCatalogue(TRIE), **how), strict=True
    ):
        lengths = [len(title) if per_token else 1 for title in ENDED]
        scores = {i: brute(model, prompt, i, set(range(9))) / lengths[i] for i in range(9) if i not in gone}
        third = sorted(scores.values(), reverse=True)[2]
        assert set(found.items.tolist()) == {item for item, score in scores.items() if score >= third - 1e-6}
        assert found.exact or not exact
        np.testing.assert_allclose(found.scores, [scores[item] for item in found.items], atol=1e-5)


@pytest.mark.parametrize("over", ["vocabulary", "catalogue"])
def test_logits_are_divided_by_the_temperature_of_the_node_before(model: Any, over: Over) -> None:
    temperatures = np.linspace(0.5, 2, TRIE.num_nodes, dtype=np.float32)
    expected = []
    for prompt in PROMPTS:
        scores = []
        for item, title in enumerate(ENDED):
            nodes = [int(TRIE.leaf[item])]
            while nodes[0]:
                nodes.insert(0, int(TRIE.parent(np.array(nodes[:1]))[0]))
            logits = logits_after(model, tuple(prompt), tuple(title)) / torch.from_numpy(temperatures[nodes, None])
            goes_on = [sorted({each[n] for each in ENDED if each[:n] == title[:n]}) for n in range(len(title))]
            total = sum(
                float(row[token] - (row[among] if over == "catalogue" else row).logsumexp(0))
                for row, token, among in zip(logits, title, goes_on, strict=False)
            )
            scores.append(total - math.log(sum(title == other for other in ENDED)))
        expected.append(scores)
    normaliser = normaliser_of(over, TRIE, temperatures)
    given = score_candidates(trees(model), TRIE, [ALL, ALL], normaliser)
    np.testing.assert_allclose([each + TRIE.log_share(ALL) for each in given], expected, atol=1e-5)
    for mine, found in zip(expected, search(trees(model), TRIE, k=9, width=2, normaliser=normaliser), strict=True):
        assert found.exact
        np.testing.assert_allclose(found.scores, np.array(mine)[found.items], atol=1e-5)


def test_a_damaged_model_is_refused(model: Any) -> None:
    tree = trees(model)
    hidden = torch.full_like(tree.prompt_hidden_UD, torch.nan)
    with pytest.raises(ModelError, match="not finite"):
        OverCatalogue(TRIE).log_probs(tree, hidden, torch.zeros(2).long(), torch.tensor([0, 1]), torch.tensor([1, 1]))
