"""Dual embeddings and their parts: baskets, pairs of them, skip-gram with negatives, complements and substitutes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cprec.data.ragged import Ragged
from cprec.data.splits import Split
from cprec.errors import ConfigError, Unsuitable
from cprec.schema import SPLITS, TEST, TRAIN
from cprec.systems import fit as fitting
from cprec.systems.batches import BasketStream, Passes
from cprec.systems.dot_product import DotProductRecommender, SequenceModel
from cprec.systems.encoders import Mean
from cprec.systems.recipes.dual_embeddings import DualEmbeddings
from cprec.systems.signals import Baskets, TrainingSequences
from cprec.systems.terms import SkipGram

SMALL: dict[str, Any] = {"hidden_size": 16, "learning_rate": 2e-2, "batch_size": 64, "num_negatives": 3}
TEAS, CUPS = (0, 1, 2), (3, 4, 5)


def lists(rows: Ragged) -> list[list[float]]:
    return [rows[row].tolist() for row in range(len(rows))]


def events_of(
    data: TrainingSequences, sequences: Sequence[Sequence[int]], times: list[int] | None
) -> TrainingSequences:
    """Training events of users p/0, p/1 and so on."""
    users = tuple(f"p/{number}" for number in range(len(sequences)))
    return replace(data, sequences=Ragged.of(sequences), users=users, times=None if times is None else np.array(times))


def test_what_a_user_had_at_one_time_is_a_basket(data: TrainingSequences) -> None:
    """The third time of user 0 is that of the first of user 1. User 1 had item 3 twice at once, and item 4 alone."""
    seen = events_of(data, [[0, 1, 2, 1, 5], [6, 3, 3, 4]], [1, 1, 2, 2, 5, 5, 6, 6, 7])
    baskets = Baskets(seen, window=2)
    assert lists(baskets.training) == [[0, 1], [1, 2]]
    cases = {
        (0, 1, 2, 1, 5): ("p/0", [0, 0, 1, 0, 1]),
        (2, 1, 5, 7, 2): ("p/0", [0, 0, 1, 0, 0]),  # new events, of which one was had before: with the last known ones
        (3, 4, 6): ("p/1", [0, 1, 0]),
        (2, 1): ("p/0", [0, 0]),  # not where training ends
        (0, 1, 2): ("p/9", [0, 0, 0]),  # of nobody in training
        (): ("p/0", []),
    }
    found = baskets.gaps(Ragged.of(list(cases)), [user for user, _ in cases.values()])
    assert lists(found) == [gaps for _, gaps in cases.values()] and found.values.dtype == np.float32


@pytest.mark.parametrize("times", [[0, 1, 2, 3, 0, 1, 0], None])
def test_where_times_are_an_order_runs_are_baskets(times: list[int] | None, data: TrainingSequences) -> None:
    baskets = Baskets(events_of(data, [[0, 1, 2, 3], [4, 5], [6]], times), window=3)
    assert lists(baskets.training) == [[0, 1, 2], [1, 2, 3], [4, 5]]
    found = baskets.gaps(Ragged.of([[0, 1, 2, 3], [4, 5, 6], [6]]), ["p/0", "p/9", "p/2"])
    assert lists(found) == [[0, 1, 0, 0], [0, 0, 0], [0]]


def test_the_mean_begins_anew_at_a_gap() -> None:
    vectors, gaps = torch.tensor([[1.0, 3.0, 8.0, 4.0]]), torch.tensor([[0.0, 0.0, 1.0, 0.0]])
    inputs, encoder = torch.stack([vectors, gaps], 2), Mean(dropout=0.5, gaps=True)
    assert encoder.eval()(inputs, torch.tensor([4])).flatten().tolist() == [1, 2, 8, 6]
    embedded = encoder.train().embed(torch.stack([torch.ones(64, 4), gaps.expand(64, 4)], 2), torch.full((64,), 4))
    assert set(embedded[:, :, 0].unique().tolist()) == {0.0, 2.0} and embedded[:, :, 1].eq(gaps).all()


def test_each_item_of_a_basket_meets_another_one_in_each_pass() -> None:
    baskets = Ragged.of([[0, 1, 2], [3, 4]])
    stream = BasketStream(baskets, ["main"], Passes(batch_size=4, num_epochs=40, seed=0))
    met = set()
    for epoch in range(40):
        batches = [stream.batch(2 * epoch), stream.batch(2 * epoch + 1)]
        items, targets = (np.concatenate([b.rows[name].ravel() for b in batches]) for name in ("items", "targets"))
        assert sorted(items.tolist()) == [0, 1, 2, 3, 4]
        met |= set(zip(items.tolist(), targets.tolist(), strict=True))
    assert met == {(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1), (3, 4), (4, 3)}
    assert {batch.counts["main"] for batch in batches} == {1, 4}, "each target counts"
    assert all(not batch.rows["gaps"].any() for batch in batches)


def test_a_pair_is_held_against_negatives_drawn_by_their_counts() -> None:
    """All negatives are item 1, since 4 ** 60 is large. State 1 has the score 0 for its target, a loss of log 2, and
    log 3 for each of two negatives, log(1 + 3). State 2 has log 9 for its target 1, log(1 + 1/9), and negatives do not
    count."""
    term, items = SkipGram(np.array([0, 4, 0]), 2, power=60), torch.tensor([[0.0], [np.log(3)], [5.0]])
    found = term(torch.tensor([[1.0], [2.0]]), torch.tensor([0, 1]), items.float())
    assert float(found) == pytest.approx(np.log(2) + 2 * np.log(4) + np.log(10 / 9))
    chances = SkipGram(np.array([0, 1, 4]), 2, power=0.5).get_buffer("chance_V")
    assert chances.tolist() == [1, 1, 2]


def test_scores_are_products_of_the_last_baskets_mean_with_outputs(data: TrainingSequences) -> None:
    (stage,) = DualEmbeddings(**SMALL, window=2).stages(data, 0)
    recommender = stage.recommender()
    assert isinstance(recommender, DotProductRecommender) and isinstance(recommender.model, SequenceModel)
    output = recommender.model.output
    assert output is not None
    inputs, outputs = recommender.model.items.vectors(), output.vectors()
    assert len(inputs) == len(outputs) + 1 and not torch.equal(inputs[:-1], outputs)
    states = torch.stack([(inputs[1] + inputs[2]) / 2, inputs[5], torch.zeros(16)])
    found = recommender.score_histories(Ragged.of([[7, 1, 2], [5], []]), ["p/9"] * 3)
    torch.testing.assert_close(found, (states @ outputs.T).detach())


@pytest.fixture(scope="module")
def teas(split_of_rows: Callable[..., Split]) -> Split:
    """Each basket has one of three teas and one of three cups."""
    generator, rows = np.random.default_rng(0), []
    for user in range(30):
        for time in range(4):
            rows += [(f"u{user:02}", int(generator.integers(3)) + kind, time) for kind in (TEAS[0], CUPS[0])]
    return split_of_rows("teas", [f"i{number}" for number in range(6)], rows)


def test_cups_go_with_tea_and_another_tea_stands_in_for_it(teas: Split) -> None:
    torch.manual_seed(0)
    (stage,) = DualEmbeddings(**SMALL, num_epochs=40).stages(TrainingSequences.of(teas, "teas"), 0)
    module = stage.trainable.module
    optimizer = torch.optim.Adam(module.parameters(), lr=2e-2)
    for batch in stage.stream:
        optimizer.zero_grad()
        rows = {name: torch.from_numpy(array) for name, array in batch.rows.items()}
        (stage.trainable.losses(rows)["next_item"] / batch.num_rows).backward()
        optimizer.step()
    recommender = stage.recommender()
    assert isinstance(recommender, DotProductRecommender) and isinstance(recommender.model, SequenceModel)
    output = recommender.model.output
    assert output is not None
    inputs, outputs = recommender.model.items.vectors()[:-1], output.vectors()
    for mine, others in ((TEAS, CUPS), (CUPS, TEAS)):
        for item in mine:
            goes_with, stands_in = inputs[item] @ outputs.T, inputs[item] @ inputs.T
            assert set(goes_with.topk(3).indices.tolist()) == set(others)
            assert set(stands_in.topk(3).indices.tolist()) == set(mine)


def test_substitutes_come_from_the_weights_of_complements(teas: Split, tmp_path: Path) -> None:
    settings = DualEmbeddings(**SMALL, num_epochs=1)
    complements = settings.make(teas, "teas", folder=tmp_path)
    substitutes = replace(settings, substitutes=True).make(teas, "teas", folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1, "one training"
    assert substitutes.name == complements.name == "dual embeddings" and substitutes.seconds == complements.seconds
    assert isinstance(complements.model, SequenceModel)
    inputs = complements.model.items.vectors()[:-1].detach()
    found = substitutes.score_histories(Ragged.of([[4]]), ["p/stranger"])
    torch.testing.assert_close(found, inputs[4:5] @ inputs.T)


@pytest.mark.slow  # that they learn from baskets is quick, and so is what a window holds
def test_dual_embeddings_learn_from_neighbours_where_times_are_an_order(split: Split) -> None:
    recommender = DualEmbeddings(**SMALL, window=2, num_epochs=20).make(split, "ring")
    queries = split.queries("ring", TEST, max_history=50)
    users = [f"p/{split.interactions.user_id[row]}" for row in queries.user]
    better, _ = recommender.target_ranks(queries.history, queries.target, users=users, exclude_seen=True)
    assert (better == 0).mean() > 0.8


def test_domains_without_baskets_are_refused_before_training(
    data: TrainingSequences, split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "train", None)
    for sequences, times in (([[1, 1, 2], [3]], [1, 1, 2, 1]), ([[3, 3], [3]], None)):
        with pytest.raises(Unsuitable, match="no basket of domain 'ring' has two different items: give a domain"):
            DualEmbeddings().stages(events_of(data, sequences, times), 0)
    first = np.zeros_like(split.part, dtype=bool)
    first[np.unique(split.interactions.user, return_index=True)[1]] = True
    part = np.where(split.events(TRAIN) & ~first, SPLITS.index("context"), split.part)
    with pytest.raises(Unsuitable, match="has no user with two training events"):
        DualEmbeddings().make(replace(split, part=part), "ring")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"window": 1}, "window=1 must be 2 or more"),
        ({"num_negatives": 0}, "num_negatives=0 must be above 0"),
        ({"power": float("nan")}, "power=nan must be a finite number"),
    ],
)
def test_impossible_settings_of_dual_embeddings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DualEmbeddings(**wrong)
