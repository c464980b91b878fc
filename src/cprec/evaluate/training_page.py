"""What training did: curves and numbers of runs and of anneal forks, on a page and as tables in the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TextIO

from markupsafe import Markup

from cprec.evaluate.charts import Band, Points, line_chart, thinned
from cprec.evaluate.grid import Column, Grid, console_for
from cprec.evaluate.pages import Section, print_sections, render
from cprec.progress import format_seconds

GENERAL_TEXT = "general text"
"""The held-out perplexity that is the forgetting meter; see `cprec.train.forgetting`."""
WARMUP, STABLE, ANNEALING = "warm-up", "stable", "annealing"
FAR_START = 10
"""A perplexity at the start this many times all later ones is left out of the curves, which it would flatten."""


@dataclass(frozen=True, eq=False)
class TrainingRun:
    """A run as its folder tells it; what the log lacks is left out of the report."""

    name: str
    records: Sequence[Mapping[str, Any]]
    """Lines of its log: step and tokens in all, then loss, learning_rate, heldout and so on, each in some."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """The content of `cprec.json`, once the run is finished."""

    @property
    def num_tokens(self) -> int:
        """Tokens read so far."""
        return max((record["tokens"] for record in self.records), default=0)

    @property
    def seconds(self) -> float:
        """Training time; of an unfinished run by its last rate, NaN where it has none."""
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
        return {name: points for name, points in self.members("heldout").items() if name != GENERAL_TEXT}

    @cached_property
    def general_text(self) -> list[tuple[float, float]]:
        """Perplexity on the general text over tokens."""
        return self.members("heldout").get(GENERAL_TEXT, [])

    @property
    def mixture_asked(self) -> dict[str, float]:
        """The share of each group that the settings ask for, where the log has it."""
        return next((dict(record["mixture_asked"]) for record in self.records if "mixture_asked" in record), {})

    @cached_property
    def relative_forgetting(self) -> list[tuple[float, float]]:
        """Perplexity on the general text over tokens, as a multiple of the first."""
        start = self.general_text[0][1] if self.general_text else 0.0
        return [(tokens, value / start) for tokens, value in self.general_text] if start > 0 else []

    @property
    def forgetting(self) -> float:
        """The last perplexity on the general text over the first; NaN where it was not measured twice."""
        return self.relative_forgetting[-1][1] if len(self.relative_forgetting) > 1 else math.nan

    def members(self, name: str) -> dict[str, list[tuple[float, float]]]:
        """The finite values over tokens of each member of a field that is a mapping: `heldout` or `mixture`."""
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


# ---- tables ----------------------------------------------------------------------------------------------------------


def final_numbers(run: TrainingRun) -> dict[str, str]:
    """The columns of a run's row, in reading order; a dash stands for what is not known."""
    parameters = run.about.get("num_parameters")
    return {
        "state": "finished" if run.about else "not finished",
        "parameters": f"{parameters / 1e6:,.2f} M" if parameters else "-",
        "steps": f"{max((record['step'] for record in run.records), default=0):,}",
        "tokens": f"{run.num_tokens:,}",
        "loss": _shown(run.last("loss"), "{:.3f}"),
        "tokens/s": _shown(run.last("tokens_per_second"), "{:,.0f}"),
        "MFU": _shown(run.last("mfu"), "{:.1%}"),
        "time": format_seconds(run.seconds) if math.isfinite(run.seconds) else "-",
        "forgetting": _shown(run.forgetting, "{:.3f}x"),
    }


def _shown(value: float, form: str) -> str:
    return form.format(value) if math.isfinite(value) else "-"


def final_section(runs: Sequence[TrainingRun], title: str = "") -> Section:
    """The final numbers of each run, without columns that no run has anything in."""
    rows = [(run.name, final_numbers(run)) for run in runs]
    heads = [head for head in rows[0][1] if any(numbers[head] != "-" for _, numbers in rows)]
    cells = ([name, *(numbers[head] for head in heads)] for name, numbers in rows)
    note = (
        f"Forgetting is the perplexity on a fixed {GENERAL_TEXT} at the end over that at the start: 1 means that "
        "nothing was forgotten."
    )
    table = Grid.of(["run", *heads], cells, caption="Final numbers")
    return Section(title=title, tables=[table], notes=[note] if "forgetting" in heads else [])


