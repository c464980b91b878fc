"""The one training loop, for continual pre-training and fine-tuning alike: they differ in data, mask and schedule."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from cprec import distributed
from cprec.errors import TrainingError
from cprec.progress import say, track
from cprec.text.stream import IGNORE, Batch
from cprec.train.checkpoint import Kind, TrainState, load_checkpoint, save_checkpoint
from cprec.train.loss import as_loss
from cprec.train.training import LOG, read_log


class Stream(Protocol):
    """What is trained on: batches, each a pure function of its step."""

    @property
    def num_steps(self) -> int: ...

    @property
    def num_tokens(self) -> int:
        """Of all steps."""
        ...

    def batch(self, step: int) -> Batch: ...

    def mixture_asked(self) -> Mapping[str, float]:
        """The share of each group, by name; of what is no mixture, one or none."""
        ...

    def mixture_until(self, step: int) -> Mapping[str, float]:
        """The shares in the steps before `step`."""
        ...


def make_optimizer(model: torch.nn.Module, *, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (0.9, 0.95); matrices decay, norms and biases do not. The learning rate is set at each step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, betas=(0.9, 0.95), fused=True)


def summed_loss(model: Any, batch: Batch, device: torch.device, bf16: bool) -> torch.Tensor:
    """Cross-entropy summed over the batch's targets, in nats."""
    return as_loss(model, bf16).of(batch, device)


@torch.no_grad()
def perplexity(model: Any, batches: Iterable[Batch], device: torch.device, bf16: bool) -> float:
    """exp of the mean cross-entropy over all targets; infinite if it overflows, NaN without targets.

    Each process reads its share of the rows of every batch; all get the same answer.
    """
    loss = as_loss(model, bf16)
    was_training = loss.training
    loss.eval()
    total, count = torch.zeros((), device=device, dtype=torch.float64), 0
    for batch in batches:
        for part in split_rows(batch, 1, distributed.rank(), distributed.num_ranks()):
            total += loss.of(part, device)
        count += batch.num_targets
    loss.train(was_training)
    mean = distributed.sum_over_ranks(total).item() / count if count else math.nan
    return math.exp(min(mean, 700.0))


def train(
    model: Any,
    stream: Stream,
    schedule: Callable[[int], float],
    *,
    output_dir: Path,
    num_accumulation: int,
    weight_decay: float,
    max_grad_norm: float,
    bf16: bool,
    save_steps: int,
    save_total_limit: int,
    logging_steps: int,
    eval_steps: int,
    validate: Callable[[], Mapping[str, Any]],
    resume_from: Path | None,
    description: str,
    start_from: Path | None = None,
    seed: int = 0,
    keep_at: Sequence[int] = (),
    report: Callable[[Mapping[str, Any]], None] | None = None,
    mfu: Callable[[float], float] | None = None,
) -> TrainState:
    """Train to the end of the stream, from a checkpoint if one is given; returns the final state.

    `model` is a causal language model, its PackedLoss, or any module with a `model` and its summed loss `of` a batch.
    Each stream batch is one optimizer step. Its rows are shared out over the processes and cut into `num_accumulation`
    micro-batches in all; its loss is the sum over all targets divided by their number, so accumulation and processes
    change nothing but memory and time. `resume_from` restores weights, optimizer and state; without it `start_from`
    restores weights and optimizer alone. `seed` decides what is random inside a step (dropout, negatives).

    Every `logging_steps` steps a line goes to `log.jsonl`; every `eval_steps`, and at the end, what `validate()`
    measures; every `save_steps` a checkpoint is written. After the steps named in `keep_at` (the end of the stable
    phase, say) it is called `stable-<step>` and stays. `report` is called with every line of the log; `mfu` makes of
    tokens a second the share of the machine's arithmetic that is used. The first process alone writes. Ctrl-C and
    SIGTERM, in any process, let the step finish, save, and raise KeyboardInterrupt in all.

    Raises TrainingError if a loss or gradient norm is not finite, another process is lost or the log cannot be written,
    and CheckpointError if a checkpoint cannot be written. All leave the last checkpoint as it was.
    """
    loss_of = as_loss(model, bf16)
    device = next(loss_of.parameters()).device
    optimizer = make_optimizer(loss_of.model, weight_decay=weight_decay)
    begin = resume_from or start_from
    found = load_checkpoint(begin, loss_of.model, optimizer) if begin else TrainState()
    state = found if resume_from else TrainState()
    log = _Log(output_dir / LOG, state, report)
    loss_of.train()
    parameters = [p for p in loss_of.parameters() if p.requires_grad]
    sharded = distributed.is_sharded(loss_of)
    rank, num_ranks = distributed.rank(), distributed.num_ranks()
    num_steps, asked = stream.num_steps, stream.mixture_asked()
    mixed = len(asked) > 1

    def save() -> Path:
        kind: Kind = "stable" if state.step in keep_at else "checkpoint"
        return save_checkpoint(output_dir, state, loss_of.model, optimizer, save_total_limit, kind=kind)

    with (
        distributed.naming_lost_processes(),
        _stop_requests() as stop,
        track(stream.num_tokens, description, unit="tokens", completed=state.num_tokens) as progress,
    ):
        _check_same_plan(stream, state)
        if state.step == 0:
            log.write(step=0, tokens=0, **validate(), **({"mixture_asked": asked} if mixed else {}))
        for step in range(state.step, num_steps):
            start = time.perf_counter()
            learning_rate = schedule(step)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            torch.manual_seed(step_seed(seed, step, rank))  # dropout and the like depend on these alone
            batch = stream.batch(step)
            num_targets = batch.num_targets  # of all processes: each of them knows the whole step
            summed = torch.zeros((), device=device)
            for part in split_rows(batch, num_accumulation, rank, num_ranks):
                part_loss = loss_of.of(part, device) / num_targets
                (part_loss * num_ranks if sharded else part_loss).backward()  # sharding averages gradients: undo it
                summed += part_loss.detach()
            if not sharded:
                distributed.sum_gradients(parameters)
            norm = distributed.whole(torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm))
            loss, stopping = distributed.sum_over_ranks(torch.stack([summed, summed.new_tensor(len(stop))])).tolist()
            _check_finite(step, loss, norm.item(), learning_rate, output_dir)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seconds = time.perf_counter() - start
            state = state.advance(batch.documents.tobytes(), batch.num_tokens, num_targets, seconds)
            rate = state.num_tokens / max(state.seconds, 1e-9)
            used = {"mfu": mfu(rate)} if mfu else {}
            shown = {name: f"{value:.0%}" for name, value in used.items()}
            progress.advance(batch.num_tokens, loss=f"{loss:.3f}", lr=f"{learning_rate:.2e}", **shown)
            if state.step % logging_steps == 0 or state.step in (1, num_steps):
                log.write(
                    step=state.step,
                    tokens=state.num_tokens,
                    loss=loss,
                    learning_rate=learning_rate,
                    grad_norm=norm.item(),
                    tokens_per_second=rate,
                    consumed=state.consumed,
                    **used,
                    **({"mixture": stream.mixture_until(state.step)} if mixed else {}),
                )
            if state.step % eval_steps == 0 or state.step == num_steps or state.step in keep_at:
                log.write(step=state.step, tokens=state.num_tokens, **validate())
            if state.step in keep_at or (state.step < num_steps and (stopping or state.step % save_steps == 0)):
                saved = save()
                if stopping and state.step < num_steps:
                    say(f"stopped after step {state.step:,} of {num_steps:,}, saved as {saved}")
                    raise KeyboardInterrupt
    return state


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """What torch is seeded with in a step of a run, by one process: a number that torch takes, whatever the seed.

    >>> step_seed(0, 7), step_seed(0, 7, rank=1) == 7 + 2**32, 0 <= step_seed(10**30, 7) < 2**63
    (7, True, True)
    """
    return (step + (rank << 32) + seed * 0x9E3779B97F4A7C15) % 2**63  # an odd number spreads seeds over all bits


