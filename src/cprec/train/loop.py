"""The one training loop, for language models and sequential recommenders alike: they differ in batches and losses."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cprec import distributed
from cprec.batch import Batch
from cprec.errors import TrainingError
from cprec.progress import say, track
from cprec.train.checkpoint import Kind, TrainState, load_checkpoint, save_checkpoint
from cprec.train.folder import LOG, METRIC, read_log
from cprec.train.trainable import Stream, Trainable, make_optimizer

GOLDEN_RATIO = 0x9E3779B97F4A7C15
"""2**64 divided by the golden ratio, an odd number: multiples of it spread neighbouring seeds over all 64 bits."""


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """How a step changes the weights."""

    weight_decay: float
    """AdamW's decay, of the parameters that decay."""
    max_grad_norm: float
    """Gradients are scaled down to this norm."""
    beta2: float = 0.95
    """AdamW's memory of squared gradients: about 1 / (1 - beta2) steps."""
    micro_batch_size: int = 0
    """Rows of a micro-batch in one process, at most; 0: all that the process has."""
    seed: int = 0
    """Decides what is random within a step: dropout, negatives."""


@dataclass(frozen=True, kw_only=True)
class Cadence:
    """After how many steps the loop logs, validates and saves."""

    logging_steps: int
    eval_steps: int
    save_steps: int
    save_total_limit: int
    """The newest checkpoints that are kept."""
    stable_step: int | None = None
    """After this step the checkpoint is called `stable-<step>` and stays."""

    def after(self, step: int, num_steps: int) -> tuple[bool, bool, bool]:
        """Whether to log, to validate and to save after a step, 1 being the first.

        The first and last are logged. The last is validated, but not saved: the caller has the model itself.
        """
        is_stable, is_last = step == self.stable_step, step == num_steps
        return (
            is_last or step == 1 or step % self.logging_steps == 0,
            is_last or is_stable or step % self.eval_steps == 0,
            is_stable or (not is_last and step % self.save_steps == 0),
        )


def train(
    trainable: Trainable,
    stream: Stream,
    schedule: Callable[[int], float],
    *,
    output_dir: Path,
    optimisation: Optimisation,
    cadence: Cadence,
    validate: Callable[[], Mapping[str, Any]],
    description: str,
    resume_from: Path | None = None,
    start_from: Path | None = None,
    probe: Callable[[TrainState], Mapping[str, Any]] = lambda state: {},
    log_fields: Callable[[TrainState], Mapping[str, Any]] = lambda state: {},
    report: Callable[[Mapping[str, Any]], None] | None = None,
) -> TrainState:
    """Train to the end of the stream, from a checkpoint if one is given; returns the final state.

    Each batch is one optimizer step, at the rate `schedule(step)`. Its rows are shared out over the processes and cut
    into micro-batches; each loss term is its sum over all rows divided by its count, so accumulation and processes
    change nothing but memory and time. `resume_from` restores weights, optimizer and state; without it `start_from`
    restores weights and optimizer alone.

    `log.jsonl` gets a line with the loss as often as `cadence` says (with `log_fields(state)`, also at step 0), and one
    with what `validate()` and `probe(state)` measure, which all processes call; `report` is called with every line. The
    first process alone writes. The loop waits for the device only when it logs, validates or saves. Ctrl-C and SIGTERM,
    in any process, let the step finish, save, and raise KeyboardInterrupt in all processes, after the last step too.

    Raises TrainingError if a loss, gradient norm or weight is not finite (before anything is validated or saved from
    it), another process is lost or the log cannot be written, and CheckpointError if a checkpoint cannot be written.
    All leave the last checkpoint as it was.
    """
    optimizer = make_optimizer(trainable, weight_decay=optimisation.weight_decay, beta2=optimisation.beta2)
    restore_from, state = resume_from or start_from, TrainState()
    if restore_from:
        found = load_checkpoint(restore_from, trainable.module, optimizer)
        state = found if resume_from else state
    log, num_steps = _Log(output_dir / LOG, state, report), stream.num_steps
    update = _Update(trainable, optimizer, optimisation, output_dir)
    trainable.module.train()
    with (
        distributed.naming_lost_processes(),
        _stop_requests() as stop,
        track(stream.num_tokens, description, unit="tokens", completed=state.num_tokens) as progress,
        _prepared(stream, state.step) as batches,
    ):
        _check_same_plan(stream, state)
        if state.step == 0:
            log.write(step=0, tokens=0, **validate(), **probe(state), **log_fields(state))
        start = time.perf_counter()
        for batch in batches:
            learning_rate = schedule(state.step)
            update(state.step, batch, learning_rate)
            step = state.step + 1
            logs, validates, saves = cadence.after(step, num_steps)
            measured = update.measured() if logs or validates or saves else {}
            seconds = time.perf_counter() - start
            state = state.advance(batch.examples.tobytes(), batch.num_tokens, sum(batch.counts.values()), seconds)
            more = log_fields(state) if logs else {}
            progress.advance(batch.num_tokens, lr=f"{learning_rate:.2e}", **_shown({**measured, **more}))
            if logs:
                rate = state.num_tokens / max(state.seconds, 1e-9)
                about = {"tokens_per_second": rate, "consumed": state.consumed, **more}
                log.write(step=step, tokens=state.num_tokens, **measured, **about)
            if validates:
                validated = {**validate(), **probe(state)}
                log.write(step=step, tokens=state.num_tokens, **validated)
                progress.advance(0, **_shown(validated))
            stopping = distributed.any_rank(bool(stop))
            if saves or stopping:
                update.measured()
                kind: Kind = "stable" if step == cadence.stable_step else "checkpoint"
                saved = save_checkpoint(output_dir, state, trainable, optimizer, cadence.save_total_limit, kind=kind)
            if stopping:
                say(f"stopped after step {step:,} of {num_steps:,}, saved as {saved}")
                raise KeyboardInterrupt
            start = time.perf_counter()
    return state


