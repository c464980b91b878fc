"""Training windows, batches, objectives and the trained baselines on a small world."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cprec.baselines.bert4rec import BERT4Rec, MaskedStream
from cprec.baselines.gru4rec import GRU4Rec
from cprec.baselines.lightgcn import LightGCN, Smoothed
from cprec.baselines.objectives import objective_loss
from cprec.baselines.sasrec import MASK, SASRec, SelfAttention
from cprec.baselines.sequential import (
    NEXT_ITEM,
    BatchStream,
    TrainedBaseline,
    TrainedRecommender,
    TrainingLog,
    WindowStream,
    recent,
    windows,
)
from cprec.batch import IGNORE
from cprec.data.build import build_dataset
from cprec.data.config import Rules, SplitSpec
from cprec.data.dataset import read_dataset
from cprec.data.ragged import Ragged
from cprec.data.sources.memory import MemorySource
from cprec.data.splits import Split, make_split
from cprec.errors import ConfigError
from cprec.schema import TEST

NUM_ITEMS = 12
"""The world is a ring: after item n comes item n + 1, round and round, from a start of each user's own."""

SMALL = {"hidden_size": 16, "dropout": 0.0, "learning_rate": 1e-2, "batch_size": 16, "num_epochs": 12, "anneal": 0.3}
MODELS: list[TrainedBaseline] = [
    SASRec(**SMALL, num_blocks=1, num_heads=2),  # type: ignore[arg-type]
    GRU4Rec(**SMALL),  # type: ignore[arg-type]
    BERT4Rec(**{**SMALL, "num_epochs": 40}, num_blocks=1, objective="softmax", num_negatives=0),  # type: ignore[arg-type]
]


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    import pyarrow as pa

    events = [(f"u{user:02}", (user + n) % NUM_ITEMS, n) for user in range(90) for n in range(4 + user % 9)]
    items = pa.table({"item_id": [f"i{n:02}" for n in range(NUM_ITEMS)], "title": [f"thing {n}" for n in range(12)]})
    log = pa.table(
        {
            "user_id": [user for user, _, _ in events],
            "item_id": [f"i{item:02}" for _, item, _ in events],
            "timestamp": [time for _, _, time in events],
        }
    )
    folder = tmp_path_factory.mktemp("ring") / "data"
    build_dataset([MemorySource("ring", "p", items, log)], folder, Rules(k_core=0))
    return make_split(*read_dataset(folder), SplitSpec())


def test_windows_make_every_item_but_the_first_a_target_once() -> None:
    generator = np.random.default_rng(0)
    rows = [generator.integers(0, 100, size) for size in (1, 2, 9, 10, 11, 30, 0)]
    cut = windows(Ragged.of(rows), 10)
    assert cut.lengths.max() <= 11 and cut.lengths.min() >= 2
    targets = [value for row in range(len(cut)) for value in cut[row][1:].tolist()]
    assert targets == [value for row in rows for value in row[1:].tolist()]


def test_the_latest_values_of_each_row() -> None:
    kept = recent(Ragged.of([[1, 2, 3], [], [4]]), 2)
    assert [kept[row].tolist() for row in range(3)] == [[2, 3], [], [4]]


def test_an_epoch_reads_every_window_once_and_any_step_can_be_had_alone(split: Split) -> None:
    log = TrainingLog.of(split, "ring")
    settings = replace(MODELS[0], num_epochs=2, batch_size=7)
    stream = WindowStream(log, settings, seed=3)
    per_epoch = stream.num_steps // 2
    for epoch in range(2):
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        read = np.sort(np.concatenate([stream.batch(step).examples for step in steps]))
        assert read.tolist() == list(range(90))
    again = WindowStream(log, settings, seed=3)
    for step in (stream.num_steps - 1, 0):
        one, other = again.batch(step), stream.batch(step)
        np.testing.assert_array_equal(one.examples, other.examples)
        for name, rows in one.rows.items():
            np.testing.assert_array_equal(rows, other.rows[name])
    assert sum(stream.batch(step).num_tokens for step in range(stream.num_steps)) == stream.num_tokens
    reseeded = WindowStream(log, settings, seed=4)
    assert reseeded.batch(0).examples.tolist() != stream.batch(0).examples.tolist()