def _perplexity(value: float) -> str:
    """Two decimals, or a power of ten for a model that has diverged.

    >>> _perplexity(1234.5), _perplexity(1e304)
    ('1,234.50', '1e+304')
    """
    return f"{value:,.2f}" if value < 1e6 else f"{value:.3g}"


def perplexity_table(runs: Sequence[TrainingRun], *, named: bool = True) -> Grid:
    """Held-out perplexity at the start, at the end and at its lowest, of the general text last; `named` adds a first
    column with the run."""
    first, rows = 0 if named else 1, []
    for run in runs:
        for name, points in {**run.heldout, GENERAL_TEXT: run.general_text}.items():
            if values := [value for _, value in points]:
                rows.append([run.name, name, *map(_perplexity, (values[0], values[-1], min(values)))][first:])
    heads = ["run", "held out", "start", "end", "lowest"][first:]
    return Grid.of(heads, rows, caption="Held-out perplexity", left=2 - first)


def forgetting_table(runs: Sequence[TrainingRun]) -> Grid:
    """Perplexity on the general text of the base model and after each stage of one recipe, and the last of these as a
    multiple of the first; no row for a run in which it was not measured twice.

    What a model was trained on says whether fine-tuning went on from the pre-trained model or began with the base.
    """
    measured = [run for run in runs if len(run.general_text) > 1]
    pretrained = next((run for run in measured if run.about.get("stage") == "pretrain"), None)
    read = list(pretrained.about["trained_on"]) if pretrained else []
    rows = []
    for run in measured:
        (_, start), *_, (_, end) = run.general_text
        values: tuple[float, float, float]
        if run is pretrained:
            values = start, end, math.nan
        elif pretrained and run.about.get("trained_on", [])[:-1] == read:
            values = pretrained.general_text[0][1], start, end
        else:
            values = start, math.nan, end
        shown = (_perplexity(value) if math.isfinite(value) else "-" for value in values)
        rows.append([run.name, *shown, f"{end / values[0]:.3f}x"])
    heads = ["run", "base model", "after pre-training", "after fine-tuning", "of the base model"]
    return Grid.of(heads, rows, caption=f"Forgetting: perplexity on the {GENERAL_TEXT}")


def mixture_table(run: TrainingRun) -> Grid:
    """Shares of all tokens, as asked and as read; no row where nothing was logged of them."""
    read = {name: points[-1][1] for name, points in run.members("mixture").items() if points}
    caption = f"Mixture of {run.name}: shares of all tokens"
    if not run.mixture_asked:
        return Grid.of(["", "read"], ([name, f"{share:.2%}"] for name, share in read.items()), caption=caption)
    rows = []
    for name in dict.fromkeys([*run.mixture_asked, *read]) if read else ():
        asked, found = float(run.mixture_asked.get(name, 0.0)), read.get(name, 0.0)
        rows.append([name, f"{asked:.2%}", f"{found:.2%}", f"{round(100 * (found - asked), 2) + 0.0:+.2f}"])
    return Grid.of(["", "asked", "read", "points more"], rows, caption=caption)


# ---- curves ----------------------------------------------------------------------------------------------------------

LinesOf = Callable[[TrainingRun], Mapping[str, Points]]
"""Finds lines by name in a run; a line that has its chart to itself has no name."""


def field_of(name: str, scale: float = 1) -> LinesOf:
    """The values of a field of the log, times `scale`."""
    return lambda run: {"": [(x, scale * y) for x, y in run.points(name)]}


