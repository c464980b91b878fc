"""Systems on a small world: training, its record, resuming, ranking."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cprec import provenance
from cprec.batch import IGNORE
from cprec.data.ragged import Ragged
from cprec.data.splits import Split
from cprec.errors import ConfigError, Unsuitable
from cprec.provenance import file_sha256
from cprec.schema import SPLITS, TEST, TRAIN
from cprec.systems import fit as fitting
from cprec.systems.batches import PrefixStream, RowStream, WindowStream
from cprec.systems.dot_product import DotProductRecommender, GraphModel, SequenceModel
from cprec.systems.encoders import Block, BlockKind, Encoder, LatentSteps, Recurrent, SelfAttention, TwoEncoders
from cprec.systems.graph import SLOPE, Step, UserItemGraph
from cprec.systems.items import FrozenTable, IdTable, read_vectors
from cprec.systems.recipes.alpharec import AlphaRec
from cprec.systems.recipes.bert4rec import BERT4Rec
from cprec.systems.recipes.gru4rec import GRU4Rec
from cprec.systems.recipes.hllm import HLLM, LITE
from cprec.systems.recipes.hmamba import HMamba
from cprec.systems.recipes.human_priors import HORIZON, HumanPriors
from cprec.systems.recipes.icsrec import ICSRec
from cprec.systems.recipes.igrsr import IGRSR
from cprec.systems.recipes.lightgcn import NGCF, LightGCN
from cprec.systems.recipes.mamba4rec import Mamba4Rec
from cprec.systems.recipes.mancar import ManCAR
from cprec.systems.recipes.mmm4rec import MMM4Rec
from cprec.systems.recipes.molar import Molar
from cprec.systems.recipes.mqsa_ted import MQSATED
from cprec.systems.recipes.rearec import PROGRESSIVE, ReaRec
from cprec.systems.recipes.recformer import Recformer
from cprec.systems.recipes.sasrec import WIDE, SASRec
from cprec.systems.recipes.sigma import SIGMA
from cprec.systems.recipes.slmrec import SLMRec
from cprec.systems.recipes.sra_cl import SRACL
from cprec.systems.recipes.tiger import TIGER
from cprec.systems.settings import SystemSettings
from cprec.systems.signals import TrainingSequences
from cprec.systems.stage import NEXT_ITEM, Stage, WeightedTerms
from cprec.train.loop import Optimisation

NUM_ITEMS = 12
SMALL: dict[str, Any] = {"hidden_size": 16, "dropout": 0.0, "learning_rate": 1e-2, "batch_size": 16, "anneal": 0.3}
SASREC = replace(WIDE, **SMALL, num_epochs=5, num_blocks=1, num_heads=2)
ICSREC = ICSRec(**SMALL, num_epochs=1, num_blocks=1, num_intentions=4)
REAREC = ReaRec(**SMALL, num_epochs=1, first_epochs=2, num_blocks=1)
OF_EACH_ENCODER: list[SystemSettings] = [
    SASREC,
    GRU4Rec(**SMALL, num_epochs=5),
    Mamba4Rec(**SMALL, num_epochs=5),
    BERT4Rec(**SMALL, num_epochs=15, num_blocks=1, objective="softmax", num_negatives=0),
    REAREC,
]
"""The simplest system of each kind of encoder: causal, recurrent, state space, cloze, with latent steps."""
BUILT_ON_THEM: list[SystemSettings] = [
    HMamba(**SMALL, num_epochs=5),
    MMM4Rec(**SMALL, num_epochs=5, text_size=8),
    SIGMA(**SMALL | {"batch_size": 64}, num_epochs=3, kept=2),
    ICSREC,
    replace(PROGRESSIVE, **SMALL, num_epochs=1, first_epochs=2, num_blocks=1),
    ReaRec(**SMALL, num_epochs=1, first_epochs=2, num_blocks=3, num_steps=0),
    ManCAR(**SMALL, num_epochs=1, first_epochs=2, num_blocks=1),
    IGRSR(**SMALL, num_epochs=1, first_epochs=2, num_blocks=1),
    MQSATED(**SMALL, num_epochs=5, num_blocks=1, num_heads=2),
    SLMRec(**SMALL, num_epochs=5, num_heads=2, teacher_blocks=4),
    HLLM(**SMALL | {"learning_rate": 3e-3}, attention_dropout=0.0, num_epochs=6, num_negatives=6),
    Molar(**SMALL | {"learning_rate": 3e-3}, attention_dropout=0.0, num_epochs=6, num_negatives=6, item_steps=0),
    replace(LITE, **SMALL | {"learning_rate": 3e-3}, num_epochs=4),
    HumanPriors(**SMALL, num_epochs=5, num_blocks=1, num_heads=2, prior="popularity", num_groups=3),
    replace(HORIZON, **SMALL, num_epochs=5, num_blocks=1, num_heads=2),
]
"""Those that add something of their own, which other tests look at; that they learn is a slow test."""


def asked(split: Split) -> tuple[Ragged, np.ndarray, list[str]]:
    queries = split.queries("ring", TEST, max_history=50)
    return queries.history, queries.target, [f"p/{split.interactions.user_id[row]}" for row in queries.user]


def recall_of_unseen_at_1(recommender: Any, split: Split) -> float:
    histories, targets, users = asked(split)
    better, _ = recommender.target_ranks(histories, targets, users=users, exclude_seen=True)
    return float((better == 0).mean())


@pytest.mark.parametrize(
    "settings",
    [*OF_EACH_ENCODER, *(pytest.param(settings, marks=pytest.mark.slow) for settings in BUILT_ON_THEM)],
    ids=lambda settings: type(settings).__name__,
)
def test_learns_what_comes_next(settings: SystemSettings, split: Split, tmp_path: Path) -> None:
    recommender = settings.make(split, "ring", folder=tmp_path)
    assert recall_of_unseen_at_1(recommender, split) > 0.8
    (folder,) = tmp_path.iterdir()
    record = json.loads((folder / "system.json").read_text())
    assert record["stages"][-1]["best"] > 0.7 and record["seconds"] == recommender.seconds > 0
    assert record["made_from"]["code"] == provenance.code_sha256(type(settings).__module__)
    assert not list(folder.rglob("checkpoint-*"))


def test_a_finished_one_is_used_again_and_others_train_beside_it(
    split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other settings, seeds, data and code make other weights: a row never vanishes or keeps the weights of before."""
    settings, trained = replace(SASREC, num_epochs=1), []
    monkeypatch.setattr(fitting, "train", lambda *args, **named: trained.append(1) or original(*args, **named))
    first = settings.make(split, "ring", folder=tmp_path)
    again = settings.make(split, "ring", folder=tmp_path)
    assert len(trained) == 1 and again.seconds == first.seconds
    histories, _, users = asked(split)
    torch.testing.assert_close(again.score_histories(histories, users), first.score_histories(histories, users))
    settings.make(split, "ring", seed=1, folder=tmp_path)
    replace(settings, learning_rate=1.0).make(split, "ring", folder=tmp_path)
    fewer = split.part.copy()
    fewer[np.flatnonzero(split.events(TRAIN))[0]] = SPLITS.index("context")
    settings.make(replace(split, part=fewer), "ring", folder=tmp_path)
    monkeypatch.setattr(fitting, "code_sha256", lambda module: "other code")
    settings.make(split, "ring", folder=tmp_path)
    assert len(trained) == 5 == len(list(tmp_path.iterdir()))