def test_targets_follow_their_inputs_and_padding_has_none(split: Split) -> None:
    stream = WindowStream(TrainingLog.of(split, "ring"), MODELS[0], seed=0)
    batch = stream.batch(1)
    real = batch.rows["targets"] != IGNORE
    assert ((batch.rows["input_ids"][real] + 1) % NUM_ITEMS == batch.rows["targets"][real]).all()
    assert (batch.rows["input_ids"][~real] == NUM_ITEMS).all()
    assert real.sum() == batch.num_tokens == batch.counts[NEXT_ITEM]


def test_masks_hide_what_they_ask_for(split: Split) -> None:
    settings = BERT4Rec(max_length=5, mask_share=0.4, last_share=0.5, batch_size=90)
    stream = MaskedStream(TrainingLog.of(split, "ring"), settings, seed=0)
    batch = stream.batch(0)
    masked = batch.rows["input_ids"] == NUM_ITEMS + MASK
    np.testing.assert_array_equal(masked, batch.rows["targets"] != IGNORE)
    assert masked.any(1).all(), "every row asks for something"
    lengths = (batch.rows["input_ids"] != NUM_ITEMS).sum(1)
    only_last = masked.sum(1) == 1
    last = masked[np.arange(90), lengths - 1]
    assert 0.4 < (only_last & last).mean() < 1


