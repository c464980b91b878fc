"""A comparison of arms on one domain: its records, and tables and a plot of them for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TextIO

from markupsafe import Markup

from cprec.evaluate.charts import Value, row_chart
from cprec.evaluate.grid import Column, Grid, Row, console_for, printable, widest_fitting
from cprec.evaluate.pages import Section, print_sections, render
from cprec.evaluate.report_page import UNCERTIFIED, metric_name
from cprec.evaluate.results import Interval, Metric
from cprec.evaluate.statistics import ALPHA, MIN_QUERIES, Comparison

PLOT_WIDTH = 20
"""Characters of the plot in the terminal."""
PROTOCOLS = {
    "full": "full catalogue, seen items left out",
    "full_with_seen": "full catalogue, seen items too",
    "candidates_uniform": "uniform candidates",
    "candidates_popularity": "candidates drawn by popularity",
    "new_items": "new items alone",
    "generate": "free writing",
}
"""Ways of asking, by their name in `metrics.parquet`, as people say them."""

WORDS = {
    "tie_order": "order of events at equal times",
    "part": "part asked for",
    "num_queries": "number of queries",
    "candidates_uniform_sha256": "uniform candidates",
    "candidates_popularity_sha256": "candidates drawn by popularity",
    "num_candidates": "number of candidates",
    "seen": "seen items",
    "num_items": "number of items",
    "k": "K",
    "certificate": "leakage certificate",
}
"""Keys of `protocol.json` as people say them, where it is not the key with blanks."""


# ---- records ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Estimate(Interval):
    """A mean over queries, and over seeds where there are several, with its 95 % interval over users and seeds."""

    error_users: float | None = None
    """Standard error from the users; None for a single seed, where the interval says it."""
    error_seeds: float | None = None
    """Standard error that seeds add; None for a single seed, which tells nothing of it."""


@dataclass(frozen=True, kw_only=True)
class ComparedArm:
    """An arm beside others."""

    name: str
    """As evaluation named it, with its run in front where another run has other numbers under that name."""
    num_seeds: int
    """Training runs that the means are over."""
    bound: bool
    """It knows what no recommender can know (an oracle), so it is never the best and is not tested."""
    estimates: Mapping[str, Estimate]
    """By metric; the first is the one that arms are compared by."""
    against_best: Comparison | None
    """This arm less the best on the same queries, p corrected for the table; None for the best and for bounds."""


@dataclass(frozen=True, kw_only=True)
class ComparisonTable:
    """Arms that answered the same queries of a domain under one protocol, the highest mean first."""

    domain: str
    """The domain whose items were ranked."""
    runs: tuple[str, ...]
    """Short names of the folders."""
    protocol: str
    """The way of asking: a key of `PROTOCOLS`."""
    settings: Mapping[str, Any]
    """What every number depends on, as `protocol.json` has it."""
    num_queries: int
    """Queries that every arm answered."""
    arms: tuple[ComparedArm, ...]
    comparisons: Mapping[tuple[str, str], Comparison]
    """Every pair of arms, the first less the second by the first metric; Holm's correction is over all of them."""

    @property
    def metric(self) -> str:
        """The metric that arms are compared by."""
        return next(iter(self.arms[0].estimates))

    @property
    def best(self) -> ComparedArm | None:
        """The arm of the highest mean, bounds aside."""
        return next((arm for arm in self.arms if not arm.bound), None)


# ---- in words --------------------------------------------------------------------------------------------------------


def key_in_words(key: str) -> str:
    """A key of `protocol.json` as people say it."""
    return WORDS.get(key, key.removesuffix("_sha256").replace("_", " "))


def in_words(key: str, value: Any) -> str:
    """The value of a key of `protocol.json` as people say it; of a hash its first twelve digits."""
    if value is None:
        return "not stated"
    if key.endswith("_sha256"):
        return f"of SHA-256 {str(value)[:12]}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def title_of(table: ComparisonTable) -> str:
    """A heading: domain, way of asking, number of queries."""
    return f"{table.domain}: {PROTOCOLS.get(table.protocol, table.protocol)}, {table.num_queries:,} queries"


