"""What training did: curves and final numbers of one run or several, on a page and as tables in the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TextIO

from cprec.evaluate.charts import Band, Points, line_chart, thinned
from cprec.evaluate.grid import Grid, console_for
from cprec.evaluate.pages import Section, render
from cprec.evaluate.training_run import ANNEALING, GENERAL_TEXT, STABLE, WARMUP, TrainingRun, phases_of
from cprec.progress import format_seconds

FAR_START = 10
"""A perplexity at the start this many times all later ones is left out of the curves, which it would flatten."""


# ---- tables ----------------------------------------------------------------------------------------------------------


def final_numbers(run: TrainingRun) -> dict[str, str]:
    """The columns of a run's row, in reading order; a dash stands for what is not known."""
    parameters = run.about.get("num_parameters")
    return {
        "state": "finished" if run.about else "not finished",
        "parameters": f"{parameters / 1e6:,.2f} M" if parameters else "-",
        "steps": f"{run.num_steps:,}",
        "tokens": f"{run.num_tokens:,}",
        "loss": _shown(run.last("loss"), "{:.3f}"),
        "tokens/s": _shown(run.last("tokens_per_second"), "{:,.0f}"),
        "MFU": _shown(run.last("mfu"), "{:.1%}"),
        "time": format_seconds(run.seconds) if math.isfinite(run.seconds) else "-",
        "forgetting": _shown(run.forgetting, "{:.3f}x"),
    }


def final_table(runs: Sequence[TrainingRun]) -> Grid:
    """The final numbers of each run, without columns that no run has anything in."""
    rows = [(run.name, final_numbers(run)) for run in runs]
    heads = [head for head in final_numbers(runs[0]) if any(numbers[head] != "-" for _, numbers in rows)]
    cells = ([name, *(numbers[head] for head in heads)] for name, numbers in rows)
    return Grid.of(["run", *heads], cells, caption="Final numbers")


def perplexity_rows(runs: Sequence[TrainingRun]) -> list[list[str]]:
    """Run, held-out set, and its perplexity at the start, at the end and at its lowest; the general text is last."""
    rows = []
    for run in runs:
        for name, points in {**run.heldout, GENERAL_TEXT: run.general_text}.items():
            values = [value for _, value in points]
            if values:
                rows.append([run.name, name, *map(_perplexity, (values[0], values[-1], min(values)))])
    return rows


def perplexity_table(runs: Sequence[TrainingRun], *, named: bool) -> Grid:
    """Held-out perplexity; `named` adds a first column with the run."""
    first = 0 if named else 1
    heads = ["run", "held out", "start", "end", "lowest"][first:]
    rows = (row[first:] for row in perplexity_rows(runs))
    return Grid.of(heads, rows, caption="Held-out perplexity", left=2 - first)


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


def _perplexity(value: float) -> str:
    """Two places, or powers of ten where a model knows less than nothing.

    >>> _perplexity(1234.5), _perplexity(1e304)
    ('1,234.50', '1e+304')
    """
    return f"{value:,.2f}" if value < 1e6 else f"{value:.3g}"


def _shown(value: float, form: str) -> str:
    return form.format(value) if math.isfinite(value) else "-"


def print_training(runs: Sequence[TrainingRun], file: TextIO | None = None) -> None:
    """Print the final numbers and the held-out perplexities; `file` is standard output if None."""
    console = console_for(file, least=160)
    console.print(final_table(runs).for_terminal())
    if (perplexities := perplexity_table(runs, named=True)).rows:
        console.print()
        console.print(perplexities.for_terminal())


# ---- pages -----------------------------------------------------------------------------------------------------------

LinesOf = Callable[[TrainingRun], Mapping[str, Points]]
"""Finds lines by name in a run; a line that has its chart to itself has no name."""


def heldout_of(run: TrainingRun) -> Mapping[str, Points]:
    """Held-out perplexities of a run."""
    return run.heldout


def field_of(name: str, scale: float = 1) -> LinesOf:
    """The values of a field of the log, times `scale`."""
    return lambda run: {"": [(x, scale * y) for x, y in run.points(name)]}


