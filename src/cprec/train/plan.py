"""The plan of a run, known before it starts: phases, what they read, the learning rate of each step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cprec.errors import ConfigError
from cprec.text.stream import Phase, TokenStream
from cprec.train.checkpoint import TrainState, read_state
from cprec.train.config import TrainingConfig
from cprec.train.schedule import Schedule, Unit, make_schedule

FEW_STEPS = 50
"""Optimizer steps below which a run says that it can hardly learn."""
STABLE, WARMUP, ANNEALING = "stable", "warm-up", "annealing"
SURE_FILL = 0.96
"""Share of a row's positions that packing surely fills: a phase given in steps must not need more steps than asked."""


@dataclass(frozen=True)
class Plan:
    """All that a run will do: its batches and their learning rates. A pure function of settings and data."""

    stream: TokenStream
    schedule: Schedule
    unit: Unit = "steps"
    """Of the schedule."""

    def steps_of(self, name: str) -> int:
        """Optimizer steps of a phase of the stream; 0 where it has none of that name."""
        steps = zip(self.stream.phases, self.stream.phase_steps, strict=True)
        return sum(num for phase, num in steps if phase.name == name)


def split_phases(
    num_tokens: int,
    share: np.ndarray,
    *,
    tokens_per_step: int,
    warmup_steps: float = 0,
    anneal_steps: float = 0,
    warmup: np.ndarray | None = None,
    annealing: np.ndarray | None = None,
) -> list[Phase]:
    """The phases of a run over `num_tokens`, each with the share of its tokens that each group has.

    Annealing is a phase of its own, so that runs which differ in it alone read the same until it begins; so is warm-up
    where it has a mixture of its own. Lengths below 1 are fractions of the tokens, others are steps. Phases too short
    for a step are part of the others.
    """

    def phase(name: str, length: float, of_phase: np.ndarray) -> Phase:
        if length < 1:
            return Phase(name=name, num_tokens=length * num_tokens, share=of_phase)
        tokens = length * tokens_per_step * SURE_FILL
        return Phase(name=name, num_tokens=tokens, share=of_phase, num_steps=round(length))

    first = [] if warmup is None else [phase(WARMUP, warmup_steps, warmup)]
    last = [phase(ANNEALING, anneal_steps, share if annealing is None else annealing)] if anneal_steps else []
    rest = num_tokens - sum(part.num_tokens for part in [*first, *last])
    stable = Phase(name=STABLE, num_tokens=max(rest, 0), share=share)
    return [part for part in [*first, stable, *last] if part.num_tokens >= tokens_per_step] or [
        Phase(name=STABLE, num_tokens=num_tokens, share=share)
    ]


def steps_of(setting: float, num_steps: int) -> int:
    """A setting below 1 is a fraction of the steps; from 1 on, a number of steps."""
    return round(setting * num_steps) if setting < 1 else round(setting)


def plan_of(config: TrainingConfig, stream: TokenStream) -> Plan:
    """The stream with a learning rate for each step. Lengths below 1 are fractions of all steps.

    Where the stream has a phase for warm-up or annealing, its steps count and not the setting.
    """
    num_steps, unit = stream.num_steps, config.schedule_unit
    steps = {phase.name: of_phase for phase, of_phase in zip(stream.phases, stream.phase_steps, strict=True)}
    warmup = steps.get(WARMUP, steps_of(config.warmup_steps, num_steps))
    if 0 < config.warmup_steps < 1:
        warmup = max(1, warmup)
    anneal = steps.get(ANNEALING, steps_of(config.anneal_steps, num_steps))
    if config.anneal_steps < 1:
        anneal = min(anneal, max(0, num_steps - warmup))
    schedule = make_schedule(
        config.lr_scheduler_type,
        range(1, num_steps + 1) if unit == "steps" else stream.tokens_after().tolist(),
        config.learning_rate,
        warmup_steps=warmup,
        anneal_steps=anneal,
        floor_ratio=config.min_lr_ratio,
        shape=config.anneal_shape,
    )
    return Plan(stream, schedule, unit)