original = fitting.train


@pytest.mark.parametrize(
    "settings", [pytest.param(SASREC, marks=pytest.mark.slow), ICSREC, REAREC], ids=lambda each: type(each).__name__
)
def test_a_kill_in_training_changes_nothing(
    settings: SystemSettings, split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_windows = isinstance(settings, (SASRec, MQSATED))
    settings = replace(settings, dropout=0.2, num_epochs=2 if on_windows else 0.4)
    whole = settings.make(split, "ring", folder=tmp_path / "whole")
    members, steps = RowStream.members, []

    def dies(self: RowStream, step: int) -> np.ndarray:
        steps.append(step)
        if step == self.num_steps - 4:
            raise KeyboardInterrupt
        return members(self, step)

    monkeypatch.setattr(RowStream, "members", dies)
    with pytest.raises(KeyboardInterrupt):
        settings.make(split, "ring", folder=tmp_path / "killed")
    monkeypatch.undo()
    resumed = settings.make(split, "ring", folder=tmp_path / "killed")
    histories, _, users = asked(split)
    scores = [each.score_histories(histories, users) for each in (resumed, whole)]
    torch.testing.assert_close(*scores, rtol=0, atol=0)


@pytest.mark.parametrize(
    "settings",
    [
        TIGER(**SMALL, num_epochs=1, num_layers=1, num_heads=2, num_levels=2, num_codes=4, text_size=8, max_nodes=50),
        pytest.param(
            Recformer(**SMALL, num_epochs=0.4, first_epochs=0.4, last_epochs=0.4, num_blocks=1, max_length=5),
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda each: type(each).__name__,
)
def test_a_kill_in_training_changes_nothing_where_more_than_weights_is_stored(
    settings: SystemSettings, split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version of codes; the matrix of a catalogue."""
    settings = replace(settings, dropout=0.2)
    settings.make(split, "ring", folder=tmp_path / "whole")
    members = RowStream.members

    def dies(self: RowStream, step: int) -> np.ndarray:
        if step == self.num_steps - 2:
            raise KeyboardInterrupt
        return members(self, step)

    monkeypatch.setattr(RowStream, "members", dies)
    with pytest.raises(KeyboardInterrupt):
        settings.make(split, "ring", folder=tmp_path / "killed")
    monkeypatch.undo()
    assert [*tmp_path.glob("killed/*/*/checkpoint-*")], "it goes on from one"
    settings.make(split, "ring", folder=tmp_path / "killed")
    whole, killed = (sorted(tmp_path.glob(f"{name}/*/*/best.safetensors")) for name in ("whole", "killed"))
    assert len(whole) == len(killed) and [*map(file_sha256, whole)] == [*map(file_sha256, killed)]


def test_training_ends_when_it_has_not_become_better(split: Split, tmp_path: Path) -> None:
    replace(SASREC, learning_rate=1e-9, patience=2).make(split, "ring", folder=tmp_path)
    (log,) = tmp_path.glob("*/*/log.jsonl")
    assert sum("validation" in line for line in log.read_text().splitlines()) < 6


def test_training_that_makes_nothing_better_is_told(
    split: Split, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replace(SASREC, learning_rate=1e-12).make(split, "ring", folder=tmp_path / "still")
    note = "note: no step made it better on validation, so it keeps the weights it began with"
    assert note in capsys.readouterr().err
    replace(SASREC, num_epochs=2).make(split, "ring", folder=tmp_path / "learns")
    assert note not in capsys.readouterr().err


def test_the_time_of_training_is_that_of_its_steps_and_validations(split: Split) -> None:
    ticks = iter((0.0, 100.0, 103.0, 110.0))  # the first step warms up, the second takes 3 seconds, validation 7
    num_rows = len(TrainingSequences.of(split, "ring").sequences)
    num_steps = 5 * -(-num_rows // SASREC.batch_size)
    told = fitting.seconds_to_fit(SASREC, split, "ring", 0, clock=lambda: next(ticks))
    assert told == 3 * num_steps + 7 * 16


def test_data_without_anything_to_learn_is_unsuitable(split: Split) -> None:
    for part, message in ((TEST, "nothing to train on"), (TRAIN, "no validation event")):
        emptied = replace(split, part=np.full_like(split.part, SPLITS.index(part)))
        with pytest.raises(Unsuitable, match=message):
            SASREC.make(emptied, "ring")


def test_ranks_are_counted_as_sorting_would(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cprec.systems.dot_product.SCORES", 3 * NUM_ITEMS)
    monkeypatch.setattr("cprec.systems.dot_product.ITEM_BLOCK", 5)
    recommender = replace(SASREC, num_epochs=1).make(split, "ring")
    histories, targets, users = asked(split)
    scores = recommender.score_histories(histories, users).numpy()
    for exclude_seen in (False, True):
        better, tied = recommender.target_ranks(histories, targets, users=users, exclude_seen=exclude_seen)
        for row, target in enumerate(targets):
            kept = scores[row].copy()
            if exclude_seen:
                kept[[item for item in histories[row] if item != target]] = -np.inf
            assert better[row] == (kept > kept[target]).sum()
            missed = exclude_seen and target in histories[row]
            assert tied[row] == (0 if missed else (kept == kept[target]).sum())
    with pytest.raises(ConfigError, match="SASRec was made for domain 'ring' and is asked about 'square'"):
        recommender.scores("square", [])


# ---- encoders --------------------------------------------------------------------------------------------------------


def encoder_of(kind: str) -> Encoder:
    torch.manual_seed(0)
    if kind == "recurrent":
        return Recurrent(16, num_layers=2, dropout=0.5).eval()
    block: BlockKind = "query_norm" if kind.endswith("query norm") else "pre_norm"
    sizes: dict[str, Any] = {"max_length": 9, "num_blocks": 2, "num_heads": 2, "block": block}
    drops = {"dropout": 0.5, "attention_dropout": 0.5}
    if kind.startswith("two"):
        first, second = (SelfAttention(16, **sizes, **drops, causal=True, span=span) for span in (1, 3))
        return TwoEncoders(first, second, share=0.3).eval()
    return SelfAttention(16, **sizes, **drops, causal=kind.startswith("causal")).eval()


KINDS = ("causal", "cloze", "causal, query norm", "cloze, query norm", "two", "two, query norm", "recurrent")


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_state_is_that_of_the_last_position(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoder_of(kind)
    lengths = torch.tensor([1, 1, 4, 9, 9] if kind.startswith("cloze") else [0, 1, 4, 9, 9])
    inputs = torch.randn(5, 9, 16)
    expected = encoder(inputs, lengths)[torch.arange(5), (lengths - 1).clamp(min=0)]
    for positions in (1, 20, 4096):
        monkeypatch.setattr("cprec.systems.encoders.ENCODE_POSITIONS", positions)
        torch.testing.assert_close(encoder.last(inputs, lengths), expected, rtol=1e-5, atol=1e-5)


def test_a_block_with_a_norm_for_queries_alone_is_that_of_the_public_code() -> None:
    torch.manual_seed(0)
    block = Block(16, 2, True, "query_norm", dropout=0.5, attention_dropout=0.5).eval()
    attention = torch.nn.MultiheadAttention(16, 2, batch_first=True)
    attention.in_proj_weight.data, attention.in_proj_bias.data = (
        block.query_key_value.weight,
        block.query_key_value.bias,
    )
    attention.out_proj.load_state_dict(block.output.state_dict())
    inputs = torch.randn(3, 5, 16)
    later = torch.ones(5, 5, dtype=torch.bool).triu(1)
    read, _ = attention(block.norm_attention(inputs), inputs, inputs, attn_mask=later)
    normed = block.norm_linear(inputs + read)
    expected = normed + block.second(block.first(normed).relu())
    torch.testing.assert_close(block(inputs, None), expected, rtol=1e-5, atol=1e-5)


def test_attention_weights_are_dropped_out_in_training_alone() -> None:
    """One item has all the weight: it is read twice as strongly, or not at all."""
    torch.manual_seed(0)
    block = Block(8, 1, True, "pre_norm", dropout=0.0, attention_dropout=0.5)
    one, place, mask = torch.randn(1, 1, 8), torch.tensor([0]), torch.ones(1, 1, 1, 1, dtype=torch.bool)
    value = torch.nn.functional.linear(block.norm_attention(one), *(p[16:] for p in block.query_key_value.parameters()))
    possible = [block._rest(one, scale * value) for scale in (0, 2)]
    for run in (lambda: block(one, None), lambda: block.at(one, place, mask)[:, None]):
        seen = {
            [torch.allclose(out, each, atol=1e-6) for each in possible].index(True)
            for out in (run() for _ in "12345678")
        }
        assert seen == {0, 1}
    block.eval()
    torch.testing.assert_close(block(one, None), block._rest(one, value))


def test_settings_reach_blocks_batches_and_the_optimizer(
    split: Split, data: TrainingSequences, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SASREC, block="query_norm", attention_dropout=0.25, beta2=0.99, sorted_batches=3)
    (block,) = settings.encoder().blocks
    assert isinstance(block, Block) and block.only_queries and block.attention_dropout == 0.25
    assert settings.passes(0).pool == 3

    def stop(*arguments: Any, optimisation: Optimisation, **others: Any) -> None:
        raise Unsuitable(f"beta2={optimisation.beta2}")

    monkeypatch.setattr(fitting, "train", stop)
    with pytest.raises(Unsuitable, match=r"beta2=0\.99$"):
        settings.make(split, "ring")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"block": "post_norm"}, "block='post_norm': expected pre_norm or query_norm"),
        ({"attention_dropout": 1.0}, "attention_dropout=1.0 must lie in 0..1"),
        ({"beta2": 1.0}, "beta2=1.0 must lie in 0..1"),
        ({"sorted_batches": 0}, "sorted_batches=0 must be above 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SASRec(**wrong)


def test_a_long_query_asks_with_the_mean_of_the_last_positions_and_is_added_to() -> None:
    """The block's formula written out, one position after the other, with one head."""
    torch.manual_seed(0)
    block, hidden = Block(4, 1, True, "pre_norm", dropout=0.0, attention_dropout=0.0, span=2), torch.randn(3, 4)
    of_query, of_key, of_value = block.query_key_value.weight.chunk(3)
    bias_query, bias_key, bias_value = block.query_key_value.bias.chunk(3)
    normed, expected = block.norm_attention(hidden), []
    for place in range(3):
        asking = hidden[max(0, place - 1) : place + 1].mean(0)
        query = of_query @ block.norm_attention(asking) + bias_query
        keys, values = (normed[: place + 1] @ m.T + b for m, b in ((of_key, bias_key), (of_value, bias_value)))
        added = asking + block.output((keys @ query / 2).softmax(0) @ values)
        expected.append(added + block.second(torch.nn.functional.gelu(block.first(block.norm_linear(added)))))
    torch.testing.assert_close(block(hidden[None], None)[0], torch.stack(expected))


def test_scores_of_two_encoders_are_the_mean_of_theirs() -> None:
    encoder, items = encoder_of("two"), torch.randn(5, 16)
    assert isinstance(encoder, TwoEncoders)
    inputs, lengths = torch.randn(2, 4, 16), torch.tensor([4, 2])
    embedded = encoder.first.embed(inputs, lengths)
    scores = [one.read(embedded, lengths) @ items.T for one in (encoder.first, encoder.second)]
    torch.testing.assert_close(encoder(inputs, lengths) @ items.T, 0.3 * scores[0] + 0.7 * scores[1])


@pytest.mark.parametrize("kind", ["causal", "recurrent"])
def test_a_latent_step_reads_the_state_before_it_as_one_more_item(kind: str) -> None:
    encoder, lengths = encoder_of(kind), torch.tensor([3, 1])
    steps, inputs = LatentSteps(encoder, 2, 16), torch.randn(2, 4, 16)
    states = steps.last(inputs, lengths)
    torch.testing.assert_close(states[:, 0], encoder.last(inputs, lengths))
    read = encoder.embed(inputs[:1, :3], lengths[:1])
    for number in range(2):
        read = torch.cat([read, (states[:1, number] + steps.step.weight[number])[:, None]], 1)
        torch.testing.assert_close(states[:1, number + 1], encoder.read(read, lengths[:1] + number + 1)[:, -1])


# ---- items and graphs ------------------------------------------------------------------------------------------------


def test_tables_give_a_vector_for_each_item_and_special_row() -> None:
    frozen = np.arange(6.0).reshape(3, 2)
    tables = [IdTable(3, 2), FrozenTable(frozen, torch.nn.Identity())]
    numbers = torch.tensor([[2, 3], [0, 4]])
    for table in tables:
        assert table.vectors().shape == (5, 2)
        torch.testing.assert_close(table.vectors(numbers), table.vectors()[numbers])
    assert tables[1].vectors()[3:].eq(0).all() and tables[1].vectors()[:3].numpy().tolist() == frozen.tolist()


def test_vectors_of_a_file_stand_in_the_order_of_the_catalogue(tmp_path: Path) -> None:
    np.savez(tmp_path / "v.npz", item_id=np.array(["b", "a"]), vectors=np.array([[1.0, 2.0], [3.0, 4.0]]))
    assert read_vectors(tmp_path / "v.npz", ["a", "b"]).tolist() == [[3, 4], [1, 2]]
    with pytest.raises(ConfigError, match="no vector of 1 items, 'c' among them"):
        read_vectors(tmp_path / "v.npz", ["a", "c"])
    (tmp_path / "text").write_text("no vectors")
    with pytest.raises(ConfigError, match="is not an .npz file with item_id and vectors"):
        read_vectors(tmp_path / "text", ["a"])


def test_smoothing_is_the_mean_of_the_layers(data: TrainingSequences) -> None:
    num_users = len(data.users)
    tables = IdTable(num_users, 4, num_special=0), IdTable(NUM_ITEMS, 4, num_special=0)
    model = GraphModel(*tables, UserItemGraph(data.sequences, NUM_ITEMS), [Step(4), Step(4)])
    counts = np.zeros((num_users, NUM_ITEMS))
    np.add.at(counts, (data.sequences.row_of, data.sequences.values), 1)
    graph = counts / np.sqrt(np.outer(counts.sum(1), np.maximum(counts.sum(0), 1)))
    users, items = ([table.vectors().detach().numpy()] for table in tables)
    for _ in range(2):
        users, items = [*users, graph @ items[-1]], [*items, graph.T @ users[-1]]
    vectors = model.vectors()
    np.testing.assert_allclose(vectors.items_VD.detach(), np.mean(items, 0), rtol=1e-5, atol=1e-6)
    states, targets = model.states(vectors, {"users": torch.tensor([3, 5]), "targets": torch.tensor([1, 2])})
    np.testing.assert_allclose(states.detach(), np.mean(users, 0)[[3, 5]], rtol=1e-5, atol=1e-6)
    assert targets.tolist() == [1, 2]
    (states.sum() + vectors.items_VD.sum()).backward()
    ones_u, ones_i = np.zeros(num_users), np.ones(NUM_ITEMS)
    np.add.at(ones_u, [3, 5], 1)
    gradient = (ones_i + graph.T @ (graph @ ones_i) + graph.T @ ones_u) / 3  # of both sums, by hand
    assert tables[1].table.weight.grad is not None
    np.testing.assert_allclose(tables[1].table.weight.grad[:, 0], gradient, rtol=1e-4)


def test_a_step_of_ngcf_maps_sums_and_their_products_with_the_own_vector() -> None:
    """Three events: user 0 had items 0 and 1, user 1 item 1. Item 1 and user 0 have the degree 2, the others 1."""
    graph = UserItemGraph(Ragged.of([[0, 1], [1]]), 2)
    step = Step(2, weights=True, product=True)
    for linear, matrix in ((step.of_sum, [[1.0, 0.0], [0.0, -1.0]]), (step.of_product, [[0.0, 2.0], [1.0, 0.0]])):
        assert isinstance(linear, torch.nn.Linear)
        linear.weight.data = torch.tensor(matrix)
    users, items = torch.tensor([[1.0, 2.0], [-1.0, 1.0]]), torch.tensor([[3.0, 0.0], [2.0, 4.0]])
    _, (new_users, new_items) = graph.layers(users, items, [step])
    root = 2**-0.5
    # Of user 0: root * (3, 0) + 1/2 * (2, 4) = (3 root + 1, 2). With its own vector: (3 root + 2, 4), of which W1 turns
    # the sign of the second entry. Their product with (1, 2) is (3 root + 1, 4), which W2 makes (8, 3 root + 1).
    first = [3 * root + 2 + 8, SLOPE * (-4 + 3 * root + 1)]
    # Of user 1: root * (2, 4); with (-1, 1): (2 root - 1, 4 root + 1); times (-1, 1): (-2 root, 4 root).
    second = [2 * root - 1 + 8 * root, SLOPE * (-4 * root - 1 - 2 * root)]
    torch.testing.assert_close(new_users, torch.tensor([first, second]))
    # Of item 0: root * (1, 2); with (3, 0): (3 + root, 2 root); times (3, 0): (3 root, 0).
    torch.testing.assert_close(new_items[0], torch.tensor([3 + root, root]))  # -2 root + 3 root is above zero


@pytest.mark.parametrize("weights", [False, True])
def test_a_user_who_is_not_in_training_goes_the_steps_of_one_who_is(weights: bool, data: TrainingSequences) -> None:
    """A user of the graph whose vector is zero at first is where a stranger with the same history is."""
    torch.manual_seed(0)
    tables = IdTable(len(data.users), 4, num_special=0), IdTable(NUM_ITEMS, 4, num_special=0)
    tables[0].table.weight.data[3] = 0
    steps = [Step(4, weights=weights, product=True) for _ in range(2)]
    graph = UserItemGraph(data.sequences, NUM_ITEMS)
    model = GraphModel(*tables, graph, steps, side_by_side=weights).eval()
    items = torch.from_numpy(data.sequences[3])[None]
    known, stranger = (model.encode(model.vectors(), {"users": torch.tensor([n]), "items": items}) for n in (3, -1))
    assert known.shape == (1, 12 if weights else 4)
    torch.testing.assert_close(stranger, known)


def test_users_and_items_that_send_nothing_are_made_up_for() -> None:
    """Each of two items is silent half of the time, else it counts twice: sums are right on average."""
    graph = UserItemGraph(Ragged.of([[0], [1]]), 2, dropout=0.5)
    ones = torch.ones(2, 3)
    torch.manual_seed(0)
    sent = torch.stack([list(graph.layers(ones, ones, [Step(3)]))[1][0] for _ in range(300)])
    assert set(sent.unique().tolist()) == {0.0, 2.0} and sent.std(2).max() == 0
    assert 0.9 < sent.mean() < 1.1 and sent[:, 0].ne(sent[:, 1]).any()
    assert list(graph.eval().layers(ones, ones, [Step(3)]))[1][0].eq(1).all()


GRAPHS = [
    LightGCN(hidden_size=16, num_negatives=8, batch_size=64, num_epochs=4),
    NGCF(hidden_size=16, num_negatives=8, batch_size=64, num_epochs=4),
    AlphaRec(hidden_size=16, text_size=8, adapter_size=16, num_negatives=8, batch_size=64, num_epochs=4),
]


@pytest.mark.parametrize("settings", GRAPHS, ids=lambda settings: type(settings).__name__)
def test_users_known_and_unknown_are_ranked_on_the_graph(settings: SystemSettings, split: Split) -> None:
    recommender = settings.make(split, "ring")
    histories, targets, users = asked(split)
    for names in (users, ["p/stranger"] * len(users)):
        better, _ = recommender.target_ranks(histories, targets, users=names, exclude_seen=True)
        assert better.mean() < (NUM_ITEMS - 7) / 2, "better than chance among the items not had"


def test_a_graph_is_smoothed_once_for_all_queries(
    split: Split, data: TrainingSequences, monkeypatch: pytest.MonkeyPatch
) -> None:
    (stage,) = GRAPHS[0].stages(data, 0)
    recommender, smoothed = stage.recommender(), []
    assert isinstance(recommender, DotProductRecommender)
    monkeypatch.setattr(GraphModel, "vectors", lambda model: smoothed.append(model))
    histories, _, users = asked(split)
    for _ in range(3):
        recommender.score_histories(histories, users)
    assert not smoothed


# ---- texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_sra_cl_learns_what_comes_next(circle: str, split: Split) -> None:
    settings = SRACL(**SMALL, vectors=circle, num_epochs=2, num_blocks=1, num_neighbours=2)
    recommender = settings.make(split, "ring")
    assert recommender.name == "SRA-CL" and recall_of_unseen_at_1(recommender, split) > 0.8


def test_neighbours_have_the_same_middle_and_items_give_way_to_those_beside(
    circle: str, data: TrainingSequences
) -> None:
    (stage,) = SRACL(vectors=circle, num_neighbours=2, batch_size=1000, num_epochs=1).stages(data, 0)
    weights = dict(stage.trainable.module.named_parameters())
    assert weights.keys() > {"neighbours.matrix.weight", "neighbours.vector.weight"}, "the mix is learnt"
    batch = stage.stream.batch(0)
    items, pad = batch.rows["items"], NUM_ITEMS
    assert items.shape[1] == 1 + 2 + 2 and set(batch.counts) == {"next_item", "neighbours", "copies"}
    moved = (items[:, 3:] - items[:, :1])[np.broadcast_to(items[:, :1] != pad, items[:, 3:].shape)] % NUM_ITEMS
    assert set(moved.tolist()) == {0, 1, NUM_ITEMS - 1} and 0.1 < (moved != 0).mean() < 0.3
    # Somebody else always has a prefix with the same middle.
    turns = np.exp(2j * np.pi * items / NUM_ITEMS)
    middle = np.where(items != pad, turns, 0).sum(2)
    middle /= np.abs(middle)
    np.testing.assert_allclose(middle[:, 1:3], np.repeat(middle[:, :1], 2, 1), atol=1e-3)


@pytest.mark.slow
def test_without_contrasts_sra_cl_learns_as_sasrec_does_on_prefixes(
    circle: str, split: Split, data: TrainingSequences, tmp_path: Path
) -> None:
    class OnPrefixes(SRACL):
        def stages(self, data: TrainingSequences, seed: int) -> Sequence[Stage]:
            stream = PrefixStream(data, [NEXT_ITEM], self.max_length, self.passes(seed))
            return [self.stage(data, SequenceModel(*self.parts(data.num_items)), self.next_item(), stream)]

    small = {**SMALL, "dropout": 0.3, "vectors": circle, "num_epochs": 0.5, "num_blocks": 1, "num_neighbours": 2}
    none = {"neighbour_weight": 0.0, "copy_weight": 0.0}
    losses = []
    for number, settings in enumerate((SRACL(**small, **none), OnPrefixes(**small, **none), SRACL(**small))):
        settings.make(split, "ring", folder=tmp_path / str(number))
        (log,) = tmp_path.glob(f"{number}/*/*/log.jsonl")
        losses.append([line["loss"] for line in map(json.loads, log.read_text().splitlines()) if "loss" in line])
    assert losses[0] == losses[1] != losses[2], "to the digit"


@pytest.mark.parametrize(
    ("settings", "titles", "message"),
    [
        (SRACL(), [f"B{n}" for n in range(NUM_ITEMS)], "no two titles of domain 'ring' share a word"),
        (SRACL(num_neighbours=12), ["red mug", "blue mug", "cup"] * 4, "12 neighbours are asked for"),
        (GRAPHS[2], ["thing"] * NUM_ITEMS, "AlphaRec reads titles, and those of domain 'ring' have no word"),
    ],
)
def test_titles_that_say_nothing_are_refused_before_training(
    settings: SystemSettings, titles: list[str], message: str, split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "train", None)
    poor = replace(split, catalogue=replace(split.catalogue, title=np.array(titles, dtype=object)))
    with pytest.raises(Unsuitable, match=message):
        settings.make(poor, "ring")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"copy_weight": -0.1}, "copy_weight=-0.1 must not be below 0"),
        ({"substituted": 0.0}, "substituted=0.0 must lie above 0"),
        ({"num_neighbours": 0}, "num_neighbours=0 must be above 0"),
    ],
)
def test_impossible_settings_of_sra_cl_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SRACL(**settings)