# ---- objectives ------------------------------------------------------------------------------------------------------


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
    monkeypatch.setattr("cprec.baselines.objectives.CHUNK", chunk)
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
        ({"num_heads": 3}, "hidden_size=256 must be a multiple of num_heads=3"),
        ({"dropout": 1.0}, "dropout=1.0 must lie in 0..1"),
        ({"batch_size": 0}, "batch_size=0 must be above 0"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        SASRec(**settings)  # type: ignore[arg-type]


# ---- trained ---------------------------------------------------------------------------------------------------------


def asked(split: Split) -> tuple[Ragged, np.ndarray, list[str]]:
    queries = split.queries("ring", TEST, max_history=50)
    return queries.history, queries.target, [f"p/{split.interactions.user_id[row]}" for row in queries.user]


def recall_at_1(recommender: TrainedRecommender, split: Split) -> float:
    histories, targets, users = asked(split)
    better, _ = recommender.target_ranks(histories, targets, users=users, exclude_seen=False)
    return float((better == 0).mean())


@pytest.mark.parametrize("settings", MODELS, ids=lambda settings: type(settings).__name__)
def test_learns_what_comes_next(settings: TrainedBaseline, split: Split, tmp_path: Path) -> None:
    recommender = settings.make(split, "ring", seed=0, folder=tmp_path)
    assert recall_at_1(recommender, split) > 0.7
    record = json.loads((tmp_path / "baseline.json").read_text())
    assert record["best"] > 0.7 and record["seconds"] > 0
    assert not list(tmp_path.glob("checkpoint-*"))
    before = (tmp_path / "log.jsonl").read_text()
    again = settings.make(split, "ring", seed=0, folder=tmp_path)
    assert (tmp_path / "log.jsonl").read_text() == before, "a finished one is not trained again"
    assert recall_at_1(again, split) == recall_at_1(recommender, split)
    with pytest.raises(ConfigError, match="holds a baseline of other seed"):
        settings.make(split, "ring", seed=1, folder=tmp_path)
    with pytest.raises(ConfigError, match="holds a baseline of other settings"):
        replace(settings, learning_rate=1.0).make(split, "ring", folder=tmp_path)


def test_a_kill_in_training_changes_nothing(split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = MODELS[0]
    whole = settings.make(split, "ring", folder=tmp_path / "whole")
    batch = BatchStream.members

    def dies(self: BatchStream, step: int) -> np.ndarray:
        if step == 30:
            raise KeyboardInterrupt
        return batch(self, step)

    monkeypatch.setattr(BatchStream, "members", dies)
    with pytest.raises(KeyboardInterrupt):
        settings.make(split, "ring", folder=tmp_path / "killed")
    monkeypatch.undo()
    resumed = settings.make(split, "ring", folder=tmp_path / "killed")
    histories, _, _ = asked(split)
    rows = np.full(len(histories), -1)
    torch.testing.assert_close(
        resumed.score_histories(histories, rows), whole.score_histories(histories, rows), rtol=0, atol=0
    )


@pytest.mark.parametrize("causal", [True, False])
def test_a_history_is_encoded_as_its_last_position_is_read(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = SelfAttention(SASRec(hidden_size=16, max_length=9, num_blocks=2), NUM_ITEMS, causal=causal).eval()
    lengths = torch.tensor([0, 1, 4, 9, 9] if causal else [1, 1, 4, 9, 9])
    rows = torch.randint(NUM_ITEMS, (5, 9)).masked_fill(torch.arange(9) >= lengths[:, None], NUM_ITEMS)
    expected = model.hidden(rows)[torch.arange(5), (lengths - 1).clamp(min=0)]
    for positions in (1, 20, 4096):
        monkeypatch.setattr("cprec.baselines.sasrec.ENCODE_POSITIONS", positions)
        torch.testing.assert_close(model.encode(rows, lengths, torch.full((5,), -1)), expected, rtol=1e-5, atol=1e-5)


def test_ranks_are_counted_as_sorting_would(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cprec.baselines.sequential.SCORES", 3 * NUM_ITEMS)
    monkeypatch.setattr("cprec.baselines.sequential.ITEM_BLOCK", 5)
    recommender = replace(MODELS[0], num_epochs=1).make(split, "ring")
    histories, targets, users = asked(split)
    scores = recommender.score_histories(histories, np.full(len(histories), -1)).numpy()
    for exclude_seen in (False, True):
        better, tied = recommender.target_ranks(histories, targets, users=users, exclude_seen=exclude_seen)
        for row, target in enumerate(targets):
            kept = scores[row].copy()
            if exclude_seen:
                kept[[item for item in histories[row] if item != target]] = -np.inf
            assert better[row] == (kept > kept[target]).sum()
            missed = exclude_seen and target in histories[row]
            assert tied[row] == (0 if missed else (kept == kept[target]).sum())


def test_another_domain_is_refused(split: Split) -> None:
    recommender = replace(MODELS[0], num_epochs=1).make(split, "ring")
    with pytest.raises(ConfigError, match="was trained on domain 'ring', not 'square'"):
        recommender.scores("square", [])


def test_smoothing_is_the_mean_of_the_layers(split: Split) -> None:
    log = TrainingLog.of(split, "ring")
    model = Smoothed(LightGCN(num_layers=2, hidden_size=4), log)
    counts = np.zeros((len(log.users), NUM_ITEMS))
    np.add.at(counts, (log.sequences.row_of, log.sequences.values), 1)
    graph = counts / np.sqrt(np.outer(counts.sum(1), np.maximum(counts.sum(0), 1)))
    users, items = [model.user.weight.detach().numpy()], [model.item.weight.detach().numpy()]
    for _ in range(2):
        users, items = [*users, graph @ items[-1]], [*items, graph.T @ users[-1]]
    np.testing.assert_allclose(model.items().detach(), np.mean(items, 0), rtol=1e-5, atol=1e-6)
    rows, target, vectors = model(torch.tensor([[3], [5]]), torch.tensor([[1], [2]]))
    np.testing.assert_allclose(rows.detach(), np.mean(users, 0)[[3, 5]], rtol=1e-5, atol=1e-6)
    assert target.tolist() == [1, 2]
    (rows.sum() + vectors.sum()).backward()
    ones_u, ones_i = np.zeros(len(log.users)), np.ones(NUM_ITEMS)
    np.add.at(ones_u, [3, 5], 1)
    gradient = (ones_i + graph.T @ (graph @ ones_i) + graph.T @ ones_u) / 3  # of both sums, by hand
    assert model.item.weight.grad is not None
    np.testing.assert_allclose(model.item.weight.grad[:, 0], gradient, rtol=1e-4)


def test_users_known_and_unknown_are_ranked_by_lightgcn(split: Split) -> None:
    settings = LightGCN(hidden_size=16, num_negatives=8, batch_size=64, num_epochs=20)
    recommender = settings.make(split, "ring", seed=0)
    histories, targets, users = asked(split)
    for names in (users, ["p/stranger"] * len(users)):
        better, _ = recommender.target_ranks(histories, targets, users=names, exclude_seen=True)
        assert better.mean() < (NUM_ITEMS - 7) / 2, "better than chance among the items not had"