def check_fork(stable: Path, plan: Plan) -> None:
    """Raises ConfigError where a checkpoint is not the state of this plan when its annealing begins."""
    start, state = plan.stream.num_steps - plan.steps_of(ANNEALING), TrainState()
    for step in range(start):
        state = state.advance(plan.stream.documents(step).tobytes(), 0, 0, 0)
    found = read_state(stable)
    if (found.step, found.consumed) != (start, state.consumed):
        raise ConfigError(
            f"{stable} (step {found.step:,}) is not the end of the stable phase of this plan (step {start:,}, the same "
            "documents in the same order): fork with the settings and data of the run that saved it"
        )


def describe_plan(plan: Plan, tell: Callable[[str], None]) -> None:
    """Say what the run will do: tokens, steps, the mixture of each phase, learning rates."""
    stream, wsa = plan.stream, plan.schedule.wsa
    num_steps = stream.num_steps
    tell(
        f"{stream.num_tokens:,} tokens in {num_steps:,} steps of {stream.tokens_per_step:,} "
        f"positions ({stream.fill:.1%} full)"
    )
    if stream.corpus.names != [""]:
        describe_mixture(stream, tell)
    tell(
        f"learning rate: {wsa.warmup:,} {plan.unit} up to {wsa.peak:g}, {wsa.anneal_start - wsa.warmup:,} there, "
        f"{wsa.anneal:,} {f'down to {wsa.floor:g} ({wsa.shape})' if wsa.anneal else 'of annealing'}"
    )
    if num_steps < FEW_STEPS:
        tell(
            f"note: {num_steps} optimizer steps are few to learn from: raise num_train_epochs, or lower "
            "train_batch_size or max_length"
        )


def describe_mixture(stream: TokenStream, tell: Callable[[str], None]) -> None:
    """Say how the tokens of each phase divide over domains and kinds, and how often each is repeated."""
    total = stream.group_tokens.sum(0)
    same = all((phase.share == stream.phases[0].share).all() for phase in stream.phases)
    for number, group in enumerate(stream.corpus.groups):
        share = f"{total[number] / stream.num_tokens:.1%}"
        if not same:
            of_phases = stream.group_tokens[:, number] / stream.group_tokens.sum(1)
            named = zip(stream.phases, of_phases, strict=True)
            share = ", ".join(f"{phase.name} {part:.1%}" for phase, part in named)
        passes = total[number] / max(1, group.num_tokens)
        tell(f"  {group.name}: {total[number]:,} tokens ({share}), {passes:.2f} passes over {group.num_tokens:,}")


PLOT_COLUMNS, PLOT_ROWS = 72, 12


def plot_schedule(plan: Plan) -> str:
    """The learning rate over the run as text: a column is a stretch of steps, its height the rate in the middle."""
    schedule, num_steps = plan.schedule, plan.stream.num_steps
    columns = min(PLOT_COLUMNS, num_steps)
    middle = [int((column + 0.5) * num_steps / columns) for column in range(columns)]
    heights = [schedule(step) / schedule.wsa.peak * PLOT_ROWS for step in middle]
    lines = []
    for row in range(PLOT_ROWS, 0, -1):
        full = (min(8, max(0, round(8 * (height - row + 1)))) for height in heights)
        label = f"{schedule.wsa.peak * row / PLOT_ROWS:9.2e} " if row in (PLOT_ROWS, PLOT_ROWS // 2) else " " * 10
        lines.append((label + "".join(" ▁▂▃▄▅▆▇█"[eighths] for eighths in full)).rstrip())
    ends = f"step 0{f'{num_steps:,}':>{max(0, columns - 6)}}"
    lines.append(" " * 10 + ends)
    first = 0
    for phase, steps in zip(plan.stream.phases, plan.stream.phase_steps, strict=True):
        if steps:
            last = first + steps - 1
            name = phase.name if len(plan.stream.phases) > 1 else "training"
            rates = f"learning rate {schedule(first):.3g} to {schedule(last):.3g}"
            lines.append(f"{name}: steps {first:,} to {last:,}, {rates}")
        first += steps
    return "\n".join(lines)