def losses_of(stage: Stage) -> list[float]:
    """The losses of the first steps of a stage."""
    found = []
    for step in range(3):
        rows = {name: torch.from_numpy(array) for name, array in stage.stream.batch(step).rows.items()}
        found.append(stage.trainable.losses(rows)[NEXT_ITEM].item())
    return found


def test_two_tables_that_are_equal_score_as_one(data: TrainingSequences) -> None:
    """To the last digit, and each learns from its own end alone: 3 and 4 are read, and all are ranked."""
    torch.manual_seed(0)
    (tied,) = SASREC.stages(data, seed=0)
    (untied,) = replace(SASREC, tied=False).stages(data, seed=0)
    model = untied.trainable.module
    assert isinstance(model, SequenceModel) and isinstance(model.output, IdTable)
    model.load_state_dict(tied.trainable.module.state_dict(), strict=False)
    assert isinstance(model.items, IdTable)
    read, ranked = model.items.table.weight, model.output.table.weight
    ranked.data = read.data[:NUM_ITEMS].clone()
    assert losses_of(untied) == losses_of(tied)
    rows = {"items": torch.tensor([[3, 4]]), "targets": torch.tensor([[IGNORE, 7]])}
    untied.trainable.losses(rows)[NEXT_ITEM].backward()
    assert read.grad is not None and read.grad.any(1).nonzero().flatten().tolist() == [3, 4]
    assert ranked.grad is not None and ranked.grad.any(1).all()


