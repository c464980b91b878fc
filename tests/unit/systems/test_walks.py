"""PinSage and its parts: walks, neighbours' weights, a convolution, pairs with hard negatives, items without events."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse
from torch import nn
from torch.nn import functional as F

from cprec.data.ragged import Ragged
from cprec.data.splits import Split
from cprec.errors import ConfigError, CPRecError, Unsuitable
from cprec.schema import SPLITS, TEST, TRAIN
from cprec.systems import fit as fitting
from cprec.systems.batches import PairStream, Passes
from cprec.systems.dot_product import DotProductRecommender, SequenceModel
from cprec.systems.encoders import Mean
from cprec.systems.graph import Neighbours
from cprec.systems.items import ItemTable
from cprec.systems.recipes.pinsage import PinSage
from cprec.systems.signals import TrainingSequences
from cprec.systems.stage import NEXT_ITEM, Stage
from cprec.systems.terms import MaxMargin
from cprec.systems.walks import Convolve, importance, visits

NUM_ITEMS = 12
SMALL: dict[str, Any] = {
    **{"hidden_size": 16, "max_length": 1, "learning_rate": 1e-2, "batch_size": 64, "num_epochs": 8, "margin": 0.3},
    **{"num_walks": 20, "num_neighbours": 3, "num_negatives": 8, "hard_from": 3, "hard_to": 6, "most_hard": 2},
}


@pytest.fixture
def circle(tmp_path: Path) -> str:
    """Vectors of the ring's items on a circle, so that neighbours in the ring are alike."""
    return on_circle(tmp_path / "circle.npz")


ON_CIRCLE = np.stack([turn(2 * np.pi * np.arange(NUM_ITEMS) / NUM_ITEMS) for turn in (np.cos, np.sin)], 1)


def on_circle(path: Path, **changed: np.ndarray) -> str:
    np.savez(path, **{"item_id": np.array([f"i{n:02}" for n in range(NUM_ITEMS)]), "vectors": ON_CIRCLE, **changed})
    return str(path)


class Scripted:
    """Gives the shares that it was told."""

    def __init__(self, *shares: list[float]) -> None:
        self._shares = iter(shares)

    def random(self, num: int) -> np.ndarray:
        found = np.array(next(self._shares))
        assert len(found) == num
        return found


def test_walks_go_from_items_to_users_to_items() -> None:
    """Users 0 and 1 had items 0 and 1, and 1 and 2. One walk of two hops from each item.

    First hop: item 0 by user 0 to its second item, 1; item 1 by its second user, 1, to 2; item 2 by user 1 to 1.
    Second hop: 1 by its first user, 0, to 1; 2 by user 1 back to 1, where the walk began; 1 by its second user back to
    2."""
    shares = [0.0, 0.9, 0.0], [0.9, 0.9, 0.0], [0.0, 0.0, 0.9], [0.9, 0.0, 0.9]
    found = visits(Ragged.of([[0, 1], [1, 2]]), 3, num_walks=1, num_hops=2, generator=Scripted(*shares))  # type: ignore[arg-type]
    assert found.toarray().tolist() == [[0, 2, 0], [0, 0, 1], [0, 1, 0]]


