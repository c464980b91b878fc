"""What training did: curves and final numbers of one run or several, as one page and as a table for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from cprec.evaluate.charts import Band, Points, line_chart, thinned
from cprec.evaluate.report import html_page, without_far_starts
from cprec.progress import format_seconds

if TYPE_CHECKING:
    from rich.table import Table

GENERAL_TEXT = "general text"
"""The held-out perplexity that is the forgetting meter; see `cprec.train.forgetting`."""
WARMUP, STABLE, ANNEALING = "warm-up", "stable", "annealing"

Record = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class TrainingRun:
    """A run as its folder tells it; what the log lacks is left out of the report."""

    name: str
    records: Sequence[Record]
    """Lines of its log: step and tokens in all, then loss, learning_rate, heldout and so on, each in some."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What `cprec.json` says, once the run is finished."""

    @property
    def finished(self) -> bool:
        return bool(self.about)

    @property
    def num_steps(self) -> int:
        """Optimizer steps logged so far."""
        return max((record["step"] for record in self.records), default=0)

    @property
    def num_tokens(self) -> int:
        return max((record["tokens"] for record in self.records), default=0)

    @property
    def seconds(self) -> float:
        """Training time; of an unfinished run as its rate tells, NaN where it has none."""
        if "seconds" in self.about:
            return float(self.about["seconds"])
        rate = self.last("tokens_per_second")
        return self.num_tokens / rate if rate > 0 else math.nan

    def points(self, name: str) -> list[tuple[float, float]]:
        """The finite values of a field over tokens."""
        return _finite([(record["tokens"], record[name]) for record in self.records if name in record])

    def last(self, name: str) -> float:
        """The last finite value of a field; NaN where there is none."""
        points = self.points(name)
        return points[-1][1] if points else math.nan

    @cached_property
    def heldout(self) -> dict[str, list[tuple[float, float]]]:
        """Held-out perplexity over tokens, by domain and kind; the general text is not among them."""
        return {name: points for name, points in self._members("heldout").items() if name != GENERAL_TEXT}

    @cached_property
    def general_text(self) -> list[tuple[float, float]]:
        """Perplexity on the general text over tokens."""
        return self._members("heldout").get(GENERAL_TEXT, [])

    @cached_property
    def mixture(self) -> dict[str, list[tuple[float, float]]]:
        """The share of each group in the tokens read so far, over tokens."""
        return self._members("mixture")

    @cached_property
    def asked(self) -> dict[str, float]:
        """The share of each group that the settings ask for, where the log has it."""
        return next((dict(record["mixture_asked"]) for record in self.records if "mixture_asked" in record), {})

    @property
    def forgetting(self) -> float:
        """The last perplexity on the general text over the first; NaN where it was not measured twice."""
        text = self.general_text
        return text[-1][1] / text[0][1] if len(text) > 1 and text[0][1] > 0 else math.nan

    def _members(self, name: str) -> dict[str, list[tuple[float, float]]]:
        lines: dict[str, list[tuple[float, float]]] = {}
        for record in self.records:
            for member, value in (record.get(name) or {}).items():
                lines.setdefault(member, []).append((record["tokens"], value))
        return {member: _finite(points) for member, points in lines.items()}


def _finite(points: Sequence[tuple[float, Any]]) -> list[tuple[float, float]]:
    return [(x, float(y)) for x, y in points if isinstance(y, (int, float)) and math.isfinite(y)]


def phases_of(learning_rates: Points) -> list[Band]:
    """Where the rate rises to its peak, where it stays there, and where it falls: name, first and last tokens.

    A rate that never changes has no phases.

    >>> phases_of([(10, 0.5), (20, 1.0), (30, 1.0), (40, 1.0), (50, 0.4)])
    [('warm-up', 0, 20), ('stable', 20, 40), ('annealing', 40, 50)]
    >>> phases_of([(10, 1.0), (20, 1.0)])
    []
    """
    if not learning_rates:
        return []
    peak = max(rate for _, rate in learning_rates)
    at_peak = [place for place, (_, rate) in enumerate(learning_rates) if rate >= peak * (1 - 1e-9)]
    first, last, end = learning_rates[at_peak[0]][0], learning_rates[at_peak[-1]][0], learning_rates[-1][0]
    found: list[Band] = [(WARMUP, 0, first)] if at_peak[0] else []
    if last > first:
        found.append((STABLE, first, last))
    if end > last:
        found.append((ANNEALING, last, end))
    return found if [name for name, _, _ in found] != [STABLE] else []