def settings_line(settings: Mapping[str, Any]) -> str:
    """What the numbers of a table depend on, as `protocol.json` has it, hashes aside."""
    left_out = {"domain", "num_queries"}
    shown = {key: value for key, value in settings.items() if not key.endswith("_sha256") and key not in left_out}
    return "; ".join(f"{key_in_words(key)}: {in_words(key, value)}" for key, value in shown.items())


def warnings(table: ComparisonTable) -> list[str]:
    """What no copy of the numbers may go without."""
    lines = [UNCERTIFIED] if table.settings.get("certificate") == "uncertified" else []
    if table.num_queries < MIN_QUERIES:
        lines.append(f"No claim under {MIN_QUERIES:,} queries: there are {table.num_queries:,}.")
    return lines


def notes(table: ComparisonTable) -> list[str]:
    """What a reader must know beside the numbers: warnings, seeds, how the columns were made."""
    lines, leading = warnings(table), _written(table, table.metric)
    for arm in table.arms:
        main = arm.estimates[table.metric]
        if main.error_users is not None and main.error_seeds is not None:
            lines.append(
                f"{arm.name}: standard error of {leading} {main.error_users:.4f} from users, {main.error_seeds:.4f} "
                "from seeds."
            )
    lines.append("Intervals are 95 % over users, and over seeds where an arm has several.")
    if len({arm.num_seeds > 1 for arm in table.arms}) > 1:
        lines.append(
            "A trained arm of one seed beside one of several: its seeds are taken to vary as those of the other do."
        )
    if table.comparisons:
        lines.append(
            f"Less the best: on the same queries. p: corrected by Holm over all {len(table.comparisons):,} pairs of "
            f"arms; * marks p below {ALPHA}: the arm differs from the best. Detectable: the smallest true difference "
            "that this test set shows four times in five, uncorrected."
        )
    return lines


# ---- columns ---------------------------------------------------------------------------------------------------------

AGAINST_BEST = ("less the best", "p", "detectable")


def grid_of(table: ComparisonTable, heads: Sequence[str], means: Sequence[str] = ()) -> Grid:
    """The arms with the columns of these heads, which `_cells` has; those of `means` are shown without intervals."""
    rows = []
    for arm in table.arms:
        cells = _cells(table, arm)
        cells |= {head: cells[head].partition(" ")[0] for head in means}
        shown = [arm.name, *(cells[head] for head in heads)]
        rows.append(Row.of(shown, "bound" if arm.bound else "", best=arm is table.best))
    columns = (Column(head, align="left" if head == axis_of(table) else "right") for head in heads)
    return Grid((Column("", align="left", wrap=True), *columns), tuple(rows))


def _cells(table: ComparisonTable, arm: ComparedArm) -> dict[str, str]:
    """Every cell of an arm by the head of its column."""
    cells = {
        _written(table, metric): f"{found.mean:.4f} [{found.low:.4f}, {found.high:.4f}]"
        for metric, found in arm.estimates.items()
    }
    cells |= dict(zip(AGAINST_BEST, _against_best(arm.against_best), strict=True))
    return cells | {axis_of(table): interval_text(arm.estimates[table.metric], *_ends(table), PLOT_WIDTH)}


def _against_best(test: Comparison | None) -> tuple[str, str, str]:
    """The difference to the best arm, its corrected p value, with * where something may be claimed, and the smallest
    difference that would show."""
    if test is None:
        return "", "", ""
    p = ("<0.001" if test.p_adjusted < 0.001 else f"{test.p_adjusted:.3f}") + ("*" if test.claim else "")
    detectable = "" if test.detectable is None else f"{test.detectable:.4f}"
    return f"{test.mean:+.4f} [{test.low:+.4f}, {test.high:+.4f}]", p, detectable


def _written(table: ComparisonTable, metric: str) -> str:
    return metric_name(Metric.of(metric, table.protocol))


def _metrics(table: ComparisonTable) -> list[str]:
    return [_written(table, metric) for metric in table.arms[0].estimates]


