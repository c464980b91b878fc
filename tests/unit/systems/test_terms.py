"""Loss terms against their formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cprec.batch import IGNORE
from cprec.data.links import followers
from cprec.errors import ConfigError
from cprec.systems.recipes.mqsa_ted import MQSATED
from cprec.systems.recipes.sasrec import SASRec
from cprec.systems.terms import (
    MixOfNeighbours,
    SameCluster,
    Successors,
    info_nce,
    likeness,
    objective_loss,
)


@pytest.fixture
def scored() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(7, 4, generator=generator), torch.randn(9, 4, generator=generator)
    return hidden, weight, torch.tensor([0, 1, 2, 3, 8, 8, 5])


def test_softmax_is_cross_entropy_over_all_items(scored: tuple[torch.Tensor, ...]) -> None:
    hidden, weight, target = scored
    expected = F.cross_entropy(hidden @ weight.T, target, reduction="sum")
    torch.testing.assert_close(objective_loss("softmax", *scored, num_negatives=0), expected)


@pytest.mark.parametrize("objective", ["bce", "bpr", "sampled_softmax", "bpr_max"])
def test_objectives_against_negatives_are_what_their_formulas_say(
    objective: str, scored: tuple[torch.Tensor, ...]
) -> None:
    hidden, weight, target = scored
    torch.manual_seed(5)
    found = objective_loss(objective, *scored, num_negatives=3)  # type: ignore[arg-type]
    torch.manual_seed(5)
    own = objective in ("bce", "bpr")
    drawn = torch.randint(9, (7, 3)) if own else torch.randint(9, (3,)).expand(7, 3)
    expected = 0.0
    for row in range(7):
        positive = hidden[row] @ weight[target[row]]
        others = [n for n in drawn[row].tolist() if own or n != target[row]]
        negative = torch.stack([hidden[row] @ weight[n] for n in others])
        if objective == "bce":
            expected -= (positive.sigmoid().log() + (1 - negative.sigmoid()).log().sum()).item()
        elif objective == "bpr":
            expected -= (positive - negative).sigmoid().log().mean().item()
        elif objective == "sampled_softmax":
            expected -= (positive - torch.cat([positive[None], negative]).logsumexp(0)).item()
        else:
            share = negative.softmax(0)
            apart = (share * (positive - negative).sigmoid()).sum()
            expected += (0.5 * (share * negative**2).sum() - apart.log()).item()
    assert found.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("chunk", [1, 3, 256])
def test_gradients_of_sampled_softmax_are_those_of_its_formula(
    chunk: int, scored: tuple[torch.Tensor, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cprec.systems.terms.CHUNK", chunk)
    hidden, weight = (each.double().requires_grad_() for each in scored[:2])
    target = scored[2]
    torch.manual_seed(5)
    loss = objective_loss("sampled_softmax", hidden, weight, target, num_negatives=6, dtype=torch.float64) * 3
    torch.manual_seed(5)
    drawn = torch.randint(9, (6,))
    scores = torch.cat([weight[target].mul(hidden).sum(1)[:, None], hidden @ weight[drawn].T], 1)
    hit = F.pad(drawn == target[:, None], (1, 0))
    assert hit.any(), "a target is among the negatives"
    expected = F.cross_entropy(scores.masked_fill(hit, -torch.inf), torch.zeros_like(target), reduction="sum") * 3
    torch.testing.assert_close(loss, expected)
    got = torch.autograd.grad(loss, (hidden, weight))
    for found, wanted in zip(got, torch.autograd.grad(expected, (hidden, weight)), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "hinge"}, "objective='hinge': expected softmax"),
        ({"num_negatives": 5}, "num_negatives=5 with objective=softmax: softmax ranks all items"),
        ({"objective": "bce"}, "num_negatives=0 with objective=bce: give 1 or more"),
        ({"num_heads": 3}, "hidden_size=64 must be a multiple of num_heads=3"),
        ({"dropout": 1.0}, "dropout=1.0 must lie in 0..1"),
        ({"batch_size": 0}, "batch_size=0 must be above 0"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        SASRec(**settings)  # type: ignore[arg-type]


def test_a_contrast_leaves_out_pairs_of_one_label() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(3, 4, generator=generator), torch.randn(3, 4, generator=generator)
    label = torch.tensor([7, 9, 7])
    expected = 0.0
    both, labels = torch.cat([first, second]), label.repeat(2)
    for row in range(6):
        partner = both[row] @ both[(row + 3) % 6] / 0.5
        others = torch.stack([both[row] @ both[n] / 0.5 for n in range(6) if labels[n] != labels[row]])
        expected += (torch.cat([partner[None], others]).logsumexp(0) - partner).item() / 2
    assert info_nce(first, second, label, 0.5).item() == pytest.approx(expected, rel=1e-5)
    alone = torch.tensor([1, 1, 1])
    assert info_nce(first, second, alone, 0.5).item() == 0, "nothing is left to tell the partner from"


def test_centres_are_found_and_states_are_drawn_to_theirs() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.tensor([[10.0, 0.0], [0.0, 10.0]]).repeat(20, 1) + torch.randn(40, 2, generator=generator)
    term = SameCluster(2, 2, temperature=1.0)
    term.fit(states, seed=0)
    centres = torch.stack([states[0::2].mean(0), states[1::2].mean(0)])
    found = term.centre_CD[term.centre_CD[:, 1].argsort()]
    torch.testing.assert_close(found, centres)
    target, items = torch.zeros(2, dtype=torch.int64), torch.zeros(3, 2)
    near = torch.tensor([[[9.0, 1.0]] * 2, [[1.0, 9.0]] * 2], requires_grad=True)
    between = torch.tensor([[[5.2, 4.8]] * 2, [[4.8, 5.2]] * 2])
    assert term(near, target, items) < term(between, target, items)
    term(near, target, items).backward()
    assert term.centre_CD.grad is None


def test_likeness_is_minus_the_divergence_of_all_ordered_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, items = torch.randn(2, 3, 4, generator=generator), torch.randn(5, 4, generator=generator)
    logs = (hidden @ items.T / 0.5).log_softmax(-1)
    pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
    divergences = [F.kl_div(logs[:, j], logs[:, i], log_target=True, reduction="sum") for i, j in pairs]
    found = likeness(temperature=0.5)(hidden, torch.zeros(2), items)
    torch.testing.assert_close(found, -torch.stack(divergences).mean())


def test_items_are_drawn_to_their_successors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Item 1 came twice after item 0, item 2 once; with the temperature 1 / ln 4 their weights are 4 and 2, those of
    the others 1: chances of 1/8, 4/8, 2/8, 1/8. Item 1 was followed by item 0 alone, and item 3 by nothing."""
    monkeypatch.setattr("cprec.distributed.use_bf16", lambda setting, device: False)
    counts = followers(np.array([0, 0, 0, 1, 1, 2, 2]), np.array([0, 1, 0, 0, 1, 0, 2]), 4)
    temperature = 1 / torch.log(torch.tensor(4.0)).item()
    chances = torch.tensor([[1, 4, 2, 1], [4, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]])
    chances = chances / chances.sum(1, keepdim=True)
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(4, 9, generator=generator, requires_grad=True)
    pad = 4  # positions without a target teach nothing, whatever item stands there
    rows = {
        "items": torch.tensor([[0, 1, 2], [0, 3, pad]]),
        "targets": torch.tensor([[1, 0, IGNORE], [2, 0, IGNORE]]),
    }
    logits = 3 * vectors @ vectors.T / temperature  # the root of the width is 3
    expected = torch.stack([F.cross_entropy(logits[item], chances[item]) for item in (0, 1, 0, 3)]).sum()
    found = Successors(counts, temperature, dropout=0.0)(vectors, rows, vectors)
    torch.testing.assert_close(found, expected)
    for one, other in zip(*(torch.autograd.grad(loss, vectors) for loss in (found, expected)), strict=True):
        torch.testing.assert_close(one, other)