def without_far_starts(lines: Mapping[str, Points]) -> dict[str, Points]:
    """The lines without first points that are more than `FAR_START` times all that follow."""
    return {
        name: points[1:] if len(points) > 2 and points[0][1] > FAR_START * max(y for _, y in points[1:]) else points
        for name, points in lines.items()
    }


LOSS, LEARNING_RATE = "Training loss (nats per target token)", "Learning rate"
FROM_ZERO, LOG = {"from_zero": True}, {"log_y": True}
CURVES: Mapping[str, tuple[LinesOf, Mapping[str, bool]]] = {
    LOSS: (field_of("loss"), {}),
    "NDCG@10 of a sample of validation queries": (lambda run: run.members("ndcg@10"), FROM_ZERO),
    "Held-out perplexity": (lambda run: without_far_starts(run.heldout), LOG),
    "Forgetting: perplexity on the general text, as a multiple of the start": (
        lambda run: {"": run.relative_forgetting},
        {},
    ),
    LEARNING_RATE: (field_of("learning_rate"), FROM_ZERO),
    "Gradient norm": (field_of("grad_norm"), LOG),
    "Tokens per second": (field_of("tokens_per_second"), FROM_ZERO),
    "MFU: per cent of the matmul peak": (field_of("mfu", 100), FROM_ZERO),
    "Mixture: shares of the tokens read so far": (lambda run: run.members("mixture"), FROM_ZERO),
}
"""Charts of a run by caption: their lines, and how they are drawn."""


def _curves(
    runs: Mapping[str, TrainingRun], lines_of: LinesOf, options: Mapping[str, bool], bands: Sequence[Band] = ()
) -> Markup:
    """A chart of the lines of all runs over tokens, each by the name that tells it apart."""
    several = len(runs) > 1
    lines = {
        (f"{name}, {member}" if member else name) if several else member or name: thinned(points)
        for name, run in runs.items()
        for member, points in lines_of(run).items()
    }
    return line_chart(lines, x_label="tokens", bands=bands, **options)


def run_section(title: str, runs: Mapping[str, TrainingRun]) -> Section:
    """The curves of a run, or of several runs by name in one set of charts."""
    phases = {tuple(phases_of(run.points("learning_rate"))) for run in runs.values()}
    shaded = [phase for phase in phases.pop() if phase[0] != STABLE] if len(phases) == 1 else []
    parts = [f"warm-up, up to {last:,.0f} tokens" for name, _, last in shaded if name == WARMUP]
    parts += [f"annealing, from {first:,.0f}" for name, first, _ in shaded if name == ANNEALING]
    notes = [f"Shaded: {'; '.join(parts)}."] if parts else []
    if any(without_far_starts(run.heldout) != run.heldout for run in runs.values()):
        notes.append("Perplexities of the start, far above the rest, are not drawn.")
    for name, run in runs.items():
        if kept := run.about.get("kept"):
            of = f" of {name}" if len(runs) > 1 else ""
            notes.append(f"The weights{of} are those after step {kept['step']:,}, with the highest NDCG@10.")
    return Section(
        title=title,
        figures={caption: _curves(runs, lines, options, shaded) for caption, (lines, options) in CURVES.items()},
        tables=[perplexity_table(list(runs.values()), named=len(runs) > 1), *map(mixture_table, runs.values())],
        notes=notes,
    )


# ---- runs ------------------------------------------------------------------------------------------------------------


def print_training(runs: Sequence[TrainingRun], file: TextIO | None = None) -> None:
    """Print the final numbers and the held-out perplexities; `file` is standard output if None."""
    perplexities = Section(tables=[perplexity_table(runs)])
    print_sections(console_for(file, least=160), [final_section(runs), perplexities])


def training_page(title: str, runs: Sequence[TrainingRun]) -> str:
    """The text of the page: final numbers of all runs, then the curves of each."""
    curves = [run_section(run.name, {run.name: run}) for run in runs]
    return render(f"training of {title}", [final_section(runs), *curves])


# ---- anneal forks ----------------------------------------------------------------------------------------------------