def test_walks_choose_events_and_users_with_equal_chances(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cprec.systems.walks.WALKS_AT_ONCE", 150_000)  # in several parts
    num_walks, sequences = 100_000, Ragged.of([[0, 1, 1], [1, 2], [4]])  # nobody had item 3
    found = visits(sequences, 5, num_walks=num_walks, num_hops=2, generator=np.random.default_rng(0)).toarray()
    counts_UV = np.array([[1, 2, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 0, 1]])
    hop = (counts_UV / np.maximum(counts_UV.sum(0), 1)).T @ (counts_UV / counts_UV.sum(1, keepdims=True))
    expected = hop + hop @ hop
    np.fill_diagonal(expected, 0)
    np.testing.assert_allclose(found / num_walks, expected, atol=0.01)


def test_neighbours_weigh_as_they_were_visited_and_those_of_new_items_as_they_are_alike() -> None:
    visited = sparse.csr_array([[0, 3, 1, 0], [1, 0, 1, 0], [2, 4, 0, 0], [0, 0, 0, 0]])
    frozen = np.array([[1, 0], [0, 2], [-1, 0], [3, 4]], dtype=np.float32)
    known = np.arange(3)
    expected = [[0, 0.75, 0.25, 0], [0.5, 0, 0.5, 0], [1 / 3, 2 / 3, 0, 0], [0.6 / 1.4, 0.8 / 1.4, 0, 0]]
    np.testing.assert_allclose(importance(visited, frozen, known, 2).toarray(), expected, rtol=1e-6)
    expected = [[0, 1, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0]]
    np.testing.assert_allclose(importance(visited, frozen, known, 1).toarray(), expected, rtol=1e-6)
    frozen[3] = 0
    assert importance(visited, frozen, known, 2).toarray()[3].tolist() == [0, 0, 0, 0], "it is like nothing"


def test_a_convolution_adds_what_neighbours_send_to_the_own_vector() -> None:
    """Item 0 has the neighbours 1 and 2 with a quarter and three quarters, item 1 has none, item 2 has item 0.

    They send ReLU(z + (0, 1)) = (1, 1), (2, 2), (0, 0), so (1/2, 1/2), nothing and (1, 1) arrive, of which the first
    entry counts twice. The own vectors plus (1, 0) are (2, 0), (3, 1), (1, -2)."""
    step = Convolve(2, 2, neighbours=True)
    for linear, matrix, bias in (
        (step.own, [[1.0, 0.0], [0.0, 1.0]], [1.0, 0.0]),
        (step.sent, [[1.0, 0.0], [0.0, 1.0]], [0.0, 1.0]),
        (step.pooled, [[2.0, 0.0], [0.0, 1.0]], None),
    ):
        linear.weight.data = torch.tensor(matrix)
        if bias is not None:
            linear.bias.data = torch.tensor(bias)
    weights = np.array([[0, 0.25, 0.75], [0, 0, 0], [1, 0, 0]])
    vectors = torch.tensor([[1.0, 0.0], [2.0, 1.0], [0.0, -2.0]], requires_grad=True)
    found = step(vectors, [Neighbours(sparse.csr_array(each)) for each in (weights, weights.T)])
    summed = torch.tensor([[3.0, 0.5], [3.0, 1.0], [3.0, 0.0]])  # of item 2: 1 + 2 and -2 + 1, which ReLU makes 0
    torch.testing.assert_close(found, summed / summed.norm(dim=1, keepdim=True))
    dense = torch.from_numpy(weights).float() @ step.sent(vectors).relu()
    expected = F.normalize((step.own(vectors) + step.pooled(dense)).relu(), dim=1)
    grads = [
        torch.autograd.grad((each * summed).square().sum(), [vectors, step.sent.weight]) for each in (found, expected)
    ]
    torch.testing.assert_close(*grads)


def test_the_margin_counts_for_shared_negatives_and_for_hard_ones() -> None:
    """Items 0 to 3 are at 1, 2, 3 and 4, the drawn ones are all item 2; margin 1/2.

    State 1 with the target 1 (score 2): twice 3 - 2 + 1/2, and for the hard item 3 4 - 2 + 1/2; number 4 is nothing.
    State 2 with the target 2 (6): drawn is the target; item 0 is far enough; for item 3 8 - 6 + 1/2.
    State 1 with the target 0 (1): twice 3 - 1 + 1/2; item 3 is the history's own."""
    term = MaxMargin(0.5, num_negatives=2, drawn_from=np.array([2]))
    rows = {
        "items": torch.tensor([[0], [1], [3]]),
        "targets": torch.tensor([1, 2, 0]),
        "hard": torch.tensor([[3, 4], [0, 3], [3, 4]]),
    }
    items = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    found = term(torch.tensor([[1.0], [2.0], [1.0]]), rows, items)
    assert float(found) == pytest.approx((1.5 + 1.5 + 2.5) / 3 + 2.5 / 2 + 2.5)
    without = term(torch.tensor([[1.0], [2.0], [1.0]]), rows | {"hard": torch.empty(3, 0, dtype=torch.int64)}, items)
    assert float(without) == pytest.approx(1.5 + 0 + 2.5)


def test_each_pass_has_one_more_hard_negative() -> None:
    pairs = np.array([[0, 1], [1, 2], [2, 0], [0, 2], [2, 1]])
    candidates = [[2, 1], [], [0]]
    passes = Passes(batch_size=2, num_epochs=4, seed=3)
    stream = PairStream(pairs, Ragged.of(candidates), ["main"], passes, most_hard=2)
    seen: dict[int, set[int]] = {0: set(), 1: set(), 2: set()}
    for epoch, num_hard in enumerate((0, 1, 2, 2)):
        batches = [stream.batch(step) for step in range(3 * epoch, 3 * epoch + 3)]
        read = [pair for b in batches for pair in zip(b.rows["items"][:, 0].tolist(), b.rows["targets"], strict=True)]
        assert sorted(read) == sorted(map(tuple, pairs.tolist())), "each pair once"
        for batch in batches:
            assert batch.rows["hard"].shape == (batch.num_rows, num_hard) and batch.counts == {"main": batch.num_rows}
            for (item,), hard in zip(batch.rows["items"].tolist(), batch.rows["hard"].tolist(), strict=True):
                seen[item].update(hard)
    assert seen == {0: {1, 2}, 1: {3}, 2: {0}}, "3 stands for none"
    again = PairStream(pairs, Ragged.of(candidates), ["main"], passes, most_hard=2).batch(7)
    np.testing.assert_array_equal(again.rows["hard"], stream.batch(7).rows["hard"])


def test_the_mean_is_over_the_items_up_to_a_position_and_nothing_is_zero() -> None:
    inputs = torch.tensor([[[1.0], [3.0], [8.0]], [[5.0], [9.0], [9.0]], [[9.0], [9.0], [9.0]]])
    lengths = torch.tensor([3, 1, 0])
    encoder = Mean(dropout=0.5).eval()
    assert encoder(inputs, lengths)[0].flatten().tolist() == [1, 2, 4]
    assert encoder.last(inputs, lengths).flatten().tolist() == [4, 5, 0]


# ---- PinSage ---------------------------------------------------------------------------------------------------------


def test_pinsage_learns_what_comes_next(circle: str, split: Split) -> None:
    recommender = PinSage(**SMALL, vectors=circle).make(split, "ring")
    assert recommender.name == "PinSage"
    queries = split.queries("ring", TEST, max_history=50)
    better, _ = recommender.target_ranks(
        queries.history, queries.target, users=["p/stranger"] * len(queries), exclude_seen=True
    )
    assert (better == 0).mean() > 0.8


@pytest.mark.parametrize("num_neighbours", [0, 3])
def test_an_item_that_training_never_saw_is_ranked_first(num_neighbours: int, tmp_path: Path, split: Split) -> None:
    """Item 5 has no events and the text of item 6, which comes between 4 and 7 then."""
    without = split.part.copy()
    without[split.events(TRAIN) & (split.interactions.item == 5)] = SPLITS.index("context")
    fewer, vectors = replace(split, part=without), ON_CIRCLE.copy()
    vectors[5] = vectors[6]
    assert 5 not in TrainingSequences.of(fewer, "ring").sequences.values
    settings = PinSage(
        **{**SMALL, "num_neighbours": num_neighbours}, vectors=on_circle(tmp_path / "twin.npz", vectors=vectors)
    )
    recommender = settings.make(fewer, "ring")
    assert isinstance(recommender, DotProductRecommender)
    # Of the items beside the last one all but the new one are in the history.
    for history in ([3, 6, 4], [8, 6, 7]):
        scores = recommender.score_histories(Ragged.of([history]), [""])[0].numpy()
        assert [item for item in np.argsort(-scores) if item not in history][0] == 5


class TextAlone(ItemTable):
    """What PinSage is without neighbours, written out."""

    num_special = 1

    def __init__(self, frozen_VF: np.ndarray, size: int) -> None:
        super().__init__()
        self.num_items, self.frozen = len(frozen_VF), torch.from_numpy(frozen_VF)
        self.first, self.second = nn.Linear(frozen_VF.shape[1], size), nn.Linear(size, size)
        self.third, self.fourth = nn.Linear(size, size), nn.Linear(size, size, bias=False)

    def vectors(self, items: torch.Tensor | None = None) -> torch.Tensor:
        assert items is None
        hidden = F.normalize(self.first(self.frozen).relu(), dim=1)
        hidden = F.normalize(self.second(hidden).relu(), dim=1)
        found: torch.Tensor = self.fourth(self.third(hidden).relu())
        return torch.cat([found, torch.zeros(1, found.shape[1])])


@pytest.mark.slow
def test_without_neighbours_pinsage_learns_as_its_text_network_alone(
    circle: str, split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cprec.distributed.pick_device", lambda: torch.device("cpu"))

    class OfTextAlone(PinSage):
        def stages(self, data: TrainingSequences, seed: int) -> Sequence[Stage]:
            (whole,) = super().stages(data, seed)
            torch.manual_seed(seed)
            model = SequenceModel(TextAlone(self.frozen(data), self.hidden_size), Mean(self.dropout))
            margin = MaxMargin(self.margin, self.num_negatives, np.unique(data.sequences.values))
            return [self.stage(data, model, {}, whole.stream, teachers={NEXT_ITEM: (1.0, margin)})]

    small = {**SMALL, "vectors": circle, "num_epochs": 3, "dropout": 0.2}
    losses = []
    none = {"num_neighbours": 0}
    for number, settings in enumerate((PinSage(**small | none), OfTextAlone(**small | none), PinSage(**small))):
        settings.make(split, "ring", folder=tmp_path / str(number))
        (log,) = tmp_path.glob(f"{number}/*/*/log.jsonl")
        losses.append([line["loss"] for line in map(json.loads, log.read_text().splitlines()) if "loss" in line])
    assert losses[0] == losses[1] != losses[2], "to the digit"


WRONG_VECTORS: dict[str, dict[str, Any]] = {
    "no vector of 11 items, 'i01' among them": {"item_id": np.array(["i00"]), "vectors": np.ones((1, 2))},
    "12 item_id and vectors of shape [11, 2]: expected a row": {"vectors": np.ones((11, 2))},
    "12 item_id and vectors of shape [12]: expected a row": {"vectors": np.ones(12)},
    "12 item_id and vectors of shape [12, 0]: expected a row": {"vectors": np.ones((12, 0))},
    "values that are not finite": {"vectors": np.full((12, 2), np.nan)},
    "is not an .npz file with item_id and vectors": {"vectors": np.array([{}] * 12, dtype=object)},
}


@pytest.mark.parametrize("message", WRONG_VECTORS)
def test_vectors_that_cannot_be_are_refused_before_training(
    message: str, split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "train", None)
    with pytest.raises(ConfigError) as caught:
        PinSage(vectors=on_circle(tmp_path / "wrong.npz", **WRONG_VECTORS[message])).make(split, "ring")
    assert message in str(caught.value)


def test_domains_without_text_or_pairs_are_refused_before_training(
    circle: str, split: Split, data: TrainingSequences, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "train", None)
    wordless = replace(split, catalogue=replace(split.catalogue, title=np.array(["?"] * NUM_ITEMS, dtype=object)))
    first_of_user = np.zeros_like(split.part, dtype=bool)
    first_of_user[np.unique(split.interactions.user, return_index=True)[1]] = True
    part = np.where(split.events(TRAIN) & ~first_of_user, SPLITS.index("context"), split.part)
    cases: list[tuple[PinSage, Split, str]] = [
        (PinSage(), wordless, "PinSage reads titles, and those of domain 'ring' have no word"),
        (PinSage(vectors=circle), replace(split, part=part), "has no user with two training events"),
    ]
    for settings, wrong, message in cases:
        with pytest.raises(Unsuitable, match=message):
            settings.make(wrong, "ring")
    one_item = replace(data, sequences=Ragged.of([[3, 3, 3], [3]]))
    with pytest.raises(Unsuitable, match="no user of domain 'ring' has two different items in a row"):
        PinSage(vectors=circle).stages(one_item, 0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_neighbours": -1}, "num_neighbours=-1 must not be below 0"),
        ({"num_walks": 0}, "num_walks=0 must be above 0"),
        ({"margin": 0.0}, "margin=0.0 must be above 0"),
        ({"hard_to": 20}, "hard_to=20 must be above hard_from=20"),
    ],
)
def test_impossible_settings_of_pinsage_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(CPRecError, match=message):
        PinSage(**wrong)
