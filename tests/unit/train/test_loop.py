from __future__ import annotations

import errno
import json
import os
import re
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from cprec.batch import IGNORE, Batch
from cprec.errors import CheckpointError, TrainingError
from cprec.text.shards import Shards
from cprec.text.stream import NEXT_TOKEN, TokenStream
from cprec.train.checkpoint import TrainState, checkpoints, load_checkpoint, newest_intact
from cprec.train.folder import LOG, read_log
from cprec.train.loop import perplexity, step_seed
from cprec.train.loss import PackedLoss
from cprec.train.trainable import make_optimizer

GOLDEN = Path(__file__).parents[2] / "golden" / "loss_curve.json"

Run = Callable[..., tuple[TrainState, Any]]
MakeStream = Callable[..., TokenStream]
MakeModel = Callable[..., Any]


def summed_loss(model: Any, batch: Batch) -> torch.Tensor:
    rows = {name: torch.from_numpy(array) for name, array in batch.rows.items()}
    return PackedLoss(model).losses(rows)[NEXT_TOKEN]


def losses(folder: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_log(folder / LOG) if "loss" in line}


def same_weights(first: Any, second: Any) -> bool:
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@pytest.fixture(scope="module")
def usual(run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainState, Any, Path]:
    """A run that nothing disturbs: its final state, its model and its folder."""
    folder = tmp_path_factory.mktemp("usual") / "whole"
    return *run(folder), folder


# ---- what is learnt --------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_every_document_alone(
    make_model: MakeModel, make_stream: MakeStream, shards: Shards
) -> None:
    model, batch = make_model(), make_stream().batch(1)
    expected, count = 0.0, 0
    for document in batch.examples:
        ids = torch.from_numpy(shards.rows[document].astype(np.int64))
        logits = model(input_ids=ids[None]).logits[0]
        expected += cross_entropy(logits[:-1], ids[1:], reduction="sum").item()
        count += len(ids) - 1
    assert count == batch.counts[NEXT_TOKEN]
    assert summed_loss(model, batch).item() == pytest.approx(expected, rel=1e-5)
    assert perplexity(PackedLoss(model), [batch]) == pytest.approx(np.exp(expected / count), rel=1e-5)


def test_perplexity_weighs_targets_and_leaves_the_model_as_it_was(
    make_model: MakeModel, make_stream: MakeStream
) -> None:
    model, stream = make_model(), make_stream(rows_per_step=3)
    batches = [stream.batch(0), stream.batch(stream.num_steps - 1)]
    sums = [summed_loss(model, batch).item() for batch in batches]
    model.train()
    got = perplexity(PackedLoss(model), batches)
    assert got == pytest.approx(np.exp(sum(sums) / sum(batch.counts[NEXT_TOKEN] for batch in batches)))
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    assert np.isnan(perplexity(PackedLoss(model), []))