def _check_same_plan(stream: Stream, state: TrainState) -> None:
    """Raises TrainingError where processes would train on different data or from different checkpoints."""
    first = stream.batch(0).documents.tolist() if stream.num_steps else []
    if not distributed.all_equal(repr((stream.num_steps, stream.num_tokens, first, state.step, state.consumed))):
        raise TrainingError(
            "the processes of this run do not read the same data or resume from the same checkpoint: give all of them "
            "the same command, data folder and output_dir (on a file system that all machines share)"
        )


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Collects Ctrl-C and SIGTERM, so that the step under way can finish; a second signal acts at once.

    Except under torchrun, which passes on to its processes what the terminal has sent them already.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # signals only reach the main thread
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: Any) -> None:
        received.append(number)
        if distributed.num_ranks() == 1:
            for each, handler in before.items():
                signal.signal(each, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def split_rows(batch: Batch, parts: int, rank: int = 0, num_ranks: int = 1) -> list[Batch]:
    """This rank's rows of a step as micro-batches of whole rows; all ranks together have about `parts`.

    Ranks have equally many micro-batches, since sharded ones work in step: one that is left without rows gets a row
    without targets. Documents and token counts stay with the step's batch.
    """
    longest = -(-len(batch.input_ids_RT) // num_ranks)
    pieces = min(-(-parts // num_ranks), longest)
    arrays = (batch.input_ids_RT, batch.position_ids_RT, batch.targets_RT)
    shares = [np.array_split(np.array_split(array, num_ranks)[rank], pieces) for array in arrays]
    micro_batches = []
    for ids, positions, targets in zip(*shares, strict=True):
        if not len(ids):
            ids, positions = batch.input_ids_RT[:1], batch.position_ids_RT[:1]
            targets = np.full_like(batch.targets_RT[:1], IGNORE)
        micro_batches.append(Batch(ids, positions, targets, 0, batch.documents[:0]))
    return micro_batches


def _check_finite(step: int, loss: float, norm: float, learning_rate: float, output_dir: Path) -> None:
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise TrainingError(
            f"step {step}: loss {loss:g}, gradient norm {norm:g} at learning rate {learning_rate:g} are not finite. "
            f"The weights of the last checkpoint in {output_dir} are intact: go on from them with a lower "
            "learning_rate (model_name_or_path=that checkpoint, another output_dir), or start the same command again "
            "if the machine "
            "is to blame"
        )


class _Log:
    """JSON lines of the first process; on resume the lines of steps that will be run again are dropped."""

    def __init__(self, path: Path, state: TrainState, report: Callable[[Mapping[str, Any]], None] | None) -> None:
        self._path, self._report = path, report
        if not distributed.is_first():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if state.step and path.is_file():
            kept = [line for line in read_log(path) if line["step"] <= state.step]
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def write(self, **fields: Any) -> None:
        if not distributed.is_first():
            return
        try:
            with open(self._path, "a") as file:
                file.write(json.dumps(fields) + "\n")
        except OSError as error:
            raise TrainingError(
                f"{self._path} could not be written ({error}): make room, then start the same command again to resume "
                "from the last checkpoint"
            ) from error
        if self._report:
            self._report(fields)
