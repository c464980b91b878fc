"""The one training loop, for continual pre-training and fine-tuning alike: they differ in data, mask and schedule."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cprec.distributed import autocast
from cprec.errors import TrainingError
from cprec.models import trunk_and_head
from cprec.progress import say, track
from cprec.text.stream import IGNORE, Batch, TokenStream
from cprec.train.checkpoint import Kind, TrainState, load_checkpoint, save_checkpoint
from cprec.train.loss import linear_cross_entropy
from cprec.train.training import LOG, read_log


def make_optimizer(model: torch.nn.Module, *, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (0.9, 0.95); matrices decay, norms and biases do not. The learning rate is set at each step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, betas=(0.9, 0.95), fused=True)


def summed_loss(model: Any, batch: Batch, device: torch.device, bf16: bool) -> torch.Tensor:
    """Cross-entropy summed over the batch's targets, in nats; hidden states meet the head only where a target is."""
    trunk, head = trunk_and_head(model)
    targets = torch.from_numpy(batch.targets_RT).flatten()
    at = (targets != IGNORE).nonzero().squeeze(1).to(device)
    with autocast(device, bf16):
        hidden_RTD = trunk(
            input_ids=torch.from_numpy(batch.input_ids_RT).to(device),
            position_ids=torch.from_numpy(batch.position_ids_RT).to(device),
            use_cache=False,
        ).last_hidden_state
    dtype = torch.bfloat16 if bf16 else torch.float32
    return linear_cross_entropy(hidden_RTD.flatten(0, 1)[at], head.weight, targets.to(device)[at], dtype)


@torch.no_grad()
def perplexity(model: Any, batches: Iterable[Batch], device: torch.device, bf16: bool) -> float:
    """exp of the mean cross-entropy over all targets; infinite if it overflows, NaN without targets."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for batch in batches:
        total += summed_loss(model, batch, device, bf16).item()
        count += batch.num_targets
    model.train(was_training)
    return math.exp(min(total / count, 700.0)) if count else math.nan


def train(
    model: Any,
    stream: TokenStream,
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
    validate: Callable[[], dict[str, float]],
    resume_from: Path | None,
    description: str,
    keep_at: Sequence[int] = (),
    start_from: Path | None = None,
) -> TrainState:
    """Train to the end of the stream, from a checkpoint if one is given; returns the final state.

    Each stream batch is one optimizer step, cut into `num_accumulation` micro-batches of rows. The step's loss is the
    sum over all its targets divided by their number, so accumulation changes nothing but memory. Every `logging_steps`
    steps a line goes to `log.jsonl`; every `eval_steps`, and at the end, `validate()` is logged as `heldout`; every
    `save_steps` a checkpoint is written. After the steps named in `keep_at` (the end of the stable phase, say) it is
    called `stable-<step>` and stays. Weights
    and optimizer begin as in the checkpoint `start_from`, if one is given. Ctrl-C and SIGTERM let the step finish,
    save, and raise KeyboardInterrupt.

    Raises TrainingError if a loss or gradient norm is not finite or the log cannot be written, and CheckpointError if
    a checkpoint cannot be written.
    """
    device = next(model.parameters()).device
    optimizer = make_optimizer(model, weight_decay=weight_decay)
    state = TrainState()
    if resume_from:
        state = load_checkpoint(resume_from, model, optimizer)
    elif start_from:
        load_checkpoint(start_from, model, optimizer)
    log = _Log(output_dir / LOG, state)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    num_steps = stream.num_steps

    def save() -> Path:
        kind: Kind = "stable" if state.step in keep_at else "checkpoint"
        return save_checkpoint(output_dir, state, model, optimizer, save_total_limit, kind=kind)

    if state.step == 0:
        log.write(step=0, tokens=0, heldout=validate())
    with (
        _stop_requests() as stop,
        track(stream.num_tokens, description, unit="tokens", completed=state.num_tokens) as progress,
    ):
        for step in range(state.step, num_steps):
            start = time.perf_counter()
            learning_rate = schedule(step)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            torch.manual_seed(step)  # dropout, where a model has any, depends on the step alone
            batch = stream.batch(step)
            num_targets = batch.num_targets
            loss = torch.zeros((), device=device)
            for part in split_rows(batch, num_accumulation):
                part_loss = summed_loss(model, part, device, bf16) / num_targets
                part_loss.backward()
                loss += part_loss.detach()
            norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
            _check_finite(step, loss, norm, learning_rate, output_dir)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seconds = time.perf_counter() - start
            state = state.advance(batch.documents.tobytes(), batch.num_tokens, num_targets, seconds)
            progress.advance(batch.num_tokens, loss=f"{loss.item():.3f}")
            if state.step % logging_steps == 0 or state.step in (1, num_steps):
                log.write(
                    step=state.step,
                    tokens=state.num_tokens,
                    loss=loss.item(),
                    learning_rate=learning_rate,
                    grad_norm=norm.item(),
                    tokens_per_second=state.num_tokens / max(state.seconds, 1e-9),
                    consumed=state.consumed,
                    **({"mixture": stream.mixture_until(state.step)} if len(stream.corpus.groups) > 1 else {}),
                )
            if state.step % eval_steps == 0 or state.step == num_steps or state.step in keep_at:
                log.write(step=state.step, tokens=state.num_tokens, heldout=validate())
            if state.step in keep_at or (state.step < num_steps and (stop or state.step % save_steps == 0)):
                saved = save()
                if stop and state.step < num_steps:
                    say(f"stopped after step {state.step:,} of {num_steps:,}, saved as {saved}")
                    raise KeyboardInterrupt
    return state


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Collects Ctrl-C and SIGTERM, so that the step under way can finish; a second signal acts at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # signals only reach the main thread
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: Any) -> None:
        received.append(number)
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def split_rows(batch: Batch, parts: int) -> list[Batch]:
    """Micro-batches of whole rows; documents and token counts stay with the step's batch."""
    pieces = min(parts, len(batch.input_ids_RT))
    arrays = zip(
        np.array_split(batch.input_ids_RT, pieces),
        np.array_split(batch.position_ids_RT, pieces),
        np.array_split(batch.targets_RT, pieces),
        strict=True,
    )
    return [Batch(ids, positions, targets, 0, batch.documents[:0]) for ids, positions, targets in arrays]


def _check_finite(step: int, loss: torch.Tensor, norm: torch.Tensor, learning_rate: float, output_dir: Path) -> None:
    if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
        raise TrainingError(
            f"step {step}: loss {loss.item():g}, gradient norm {norm.item():g} at learning rate {learning_rate:g} are "
            f"not finite. The weights of the last checkpoint in {output_dir} are intact: resume with a lower "
            "learning_rate"
        )


class _Log:
    """JSON lines; on resume the lines of steps that will be run again are dropped."""

    def __init__(self, path: Path, state: TrainState) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if state.step and path.is_file():
            kept = [line for line in read_log(path) if line["step"] <= state.step]
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._path = path

    def write(self, **fields: Any) -> None:
        try:
            with open(self._path, "a") as file:
                file.write(json.dumps(fields) + "\n")
        except OSError as error:
            raise TrainingError(
                f"{self._path} could not be written ({error}): make room, then start the same command again to resume "
                "from the last checkpoint"
            ) from error