def test_only_targets_count(make_model: MakeModel, make_stream: MakeStream) -> None:
    batch = make_stream(targets_only=True).batch(0)
    model = make_model()
    ids, positions = torch.from_numpy(batch.rows["input_ids"]), torch.from_numpy(batch.rows["position_ids"])
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    targets = torch.from_numpy(batch.rows["targets"])
    expected = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    assert summed_loss(model, batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_matrices_decay_and_vectors_do_not(make_model: MakeModel) -> None:
    model = make_model()
    decayed, kept = make_optimizer(PackedLoss(model), weight_decay=0.3).param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    assert {p.ndim for p in decayed["params"]} == {2} and {p.ndim for p in kept["params"]} == {1}
    assert len(decayed["params"]) + len(kept["params"]) == len(list(model.parameters()))


def test_the_memory_of_squared_gradients_can_be_chosen(make_model: MakeModel) -> None:
    loss = PackedLoss(make_model())
    assert make_optimizer(loss, weight_decay=0.0).defaults["betas"] == (0.9, 0.95)
    assert make_optimizer(loss, weight_decay=0.0, beta2=0.999).defaults["betas"] == (0.9, 0.999)


def test_micro_batches_are_the_rows_of_the_step(make_stream: MakeStream) -> None:
    batch = make_stream(rows_per_step=5).batch(0)
    for max_rows, num_parts in ((0, 1), (9, 1), (3, 2), (1, 5)):
        pieces = batch.micro_batches(max_rows)
        assert len(pieces) == num_parts
        for name, rows in batch.rows.items():
            assert np.array_equal(np.concatenate([piece[name] for piece in pieces]), rows)


def test_accumulation_changes_nothing_but_memory(run: Run, make_stream: MakeStream, tmp_path: Path) -> None:
    models = {}
    for rows in (8, 1):
        _, models[rows] = run(tmp_path / str(rows), stream=make_stream(rows_per_step=8), micro_batch_size=rows)
    whole, cut = losses(tmp_path / "8"), losses(tmp_path / "1")
    assert list(whole) == list(cut) == list(range(1, len(whole) + 1))
    assert list(cut.values()) == pytest.approx(list(whole.values()), rel=1e-4)
    for one, other in zip(models[8].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_the_loss_curve_is_the_golden_one(run: Run, make_stream: MakeStream, shards: Shards, tmp_path: Path) -> None:
    stream = make_stream(rows_per_step=2, num_tokens=int(1.66 * shards.manifest["num_tokens"]))
    run(tmp_path, stream=stream)
    curve = [round(loss, 5) for loss in losses(tmp_path).values()]
    assert len(curve) == 50
    if os.environ.get("CPREC_WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps(curve) + "\n")
    assert curve == pytest.approx(json.loads(GOLDEN.read_text()), rel=2e-3)
    assert curve[-1] < 0.6 * curve[0]


class TwoTerms(PackedLoss):
    """The usual loss, and the sum of squares of the hidden states' gains, which each micro-batch adds once."""

    def losses(self, rows: Any) -> dict[str, torch.Tensor]:
        gains = sum(p.square().sum() for p in self.module.parameters() if p.ndim == 1)
        return {**super().losses(rows), "gains": gains * len(rows["targets"])}


class TwoCounts:
    """A stream whose batches count the rows as well."""

    def __init__(self, stream: TokenStream) -> None:
        self.num_steps, self.num_tokens, self._stream = stream.num_steps, stream.num_tokens, stream

    def batch(self, step: int) -> Batch:
        batch = self._stream.batch(step)
        return replace(batch, counts={**batch.counts, "gains": batch.num_rows})


def test_each_term_is_divided_by_its_own_count(
    run: Run, make_model: MakeModel, make_stream: MakeStream, tmp_path: Path
) -> None:
    for rows in (3, 1):
        model, stream = make_model(), TwoCounts(make_stream(rows_per_step=3))
        run(tmp_path / str(rows), trainable=TwoTerms(model), model=model, stream=stream, micro_batch_size=rows)
    whole, cut = (read_log(tmp_path / rows / LOG)[1] for rows in "31")
    expected = sum(p.square().sum().item() for p in make_model().parameters() if p.ndim == 1)
    for line in (whole, cut):
        assert line["losses"]["gains"] == pytest.approx(expected)
        assert line["loss"] == pytest.approx(sum(line["losses"].values()))
    assert cut["losses"]["next_token"] == pytest.approx(whole["losses"]["next_token"])


def test_what_is_optimised_is_what_is_saved(make_model: MakeModel) -> None:
    class Partial(PackedLoss):
        def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
            return super().parameter_groups(weight_decay)[:1]

    with pytest.raises(ValueError, match=r"each trainable parameter of its module once: left out .*norm"):
        make_optimizer(Partial(make_model()), weight_decay=0.1)


def test_an_error_in_a_stream_ends_the_run_and_its_thread(run: Run, make_stream: MakeStream, tmp_path: Path) -> None:
    class Broken(TwoCounts):
        def batch(self, step: int) -> Batch:
            if step == 3:
                raise OSError("the disk is gone")
            return self._stream.batch(step)

    with pytest.raises(OSError, match="the disk is gone"):
        run(tmp_path, stream=Broken(make_stream()))
    assert list(losses(tmp_path)) == [1, 2, 3]
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("batches")]


# ---- the log ---------------------------------------------------------------------------------------------------------


def test_the_log_tells_of_steps_and_held_out_measurements(run: Run, make_stream: MakeStream, tmp_path: Path) -> None:
    stream, measured = make_stream(), iter(range(100))
    state, _ = run(
        tmp_path, stream=stream, logging_steps=4, eval_steps=6, validate=lambda: {"heldout": {"books": next(measured)}}
    )
    log = read_log(tmp_path / LOG)
    last = stream.num_steps
    assert state.step == last
    steps = sorted({1, *range(4, last + 1, 4), last})
    assert [line["step"] for line in log if "loss" in line] == steps
    heldout = {line["step"]: line["heldout"]["books"] for line in log if "heldout" in line}
    assert heldout == {step: number for number, step in enumerate(sorted({0, *range(6, last + 1, 6), last}))}
    tokens = np.cumsum([stream.batch(step).num_tokens for step in range(last)])
    for line in log:
        assert line["tokens"] == (tokens[line["step"] - 1] if line["step"] else 0)
    end = [line for line in log if "loss" in line][-1]
    assert end["tokens"] == stream.num_tokens == state.num_tokens
    assert end["tokens_per_second"] == pytest.approx(state.num_tokens / state.seconds)
    assert end["learning_rate"] == pytest.approx(1e-3)
    assert end["consumed"] == state.consumed


def test_resuming_drops_what_will_be_run_again(run: Run, tmp_path: Path) -> None:
    run(tmp_path, eval_steps=3, validate=lambda: {"heldout": {"books": 1.0}})
    before = (tmp_path / LOG).read_text()
    first = checkpoints(tmp_path)[0]
    with open(tmp_path / LOG, "a") as file:
        file.write('{"step": 99, "los')  # a kill while a line was written
    run(tmp_path, eval_steps=3, validate=lambda: {"heldout": {"books": 1.0}}, resume_from=first)

    def without_times(text: str) -> list[dict[str, Any]]:
        return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_second"} for line in text.splitlines()]

    assert without_times((tmp_path / LOG).read_text()) == without_times(before)


# ---- interruptions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bf16", [False, True])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    run: Run, make_model: MakeModel, tmp_path: Path, bf16: bool
) -> None:
    state, whole = run(tmp_path / "whole", bf16=bf16)
    for checkpoint in checkpoints(tmp_path / "whole"):
        folder = tmp_path / checkpoint.name
        again, resumed = run(folder, bf16=bf16, model=make_model(seed=5), resume_from=checkpoint)
        assert same_weights(whole, resumed)
        assert (again.step, again.consumed, again.num_targets) == (state.step, state.consumed, state.num_targets)
        expected = losses(tmp_path / "whole")
        assert losses(folder) == {step: expected[step] for step in losses(folder)}


def test_dropout_is_resumed_too(run: Run, make_model: MakeModel, tmp_path: Path) -> None:
    def dropping() -> Any:
        model = make_model()
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.3
        return model

    _, whole = run(tmp_path / "whole", model=dropping())
    torch.rand(3)  # another process has another random state
    checkpoint = checkpoints(tmp_path / "whole")[0]
    _, resumed = run(tmp_path / "resumed", model=dropping(), resume_from=checkpoint)
    assert same_weights(whole, resumed)


class Interrupted(PackedLoss):
    """A trainable whose process gets a signal while a step is under way, 1 being the first."""

    def __init__(self, model: Any, number: int, at: int) -> None:
        super().__init__(model)
        self._number, self._steps_left = number, at

    def losses(self, rows: Any) -> Any:
        self._steps_left -= 1
        if self._steps_left == 0:
            os.kill(os.getpid(), self._number)
        return super().losses(rows)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_finish_and_saves(
    run: Run,
    make_model: MakeModel,
    usual: tuple[TrainState, Any, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    number: int,
) -> None:
    _, whole, folder = usual
    model = make_model()
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", model=model, trainable=Interrupted(model, number, at=7))
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    newest = checkpoints(tmp_path / "cut")[-1]
    assert newest.name == "checkpoint-7"
    assert re.search(rf"stopped after step 7 of \d+, saved as {newest}\n", capfd.readouterr().err)
    _, resumed = run(tmp_path / "cut", resume_from=newest)
    assert same_weights(whole, resumed)
    assert losses(tmp_path / "cut") == losses(folder)


def test_a_signal_in_the_last_step_reaches_the_caller(
    run: Run, make_model: MakeModel, usual: tuple[TrainState, Any, Path], tmp_path: Path
) -> None:
    state, whole, folder = usual
    model = make_model()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", model=model, trainable=Interrupted(model, signal.SIGTERM, at=state.step))
    newest = checkpoints(tmp_path / "cut")[-1]
    assert newest.name == f"checkpoint-{state.step}"
    again, resumed = run(tmp_path / "cut", resume_from=newest)
    assert same_weights(whole, resumed) and (again.step, again.consumed) == (state.step, state.consumed)
    assert losses(tmp_path / "cut") == losses(folder)


def test_a_loss_that_is_not_finite_stops_the_run(run: Run, make_model: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"step 7: loss .* at learning rate .* checkpoint in .* are intact: go on"):
        run(tmp_path, schedule=lambda step: 1e-3 if step < 6 else 1e38)
    (checkpoint,) = checkpoints(tmp_path)
    model = make_model(seed=3)
    assert load_checkpoint(checkpoint, model, make_optimizer(PackedLoss(model), weight_decay=0.1)).step == 5
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    _, whole = run(tmp_path / "whole", schedule=lambda step: 1e-3)
    _, resumed = run(tmp_path, schedule=lambda step: 1e-3, resume_from=newest_intact(tmp_path))
    assert same_weights(whole, resumed)


@pytest.mark.parametrize("quiet", ["logging_steps", "eval_steps", "save_steps"])
def test_nothing_is_made_from_weights_that_are_not_finite(run: Run, tmp_path: Path, quiet: str) -> None:
    """The loss is looked at only now and then; by then the first bad step is still known."""
    validated: list[int] = []
    often = {"logging_steps": 1000, "eval_steps": 1000, "save_steps": 1000} | {quiet: 9}
    with pytest.raises(TrainingError, match=r"step [67]: .* not finite"):
        run(
            tmp_path,
            schedule=lambda step: 1e-3 if step < 6 else 1e38,
            validate=lambda: validated.append(1) or {},
            **often,
        )
    assert not checkpoints(tmp_path) and validated == [1], "validated before the first step, and never again"
    assert [line["step"] for line in read_log(tmp_path / LOG)] == [0, 1]


def test_the_end_of_the_stable_phase_is_kept(run: Run, make_model: MakeModel, tmp_path: Path) -> None:
    state, whole = run(tmp_path / "whole", save_total_limit=1, stable_step=7)
    newest = (state.step - 1) // 5 * 5  # the last step saves only what is kept
    assert [path.name for path in checkpoints(tmp_path / "whole")] == ["stable-7", f"checkpoint-{newest}"]
    _, forked = run(tmp_path / "fork", model=make_model(seed=5), resume_from=tmp_path / "whole" / "stable-7")
    assert same_weights(whole, forked)
    run(tmp_path / "end", save_steps=1000, stable_step=state.step)
    assert [path.name for path in checkpoints(tmp_path / "end")] == [f"stable-{state.step}"]


# ---- full disks ------------------------------------------------------------------------------------------------------


def no_room(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "what", ["weights", *(pytest.param(each, marks=pytest.mark.slow) for each in ("optimizer", "state")), "flush"]
)
def test_a_full_disk_leaves_the_older_checkpoint(
    run: Run,
    make_model: MakeModel,
    usual: tuple[TrainState, Any, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
) -> None:
    def fill_up() -> dict[str, float]:  # called after step 8, before the second checkpoint
        if checkpoints(tmp_path):
            target = {
                "weights": (type(make_model()), "save_pretrained"),
                "optimizer": (torch, "save"),
                "state": (Path, "write_text"),
                "flush": (os, "fsync"),
            }[what]
            monkeypatch.setattr(*target, no_room)
        return {}

    with pytest.raises(
        CheckpointError, match=r"checkpoint-10 could not be written .*No space left.*earlier checkpoints"
    ):
        run(tmp_path, eval_steps=8, logging_steps=1000, validate=fill_up)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-5", LOG]
    assert newest_intact(tmp_path) == tmp_path / "checkpoint-5"
    _, resumed = run(tmp_path, resume_from=tmp_path / "checkpoint-5")
    assert same_weights(usual[1], resumed)


def test_a_full_disk_where_the_log_is_says_so(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill_up() -> dict[str, float]:
        monkeypatch.setattr("builtins.open", no_room)
        return {}

    with pytest.raises(TrainingError, match=r"log.jsonl could not be written \(.*No space left.*make room"):
        run(tmp_path, validate=fill_up)


@pytest.mark.parametrize("limit", [2_000, 30_000, 60_000])
def test_a_write_that_the_system_refuses_is_a_checkpoint_error(run: Run, tmp_path: Path, limit: int) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_up() -> dict[str, float]:
        if checkpoints(tmp_path):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        return {}

    try:
        with pytest.raises(CheckpointError, match=r"checkpoint-10 could not be written"):
            run(tmp_path, eval_steps=8, logging_steps=1000, validate=fill_up)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-5", LOG]


def test_steps_of_other_seeds_and_processes_are_seeded_otherwise() -> None:
    seeds = {step_seed(seed, step, rank) for seed in (0, 1, 65_536, 2**62) for step in (0, 1) for rank in (0, 1)}
    assert len(seeds) == 16
    for seed in seeds:
        torch.manual_seed(seed)  # takes every one
