"""Progress of long work: a bar with rate and time left in a terminal, plain lines elsewhere.

Both go to standard error; standard output is for results. CPREC_PROGRESS=bar, plain or off chooses by hand. Nothing is
shown under pytest, or in any process of a distributed run but the first.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress

Mode = Literal["bar", "plain", "off"]

SECONDS_BETWEEN_LINES = 10.0

_display: RichProgress | None = None  # on screen now: messages go above it, and bars inside a bar join it


def progress_mode() -> Mode:
    """How progress is shown in this process."""
    wish = os.environ.get("CPREC_PROGRESS", "")
    if os.environ.get("RANK", "0") != "0":
        return "off"
    if wish in ("bar", "plain", "off"):
        return wish  # type: ignore[return-value]
    if "PYTEST_CURRENT_TEST" in os.environ:
        return "off"
    return "bar" if sys.stderr.isatty() else "plain"


def say(message: str) -> None:
    """Print a line for the person who waits, on standard error; a bar on screen stays below it."""
    if os.environ.get("RANK", "0") != "0" or os.environ.get("CPREC_PROGRESS") == "off":
        return
    if _display is not None:
        _display.console.print(message, markup=False, highlight=False, soft_wrap=True)
    else:
        print(message, file=sys.stderr, flush=True)


def hide_progress_bars() -> None:
    """Keep transformers from showing a bar for each file that it reads or writes; downloads keep theirs."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging

    shown = not are_progress_bars_disabled()
    logging.disable_progress_bar()
    if shown:
        enable_progress_bars()


class Progress:
    """How far a piece of work has come; made by `track`. This class itself shows nothing."""

    def __init__(
        self, total: int | None, description: str, unit: str, completed: int, clock: Callable[[], float]
    ) -> None:
        self.total = total
        self.description = description
        self.unit = unit
        self.completed = completed
        self.fields: dict[str, str] = {}
        self._clock = clock
        self._already = completed  # by an earlier run: it must not count in the rate
        self._start = clock()

    def advance(self, amount: int = 1, **fields: object) -> None:
        """Note that `amount` more units are done; `fields` (loss=2.31) are shown beside the count until they change."""
        self.completed += amount
        self.fields.update({name: _shown(value) for name, value in fields.items()})
        self._show()

    def _show(self) -> None:
        pass

    @property
    def seconds(self) -> float:
        """Seconds since the work began."""
        return self._clock() - self._start

    @property
    def rate(self) -> float:
        """Units per second since the work began, without those of an earlier run."""
        return (self.completed - self._already) / self.seconds if self.seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Seconds left at the present rate; None while the rate or the total is unknown."""
        if self.total is None or self.rate <= 0:
            return None
        return max(0.0, (self.total - self.completed) / self.rate)

    def text_of_fields(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.fields.items())


class _Lines(Progress):
    """Plain lines: one every SECONDS_BETWEEN_LINES at most, and one at the end."""

    _last_line: float | None = None

    def _show(self) -> None:
        now = self._clock()
        if now - (self._start if self._last_line is None else self._last_line) < SECONDS_BETWEEN_LINES:
            return
        if self.total is not None and self.completed >= self.total:
            return  # `finish` prints the last line
        self._last_line = now
        share = f" ({100 * self.completed / self.total:.0f} %)" if self.total else ""
        parts = [f"{self._count()}{share}", _rate(self.rate, self.unit)]
        if self.seconds_left is not None:
            parts.append(f"{format_seconds(self.seconds_left)} left")
        self._print(parts)

    def finish(self, failed: bool) -> None:
        parts = [f"{'stopped at ' if failed else ''}{self._count()} in {format_seconds(self.seconds)}"]
        parts += [_rate(self.rate, self.unit)] if self.completed > self._already else []
        self._print(parts)

    def _count(self) -> str:
        total = f"/{self.total:,}" if self.total is not None else ""
        return f"{self.completed:,}{total} {self.unit}"

    def _print(self, parts: list[str]) -> None:
        fields = [self.text_of_fields()] if self.fields else []
        say(f"{self.description}: {', '.join([*parts, *fields])}")


class _Bar(Progress):
    """A bar: one line of a display by rich."""

    display: RichProgress
    task: TaskID

    def _show(self) -> None:
        left = self.seconds_left
        self.display.update(
            self.task,
            completed=self.completed,
            rate=_rate(self.rate, self.unit) if self.rate else "",
            left=f"{format_seconds(left)} left" if left is not None else "",
            fields=self.text_of_fields(),
        )


@contextmanager
def track(
    total: int | None,
    description: str,
    unit: str = "items",
    *,
    completed: int = 0,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Progress]:
    """Show progress while the block runs; call `advance` on the object that it gives.

    `total` is None where the amount of work is unknown; `completed` counts the units that an earlier run has done.

        with track(total=1_000, description="pre-training", unit="steps", completed=300) as progress:
            for step in range(300, 1_000):
                progress.advance(loss=train(step))
    """
    mode = progress_mode()
    if mode == "off":
        yield Progress(total, description, unit, completed, clock)
    elif mode == "plain":
        lines = _Lines(total, description, unit, completed, clock)
        failed = True
        try:
            yield lines
            failed = False
        finally:
            lines.finish(failed)
    else:
        bar = _Bar(total, description, unit, completed, clock)
        with _shared_display() as display:
            of = f"/{total:,}" if total is not None else ""
            bar.display = display
            bar.task = display.add_task(
                description, total=total, completed=completed, of=of, unit=unit, rate="", left="", fields=""
            )
            yield bar
            bar._show()
            display.stop_task(bar.task)


@contextmanager
def _shared_display() -> Iterator[RichProgress]:
    global _display
    if _display is not None:
        yield _display
        return
    columns = (
        SpinnerColumn(finished_text=" "),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=28),
        TextColumn("{task.completed:,}{task.fields[of]} {task.fields[unit]}", markup=False),
        TextColumn("{task.fields[rate]}", markup=False),
        TextColumn("{task.fields[left]}", markup=False),
        TextColumn("{task.fields[fields]}", markup=False),
    )
    with RichProgress(*columns, console=Console(stderr=True), refresh_per_second=5) as display:
        _display = display
        try:
            yield display
        finally:
            _display = None


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _rate(rate: float, unit: str) -> str:
    if 0 < rate < 0.1:
        return f"{1 / rate:,.0f} s each"
    return f"{rate:,.0f} {unit}/s" if rate >= 100 else f"{rate:.1f} {unit}/s"


def format_seconds(seconds: float) -> str:
    """Show seconds as a clock does.

    >>> format_seconds(7.2), format_seconds(95), format_seconds(3 * 3600 + 62)
    ('0:07', '1:35', '3:01:02')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