FORK_COLUMNS = {
    "tokens": ("tokens", "{:,}"),
    "seconds": ("seconds", "{:,.0f}"),
    "next item in {domain}": ("next_item_perplexity", "{:.3f}"),
    "NDCG@10, validation": ("ndcg@10", "{0[mean]:.4f} [{0[low]:.3f}, {0[high]:.3f}]"),
    "against no annealing": ("against_trunk", "{0[mean]:+.4f} [{0[low]:+.4f}, {0[high]:+.4f}]"),
}
"""Columns of the table of branches: the field of a row of `forks.json`, and how it is written."""


def print_forks(comparison: Mapping[str, Any]) -> None:
    """Print the tables of `forks.json` on standard output."""
    print_sections(console_for(None), [_fork_section(comparison)])


def fork_page(
    comparison: Mapping[str, Any],
    branches: Mapping[str, Sequence[Mapping[str, Any]]],
    trunk: Sequence[Mapping[str, Any]],
) -> str:
    """The text of the page: the tables, then learning rate, loss and held-out perplexity over tokens.

    `comparison` is the content of `forks.json`: run, start, domain, and a row for each branch by name. `branches` and
    `trunk` are the records of training logs.
    """
    start = min((row["total_tokens"] for row in comparison["rows"].values()), default=0)
    run = [record for record in trunk if record["tokens"] <= start]
    # A branch begins where the run was when it was left.
    last = {key: record[key] for record in run for key in ("learning_rate", "loss", "heldout") if key in record}
    forks = {name: TrainingRun(name, [{"tokens": start, **last}, *log]) for name, log in branches.items()}
    figures = {
        caption: _curves({"run": TrainingRun("run", run), **forks}, *CURVES[caption])
        for caption in (LEARNING_RATE, LOSS)
    }
    for group in _groups(comparison):
        figures[f"Held-out perplexity: {group}"] = _curves(forks, _heldout_in(group), {})
    sections = [_fork_section(comparison), Section(title="Curves", figures=figures)]
    return render(f"anneal forks of {comparison['run']}", sections)


def _heldout_in(group: str) -> LinesOf:
    return lambda run: {"": run.members("heldout").get(group, [])}


def _groups(comparison: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(name for row in comparison["rows"].values() for name in row["heldout"]))


def _fork_section(comparison: Mapping[str, Any]) -> Section:
    """What each branch cost and what fine-tuning made of it; held-out perplexity at its end, where it was measured."""
    rows, domain = comparison["rows"], comparison["domain"]
    shown = {
        head.format(domain=domain): cell
        for head, cell in FORK_COLUMNS.items()
        if any(cell[0] in r for r in rows.values())
    }
    groups = {name.removesuffix(" (specific)"): (name, "{:.3f}") for name in _groups(comparison)}
    heldout = {name: row["heldout"] for name, row in rows.items()}
    tables = [
        _fork_table(f"branches of {comparison['start']}", shown, rows),
        _fork_table("held-out perplexity", groups, heldout),
    ]
    text = (
        "Tokens and seconds are what a branch costs beyond the run that it shares. Held-out perplexity is that of "
        "users never trained on."
    )
    if domain:
        text += (
            f" Every branch was fine-tuned in the same short way on {domain}; NDCG@10 is over the full "
            "catalogue, of validation queries: test queries are not touched by a choice between branches. Intervals "
            "are 95 % over users, and the last column is paired."
        )
    return Section(tables=[table for table in tables if len(table.columns) > 1], notes=[text])


def _fork_table(first: str, columns: Mapping[str, tuple[str, str]], rows: Mapping[str, Mapping[str, Any]]) -> Grid:
    """Columns by head; a dash stands for what was not measured."""
    cells = (
        [name, *(form.format(row[key]) if row.get(key) is not None else "-" for key, form in columns.values())]
        for name, row in rows.items()
    )
    return Grid.of([Column(first, align="left"), *(Column(head, wrap=True) for head in columns)], cells)