FROM_ZERO, LOG = {"from_zero": True}, {"log_y": True}
CURVES: Mapping[str, tuple[LinesOf, Mapping[str, bool]]] = {
    "Training loss (nats per target token)": (field_of("loss"), {}),
    "Held-out perplexity": (heldout_of, LOG),
    "Forgetting: perplexity on the general text, as a multiple of the start": (
        lambda run: {"": run.relative_forgetting},
        {},
    ),
    "Learning rate": (field_of("learning_rate"), FROM_ZERO),
    "Gradient norm": (field_of("grad_norm"), LOG),
    "Tokens per second": (field_of("tokens_per_second"), FROM_ZERO),
    "MFU: per cent of the matmul peak": (field_of("mfu", 100), FROM_ZERO),
    "Mixture: shares of the tokens read so far": (lambda run: run.members("mixture"), FROM_ZERO),
}
"""Charts of a run by caption: their lines, and how they are drawn."""


def training_page(title: str, runs: Sequence[TrainingRun]) -> str:
    """The text of the page: final numbers of all runs, then the curves of each."""
    curves = [run_section(run.name, {run.name: run}) for run in runs]
    return render(f"training of {title}", [final_section(runs), *curves])


def final_section(runs: Sequence[TrainingRun], title: str = "") -> Section:
    """The final numbers of all runs."""
    measured = any(math.isfinite(run.forgetting) for run in runs)
    note = (
        f"Forgetting is the perplexity on a fixed {GENERAL_TEXT} at the end over that at the start: 1 means that "
        "nothing was forgotten."
    )
    return Section(title=title, tables=[final_table(runs)], notes=[note] if measured else [])


def run_section(title: str, runs: Mapping[str, TrainingRun]) -> Section:
    """The curves of a run, or of several runs by name in one set of charts."""
    phases = {tuple(phases_of(run.points("learning_rate"))) for run in runs.values()}
    shaded = [phase for phase in phases.pop() if phase[0] != STABLE] if len(phases) == 1 else []
    figures = {}
    for caption, (lines_of, options) in CURVES.items():
        lines = _named(runs, lines_of)
        drawn = without_far_starts(lines) if lines_of is heldout_of else lines
        few = {name: thinned(points) for name, points in drawn.items() if points}
        figures[caption] = line_chart(few, x_label="tokens", bands=shaded, **options)
    notes = [_phase_note(shaded)] if shaded else []
    heldout = _named(runs, heldout_of)
    if without_far_starts(heldout) != heldout:
        notes.append("Perplexities of the start, far above the rest, are not drawn.")
    tables = [perplexity_table(list(runs.values()), named=len(runs) > 1), *map(mixture_table, runs.values())]
    return Section(title=title, figures=figures, notes=notes, tables=tables)


def _named(runs: Mapping[str, TrainingRun], lines_of: LinesOf) -> dict[str, Points]:
    """The lines of all runs by the name that tells them apart."""
    several = len(runs) > 1
    return {
        (f"{name}, {member}" if member else name) if several else member or name: points
        for name, run in runs.items()
        for member, points in lines_of(run).items()
    }


def without_far_starts(lines: Mapping[str, Points]) -> dict[str, Points]:
    """The lines without first points that are more than `FAR_START` times all that follow."""
    return {
        name: points[1:] if len(points) > 2 and points[0][1] > FAR_START * max(y for _, y in points[1:]) else points
        for name, points in lines.items()
    }


def _phase_note(phases: Sequence[Band]) -> str:
    """Which phase is shaded where.

    >>> _phase_note([("warm-up", 0, 2000), ("annealing", 9000, 10000)])
    'Shaded: warm-up, up to 2,000 tokens; annealing, from 9,000.'
    """
    parts = [f"warm-up, up to {last:,.0f} tokens" for name, _, last in phases if name == WARMUP]
    parts += [f"annealing, from {first:,.0f}" for name, first, _ in phases if name == ANNEALING]
    return f"Shaded: {'; '.join(parts)}."