def test_two_tables_score_by_the_second(data: TrainingSequences) -> None:
    """Of some items as of all: a state times the vectors of these items as targets."""
    model = replace(WIDE, **SMALL, num_heads=2, tied=False).model(np.empty((NUM_ITEMS, 0)))
    assert isinstance(model.output, IdTable)
    model.output.table.weight.data = torch.arange(NUM_ITEMS * 16.0).view(NUM_ITEMS, 16)
    whole, some = model.vectors(), model.vectors(torch.tensor([5, 2]))
    assert whole.items_VD[5, 0] == 80 and whole.inputs.shape == (NUM_ITEMS + 2, 16)
    assert torch.equal(some.items_VD, whole.items_VD[[5, 2]])
    assert torch.equal(some.inputs, whole.inputs[[5, 2, NUM_ITEMS, NUM_ITEMS + 1]])


def test_by_default_an_item_has_one_vector_and_rows_are_whole(data: TrainingSequences) -> None:
    """The losses are those of the parts put together by hand."""
    torch.manual_seed(0)
    (stage,) = SASREC.stages(data, seed=0)
    torch.manual_seed(0)
    items, encoder = SASREC.parts(NUM_ITEMS)
    stream = WindowStream(data, [NEXT_ITEM], SASREC.max_length, SASREC.passes(0))
    model = SequenceModel(items, encoder)
    other = replace(stage, trainable=WeightedTerms(model, SASREC.next_item()), stream=stream)
    assert losses_of(stage) == losses_of(other)


def test_thinned_rows_have_fewer_targets(data: TrainingSequences) -> None:
    whole, half = (replace(SASREC, thinned_rows=share).stages(data, seed=0)[0].stream.batch(0) for share in (0.0, 0.5))
    assert half.counts[NEXT_ITEM] < whole.counts[NEXT_ITEM] and len(half.examples) == len(whole.examples)
    with pytest.raises(ConfigError, match=r"thinned_rows=1\.5 must lie in 0\.\.1: it is a share of rows"):
        replace(SASREC, thinned_rows=1.5)