# ---- numbers ---------------------------------------------------------------------------------------------------------


def final_numbers(run: TrainingRun) -> dict[str, str]:
    """The columns of a run's row, in reading order; a dash stands for what is not known."""
    parameters = run.about.get("num_parameters")
    return {
        "state": "finished" if run.finished else "not finished",
        "parameters": f"{parameters / 1e6:,.2f} M" if parameters else "-",
        "steps": f"{run.num_steps:,}",
        "tokens": f"{run.num_tokens:,}",
        "loss": _shown(run.last("loss"), "{:.3f}"),
        "tokens/s": _shown(run.last("tokens_per_second"), "{:,.0f}"),
        "MFU": _shown(run.last("mfu"), "{:.1%}"),
        "time": format_seconds(run.seconds) if math.isfinite(run.seconds) else "-",
        "forgetting": _shown(run.forgetting, "{:.3f}x"),
    }


def perplexity_rows(runs: Sequence[TrainingRun]) -> list[list[str]]:
    """Run, held-out set, and its perplexity at the start, at the end and at its lowest; the general text is last."""
    rows = []
    for run in runs:
        for name, points in {**run.heldout, GENERAL_TEXT: run.general_text}.items():
            values = [value for _, value in points]
            if values:
                rows.append([run.name, name, *map(_perplexity, (values[0], values[-1], min(values)))])
    return rows


_PERPLEXITY_HEADS = ("held out", "start", "end", "lowest")


def _perplexity(value: float) -> str:
    """Two places, or powers of ten where a model knows less than nothing.

    >>> _perplexity(1234.5), _perplexity(1e304)
    ('1,234.50', '1e+304')
    """
    return f"{value:,.2f}" if value < 1e6 else f"{value:.3g}"


def _shown(value: float, form: str) -> str:
    return form.format(value) if math.isfinite(value) else "-"


def _known(runs: Sequence[TrainingRun]) -> dict[str, dict[str, str]]:
    """The final numbers of each run, without columns that no run has anything in."""
    rows = {run.name: final_numbers(run) for run in runs}
    heads = [head for head in next(iter(rows.values()), {}) if any(row[head] != "-" for row in rows.values())]
    return {name: {head: row[head] for head in heads} for name, row in rows.items()}


# ---- terminal --------------------------------------------------------------------------------------------------------


def print_training(runs: Sequence[TrainingRun], file: TextIO | None = None) -> None:
    """The final numbers and the held-out perplexities as two tables; `file` is standard output if None."""
    from rich.console import Console

    console = Console(file=file, highlight=False)
    if not console.is_terminal:
        console = Console(file=file, highlight=False, width=max(console.width, 160))
    rows = _known(runs)
    console.print(_table("run", next(iter(rows.values()), {}), [[name, *row.values()] for name, row in rows.items()]))
    perplexities = perplexity_rows(runs)
    if perplexities:
        console.print()
        console.print(_table("run", _PERPLEXITY_HEADS, perplexities, left=2))


def _table(first: str, heads: Any, rows: Sequence[Sequence[str]], left: int = 1) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for place, head in enumerate([first, *heads]):
        table.add_column(head, justify="left" if place < left else "right", no_wrap=place >= left)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


# ---- HTML ------------------------------------------------------------------------------------------------------------


def write_training_page(path: Path, title: str, runs: Sequence[TrainingRun]) -> None:
    """Write the page of these runs, one file that needs nothing else; it appears complete or not at all."""
    temporary = path.with_name(path.name + ".incomplete")
    temporary.write_text(training_page(title, runs), encoding="utf-8")
    temporary.replace(path)


def training_page(title: str, runs: Sequence[TrainingRun]) -> str:
    """The text of the page: final numbers of all runs, then the curves of each."""
    rows = _known(runs)
    table = _html_table(
        "Final numbers", ["", *next(iter(rows.values()), {})], [[name, *row.values()] for name, row in rows.items()]
    )
    forgetting = (
        f"<p>Forgetting is the perplexity on a fixed {GENERAL_TEXT} at the end over that at the start: 1 means that "
        "nothing was forgotten.</p>"
        if any(math.isfinite(run.forgetting) for run in runs)
        else ""
    )
    body = [f"<h1>CPRec: training of {escape(title)}</h1>", f"<section>{table}{forgetting}</section>"]
    return html_page(escape(f"training of {title}"), [*body, *(_run_section(run) for run in runs)])