def _ends(table: ComparisonTable) -> tuple[float, float]:
    intervals = [arm.estimates[table.metric] for arm in table.arms]
    return min(each.low for each in intervals), max(each.high for each in intervals)


def axis_of(table: ComparisonTable) -> str:
    """The head of the plot in the terminal: the ends of its axis."""
    low, high = _ends(table)
    return f"{low:<{PLOT_WIDTH // 2}.4f}{high:>{PLOT_WIDTH // 2}.4f}"


def interval_text(estimate: Interval, low: float, high: float, width: int) -> str:
    """An interval as text on an axis from `low` to `high` of `width` characters.

    >>> interval_text(Interval(mean=0.5, low=0.25, high=0.75), 0.0, 1.0, 9)
    '  |-o-|  '
    """
    span = (high - low) or 1.0
    left, middle, right = (round((x - low) / span * (width - 1)) for x in (estimate.low, estimate.mean, estimate.high))
    marks = [" "] * width
    marks[left : right + 1] = "-" * (right - left + 1)
    marks[left] = marks[right] = "|"
    marks[middle] = "o"
    return "".join(marks)


# ---- terminal, page, papers ------------------------------------------------------------------------------------------


def print_tables(tables: Sequence[ComparisonTable], file: TextIO | None = None, *, width: int | None = None) -> None:
    """Print each table, with as many columns as fit, and its notes; `file` and `width` as in `console_for`."""
    console = console_for(file, width)
    sections = []
    for table in tables:
        first, *others = _metrics(table)
        heads = [first, *AGAINST_BEST, *others[:1], axis_of(table)]
        grids = [grid_of(table, heads[:count], means=others[:1]) for count in range(len(heads), 0, -1)]
        sections.append(replace(_section(table), tables=[widest_fitting(grids, console)]))
    print_sections(console, sections)


def comparison_page(tables: Sequence[ComparisonTable]) -> str:
    """One HTML page of all tables and plots, without scripts or links to elsewhere."""
    runs = dict.fromkeys(run for table in tables for run in table.runs)
    return render("Comparison of " + ", ".join(runs), list(map(_section, tables)))


def _section(table: ComparisonTable) -> Section:
    first, *others = _metrics(table)
    lines = notes(table)
    return Section(
        title=title_of(table),
        warning=UNCERTIFIED if UNCERTIFIED in lines else "",
        figures={f"{first} with 95 % intervals; a hollow dot: no difference from the best is shown": plot(table)},
        tables=[grid_of(table, [first, *AGAINST_BEST, *others])],
        notes=[*(line for line in lines if line != UNCERTIFIED), settings_line(table.settings)],
    )


def plot(table: ComparisonTable) -> Markup:
    """Each arm's mean and interval by the table's metric, with a dashed line at the best.

    A full dot differs from the best, as far as may be claimed; a hollow one does not. The best has the accent colour,
    bounds a pale one.
    """
    marks = {}
    for arm in table.arms:
        main, best = arm.estimates[table.metric], arm is table.best
        differs = arm.bound or best or (arm.against_best is not None and arm.against_best.claim)
        colour = "muted" if arm.bound else "accent" if best else "bar"
        marks[arm.name] = [Value(main.mean, (main.low, main.high), colour, dot=True, hollow=not differs)]
    level = table.best.estimates[table.metric].mean if table.best else None
    low, high = _ends(table)
    return row_chart(marks, "{:.4f}", low=low, high=high, level=level)


def markdown_table(table: ComparisonTable) -> str:
    """A table in Markdown, the best arm bold, with what was asked below."""
    below = printable(f"{title_of(table)}. {' '.join(notes(table))}")
    return f"{_for_papers(table).markdown()}\n\n{below}\n"


def latex_table(table: ComparisonTable) -> str:
    """A table in LaTeX, the best arm bold, for a document that uses the package booktabs."""
    comment = "\n".join(f"% {printable(line)}" for line in (title_of(table), *notes(table)))
    return f"{comment}\n{_for_papers(table).latex(warnings(table))}"


def _for_papers(table: ComparisonTable) -> Grid:
    return grid_of(table, [*_metrics(table), *AGAINST_BEST[:2]])