@torch.no_grad()
def perplexity(trainable: Trainable, batches: Iterable[Batch]) -> float:
    """exp of the mean loss of a trainable with one term; infinite if it overflows, NaN without targets.

    Each process reads its share of the rows of every batch; all get the same answer.
    """
    module = trainable.module
    device, was_training = next(module.parameters()).device, module.training
    module.eval()
    total, count = torch.zeros((), device=device, dtype=torch.float64), 0
    for batch in batches:
        for rows in batch.micro_batches(0, distributed.rank(), distributed.num_ranks()):
            total += sum(trainable.losses(distributed.to_device(rows, device)).values())
        count += sum(batch.counts.values())
    module.train(was_training)
    mean = distributed.sum_over_ranks(total).item() / count if count else math.nan
    return math.exp(min(mean, 700.0))


class _Update:
    """One optimizer step after the other. What they measure stays on the device until it is asked for."""

    def __init__(
        self, trainable: Trainable, optimizer: torch.optim.Optimizer, settings: Optimisation, output_dir: Path
    ) -> None:
        self._trainable, self._optimizer, self._settings, self._output_dir = trainable, optimizer, settings, output_dir
        self._parameters = [weight for weight in trainable.module.parameters() if weight.requires_grad]
        self._device = self._parameters[0].device
        self._is_sharded = distributed.is_sharded(trainable.module)
        # The first step whose loss or gradient norm was not finite, with its loss, norm and learning rate; -1: none.
        self._first_bad = torch.full((4,), -1.0, dtype=torch.float64, device=self._device)

    def __call__(self, step: int, batch: Batch, learning_rate: float) -> None:
        """Compute losses and gradients over all rows of a batch, and change the weights."""
        torch.manual_seed(step_seed(self._settings.seed, step, distributed.rank()))  # of dropout and the like
        terms = self._backward(batch)
        if not self._is_sharded:
            distributed.sum_gradients(self._parameters)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._settings.max_grad_norm)
        self._norm, self._learning_rate, self._step = distributed.whole(norm), learning_rate, step
        self._terms = dict(zip(terms, distributed.sum_over_ranks(torch.stack([*terms.values()])), strict=True))
        self._loss = _sum(self._terms.values())
        self._note_if_bad()
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate * group.get("rate_share", 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def _backward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Gradients of this process's rows; returns its share of each term."""
        rank, num_ranks = distributed.rank(), distributed.num_ranks()
        summed: dict[str, torch.Tensor] = {}
        for rows in batch.micro_batches(self._settings.micro_batch_size, rank, num_ranks):
            losses = self._trainable.losses(distributed.to_device(rows, self._device))
            terms = {name: loss / max(1, batch.counts[name]) for name, loss in losses.items()}
            loss = _sum(terms.values())
            # Sharding averages gradients over the processes, where we want their sum.
            (loss * num_ranks if self._is_sharded else loss).backward()
            for name, term in terms.items():
                summed[name] = summed[name] + term.detach() if name in summed else term.detach()
        return summed

    def _note_if_bad(self) -> None:
        """Remember the first step that is not finite, by operations on the device alone."""
        is_finite = torch.isfinite(self._loss) & torch.isfinite(self._norm)
        step, rate = (self._loss.new_full((), each) for each in (self._step, self._learning_rate))
        found = torch.stack([each.double() for each in (step, self._loss, self._norm, rate)])
        is_first = ~is_finite & (self._first_bad[0] < 0)
        self._first_bad = torch.where(is_first, found, self._first_bad)

    def measured(self) -> dict[str, Any]:
        """The fields of a line of the log about the last step. This waits for the device.

        Raises TrainingError if a step so far was not finite, or the weights are not.
        """
        step, *values = self._first_bad.tolist()
        if step >= 0:
            what = "loss {:g}, gradient norm {:g} at learning rate {:g} are not finite".format(*values)
            raise TrainingError(f"step {step:.0f}: {what}. {self._advice()}")
        largest = torch.nn.utils.get_total_norm(self._parameters, norm_type=math.inf)
        if not math.isfinite(distributed.whole(largest).item()):
            what = f"weights are not finite after a step at learning rate {self._learning_rate:g}"
            raise TrainingError(f"step {self._step}: {what}. {self._advice()}")
        by_name = {name: term.item() for name, term in self._terms.items()}
        return {
            "loss": self._loss.item(),
            **({"losses": by_name} if len(by_name) > 1 else {}),
            "learning_rate": self._learning_rate,
            "grad_norm": self._norm.item(),
        }

    def _advice(self) -> str:
        return (
            f"The weights of the last checkpoint in {self._output_dir} are intact: go on from them with a lower "
            "learning_rate (model_name_or_path=that checkpoint, another output_dir), or start the same command again "
            "if the machine is to blame"
        )


def _sum(terms: Iterable[torch.Tensor]) -> torch.Tensor:
    first, *rest = terms
    return sum(rest, first)


def _shown(fields: Mapping[str, Any]) -> dict[str, str]:
    """The fields of a line of the log that are shown beside the progress bar."""
    loss, mfu, ranked = fields.get("loss"), fields.get("mfu"), fields.get(METRIC)
    shown = {"loss": f"{loss:.3f}"} if loss is not None else {}
    shown |= {"mfu": f"{mfu:.0%}"} if mfu is not None else {}
    return shown | ({METRIC: " ".join(f"{value:.4f}" for value in ranked.values())} if ranked else {})


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """The number that one process seeds torch with in a step of a run; it fits torch, whatever the seed.

    >>> step_seed(0, 7), step_seed(0, 7, rank=1) == 7 + 2**32, 0 <= step_seed(10**30, 7) < 2**63
    (7, True, True)
    """
    return (step + (rank << 32) + seed * GOLDEN_RATIO) % 2**63


@contextmanager
def _prepared(stream: Stream, first_step: int) -> Iterator[Iterator[Batch]]:
    """The batches from a step on, in order; a thread makes each while the one before it is trained on."""
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as thread:

        def batches() -> Iterator[Batch]:
            coming = thread.submit(stream.batch, first_step) if first_step < stream.num_steps else None
            for step in range(first_step, stream.num_steps):
                assert coming is not None
                batch = coming.result()
                coming = thread.submit(stream.batch, step + 1) if step + 1 < stream.num_steps else None
                yield batch

        yield batches()


def _check_same_plan(stream: Stream, state: TrainState) -> None:
    """Raises TrainingError where processes would train on different data or from different checkpoints."""
    first = stream.batch(0).examples.tolist() if stream.num_steps else []
    if not distributed.all_equal(repr((stream.num_steps, stream.num_tokens, first, state.step, state.consumed))):
        raise TrainingError(
            "the processes of this run do not read the same data or resume from the same checkpoint: give all of them "
            "the same command, data folder and output_dir (on a file system that all machines share)"
        )


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Collects Ctrl-C and SIGTERM, so that the step under way can finish; a second signal acts at once.

    Under torchrun a second signal is collected too: torchrun sends its processes what the terminal has already sent.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # signals only reach the main thread
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: Any) -> None:
        received.append(number)
        if distributed.num_ranks() == 1:
            restore()

    for number in before:
        signal.signal(number, note)
    try:
        yield received
    finally:
        restore()


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