def _run_section(run: TrainingRun) -> str:
    phases = phases_of(run.points("learning_rate"))
    shaded = [phase for phase in phases if phase[0] != STABLE]
    percent = [(x, 100 * y) for x, y in run.points("mfu")]
    drawn = without_far_starts(run.heldout)
    start = run.general_text[0][1] if run.general_text else math.nan
    relative = [(x, y / start) for x, y in run.general_text] if start > 0 else []

    def chart(lines: Mapping[str, Points], **options: Any) -> str:
        few = {name: thinned(points) for name, points in lines.items() if points}
        return line_chart(few, x_label="tokens", bands=shaded, **options)

    charts = {
        "Training loss (nats per target token)": chart({"loss": run.points("loss")}),
        "Held-out perplexity": chart(drawn, log_y=True),
        "Forgetting: perplexity on the general text, as a multiple of the start": chart({GENERAL_TEXT: relative}),
        "Learning rate": chart({"learning rate": run.points("learning_rate")}, from_zero=True),
        "Gradient norm": chart({"gradient norm": run.points("grad_norm")}, log_y=True),
        "Tokens per second": chart({"tokens per second": run.points("tokens_per_second")}, from_zero=True),
        "MFU: per cent of the matmul peak": chart({"MFU": percent}, from_zero=True),
        "Mixture: shares of the tokens read so far": chart(run.mixture, from_zero=True),
    }
    figures = "".join(
        f"<figure><figcaption>{escape(caption)}</figcaption>{svg}</figure>" for caption, svg in charts.items() if svg
    )
    notes = [_phase_note(phases)] if shaded else []
    if drawn != run.heldout:
        notes.append("Perplexities of the start, far above the rest, are not drawn.")
    perplexities = [row[1:] for row in perplexity_rows([run])]
    return (
        f'<section><h2>{escape(run.name)}</h2><div class="charts">{figures}</div>'
        + "".join(f"<p>{escape(note)}</p>" for note in notes)
        + (_html_table("Held-out perplexity", ["", *_PERPLEXITY_HEADS[1:]], perplexities) if perplexities else "")
        + _mixture_table(run)
        + "</section>"
    )


def _phase_note(phases: Sequence[Band]) -> str:
    """Which phase is shaded where.

    >>> _phase_note([("warm-up", 0, 2000), ("stable", 2000, 9000), ("annealing", 9000, 10000)])
    'Shaded: warm-up, up to 2,000 tokens; annealing, from 9,000.'
    """
    parts = [f"warm-up, up to {last:,.0f} tokens" for name, _, last in phases if name == WARMUP]
    parts += [f"annealing, from {first:,.0f}" for name, first, _ in phases if name == ANNEALING]
    return f"Shaded: {'; '.join(parts)}."


def _mixture_table(run: TrainingRun) -> str:
    """Shares as asked and as read, where there are any."""
    read = {name: points[-1][1] for name, points in run.mixture.items() if points}
    if not read:
        return ""
    if not run.asked:
        rows = [[name, f"{share:.2%}"] for name, share in read.items()]
        return _html_table("Mixture: shares of all tokens read", ["", "read"], rows)
    rows = []
    for name in dict.fromkeys([*run.asked, *read]):
        asked, found = float(run.asked.get(name, 0.0)), read.get(name, 0.0)
        rows.append([name, f"{asked:.2%}", f"{found:.2%}", f"{round(100 * (found - asked), 2) + 0.0:+.2f}"])
    return _html_table("Mixture: shares of all tokens", ["", "asked", "read", "points more"], rows)


def _html_table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    lines = "".join(
        f"<tr><th>{escape(first)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in rest)}</tr>"
        for first, *rest in rows
    )
    return (
        f'<div class="scroll"><table class="metrics"><caption>{escape(caption)}</caption><tr>{head}</tr>{lines}'
        "</table></div>"
    )