def test_soft_targets_of_a_low_temperature_are_finite() -> None:
    counts = followers(np.zeros(6), np.array([0, 1, 0, 1, 0, 2]), 3)
    term = Successors(counts, temperature=1e-3, dropout=0.0)
    assert term.more_E.tolist() == pytest.approx([1, 0, 1]), "the greatest count has all"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"short_share": 1.5}, "short_share=1.5 must lie in 0..1"),
        ({"transition_weight": -1}, "transition_weight=-1 must not be below 0"),
        ({"long_query": 0}, "long_query=0 must be above 0"),
    ],
)
def test_impossible_settings_of_mqsa_ted_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        MQSATED(**settings)  # type: ignore[arg-type]


def test_neighbours_are_weighed_by_attention_over_texts() -> None:
    """Items 0, 1 and 2 have the vectors (1, 0), (0, 1) and (1, 1); 3 pads. The history is item 0; its neighbours are
    item 1, and items 2 and 0, whose mean is (1, 1/2). The matrix leaves vectors as they are, and the attention is the
    first entry of the history's less twice the second of the neighbour's: 1 - 2 = -1, of which LeakyReLU leaves -0.2,
    and 1 - 1 = 0."""
    frozen = np.array([[1, 0], [0, 1], [1, 1]], dtype=np.float32)
    term = MixOfNeighbours(frozen, size=2, num_neighbours=2, temperature=0.5, dropout=0.0)
    term.matrix.weight.data, term.vector.weight.data = torch.eye(2), torch.tensor([[1.0, 0.0, 0.0, -2.0]])
    items = torch.tensor([[[0, 3], [1, 3], [2, 0], [1, 1]]]).expand(2, 4, 2)  # the last is no neighbour
    first = 1 / (1 + np.exp(0.2))
    expected = torch.tensor([[first, 1 - first]] * 2, dtype=torch.float32)
    torch.testing.assert_close(term.weights(items[:, :3]), expected)
    hidden = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    mix = first * hidden[:, 1] + (1 - first) * hidden[:, 2]
    found = term(hidden, {"items": items}, torch.empty(0))
    torch.testing.assert_close(found, info_nce(hidden[:, 0], mix, torch.arange(2), 0.5))
