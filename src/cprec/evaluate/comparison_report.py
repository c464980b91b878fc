"""Tables of compared arms, as people read them: in the terminal, as HTML with a plot, as Markdown and LaTeX."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, TextIO

from cprec.evaluate.charts import WIDTH, number, ticks
from cprec.evaluate.markup import latex_text, markdown_rows
from cprec.evaluate.report import UNCERTIFIED, html_page, metric_name
from cprec.evaluate.statistics import ALPHA, MIN_QUERIES, Comparison

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable

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
    "data_sha256": "data",
    "tie_order": "order of events at equal times",
    "part": "part asked for",
    "num_queries": "number of queries",
    "queries_sha256": "queries",
    "candidates_uniform_sha256": "uniform candidates",
    "candidates_popularity_sha256": "candidates drawn by popularity",
    "num_candidates": "number of candidates",
    "seen": "seen items",
    "catalogue_sha256": "catalogue",
    "num_items": "number of items",
    "k": "K",
    "certificate": "leakage certificate",
}
"""Keys of `protocol.json` as people say them; others are shown as they are."""


# ---- what a table holds ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean with its 95 % interval."""

    mean: float
    """Over queries, and over seeds where there are several."""
    low: float
    """Lower end; over users, and over seeds where there are several."""
    high: float
    """Upper end."""
    error_users: float | None = None
    """Standard error from the users; None for a single seed, where the interval says it."""
    error_seeds: float | None = None
    """Standard error that seeds add; None for a single seed, which tells nothing of it."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """An arm of a table."""

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
class Table:
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
    rows: tuple[Row, ...]
    """The arms."""
    comparisons: Mapping[tuple[str, str], Comparison]
    """Every pair of arms, the first less the second by the first metric; Holm's correction is over all of them."""

    @property
    def metric(self) -> str:
        """The metric that arms are compared by."""
        return next(iter(self.rows[0].estimates))

    @property
    def best(self) -> Row | None:
        """The arm of the highest mean, bounds aside."""
        return next((row for row in self.rows if not row.bound), None)


# ---- words -----------------------------------------------------------------------------------------------------------


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


def title_of(table: Table) -> str:
    """A heading: domain, way of asking, number of queries."""
    return f"{table.domain}: {PROTOCOLS.get(table.protocol, table.protocol)}, {table.num_queries:,} queries"


def settings_line(table: Table) -> str:
    """What the numbers of a table depend on, hashes aside."""
    left_out = {"domain", "num_queries"}
    shown = {key: value for key, value in table.settings.items() if not key.endswith("_sha256") and key not in left_out}
    return "; ".join(f"{key_in_words(key)}: {in_words(key, value)}" for key, value in shown.items())


def warnings(table: Table) -> list[str]:
    """What no copy of the numbers may go without."""
    lines = []
    if table.settings.get("certificate") == "uncertified":
        lines.append(UNCERTIFIED)
    if table.num_queries < MIN_QUERIES:
        lines.append(f"No claim under {MIN_QUERIES:,} queries: there are {table.num_queries:,}.")
    return lines


def notes(table: Table) -> list[str]:
    """What a reader must know beside the numbers: warnings, seeds, how the columns were made."""
    lines = warnings(table)
    for row in table.rows:
        main = row.estimates[table.metric]
        if main.error_users is not None and main.error_seeds is not None:
            lines.append(
                f"{row.name}: standard error of {metric_name(table.metric)} {main.error_users:.4f} from users, "
                f"{main.error_seeds:.4f} from seeds."
            )
    lines.append("Intervals are 95 % over users, and over seeds where an arm has several.")
    if len({row.num_seeds > 1 for row in table.rows}) > 1:
        lines.append(
            "A trained arm of one seed beside one of several: its seeds are taken to vary as those of the other do."
        )
    if table.comparisons:
        lines.append(
            f"Less the best: on the same queries. p: corrected by Holm over all {len(table.comparisons):,} pairs of "
            f"arms; * is below {ALPHA}, which tells an arm from the best. Detectable: the smallest true difference "
            "that this test set shows four times in five, uncorrected."
        )
    return lines


def _interval(estimate: Estimate) -> str:
    return f"{estimate.mean:.4f} [{estimate.low:.4f}, {estimate.high:.4f}]"


def _difference(comparison: Comparison | None) -> str:
    return "" if comparison is None else f"{comparison.mean:+.4f} [{comparison.low:+.4f}, {comparison.high:+.4f}]"


def _p_value(comparison: Comparison | None) -> str:
    """A corrected p value, with * where something may be claimed."""
    if comparison is None:
        return ""
    p = comparison.p_adjusted
    return ("<0.001" if p < 0.001 else f"{p:.3f}") + ("*" if comparison.claim else "")


def _detectable(comparison: Comparison | None) -> str:
    return "" if comparison is None or comparison.detectable is None else f"{comparison.detectable:.4f}"


# ---- terminal --------------------------------------------------------------------------------------------------------


def print_tables(tables: Sequence[Table], file: TextIO | None = None, *, width: int | None = None) -> None:
    """Print each table with its notes. `file` is standard output if None; `width` in columns is the terminal's if None,
    and where there is no terminal 100 at least. A table has as many columns as fit."""
    from rich.console import Console
    from rich.text import Text

    console = Console(file=file, width=width, highlight=False)
    if width is None and not console.is_terminal:
        console = Console(file=file, width=max(console.width, 100), highlight=False)
    for table in tables:
        console.print()
        console.print(Text(_printable(title_of(table)), style="bold"))
        console.print(_fitting(table, console))
        for line in notes(table):
            console.print(Text(_printable(line), style="bold red" if line == UNCERTIFIED else "dim"))
        console.print(Text(_printable(settings_line(table)), style="dim"))
    console.print()


def _printable(text: str) -> str:
    """No name may steer the terminal."""
    return "".join(char if char.isprintable() else " " for char in text)


def _fitting(table: Table, console: Console) -> RichTable:
    """The table with the most columns that is no wider than the console."""
    from rich.measure import Measurement

    columns = ["estimate", "difference", "p", "detectable", "second", "plot"]
    room = console.options.update(max_width=10_000)  # a table's own wish, whatever the console's width
    for count in range(len(columns), 0, -1):
        made = _rich_table(table, columns[:count])
        if Measurement.get(console, room, made).maximum <= console.width:
            break
    return made


def _rich_table(table: Table, columns: Sequence[str]) -> RichTable:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    low = min(row.estimates[table.metric].low for row in table.rows)
    high = max(row.estimates[table.metric].high for row in table.rows)
    second = next((metric for metric in table.rows[0].estimates if metric != table.metric), None)
    heads = {
        "estimate": metric_name(table.metric),
        "difference": "less the best",
        "p": "p",
        "second": metric_name(second) if second else "",
        "detectable": "detectable",
        "plot": f"{low:<10.4f}{high:>10.4f}",
    }
    made = RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0))
    made.add_column("")
    for column in columns:
        made.add_column(heads[column], justify="left" if column == "plot" else "right", no_wrap=True)
    for row in table.rows:
        main = row.estimates[table.metric]
        cells = {
            "estimate": _interval(main),
            "difference": _difference(row.against_best),
            "p": _p_value(row.against_best),
            "second": f"{row.estimates[second].mean:.4f}" if second else "",
            "detectable": _detectable(row.against_best),
            "plot": interval_text(main, low, high, 20),
        }
        style = "dim" if row.bound else "bold" if row == table.best else ""
        made.add_row(*(Text(_printable(text), style=style) for text in [row.name, *(cells[name] for name in columns)]))
    return made


def interval_text(estimate: Estimate, low: float, high: float, width: int) -> str:
    """An interval as text on an axis from `low` to `high` of `width` characters.

    >>> interval_text(Estimate(mean=0.5, low=0.25, high=0.75), 0.0, 1.0, 9)
    '  |-o-|  '
    """
    span = (high - low) or 1.0
    left, middle, right = (round((x - low) / span * (width - 1)) for x in (estimate.low, estimate.mean, estimate.high))
    marks = [" "] * width
    marks[left : right + 1] = "-" * (right - left + 1)
    marks[left] = marks[right] = "|"
    marks[middle] = "o"
    return "".join(marks)


# ---- HTML ------------------------------------------------------------------------------------------------------------

ROW, LONGEST_NAME = 32, 48
"""Height of an arm in the plot, in units of the drawing, and characters of its name that are shown."""


def forest_plot(table: Table) -> str:
    """An SVG of each arm's mean and interval by the table's metric, with a dashed line at the best.

    A full dot is told from the best, a hollow one is not; the best has the accent colour, bounds a pale one.
    """
    cells = [(row, row.estimates[table.metric]) for row in table.rows]
    low, high = min(cell.low for _, cell in cells), max(cell.high for _, cell in cells)
    edge, bottom = 8, ROW * len(cells) + 6
    over = 'paint-order="stroke" stroke="var(--page)" stroke-width="4"'  # no line runs through a text

    def place(value: float) -> float:
        return edge + (value - low) / ((high - low) or 1.0) * (WIDTH - 2 * edge)

    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {bottom + 32}" role="img" '
        f'aria-label="{escape(metric_name(table.metric))} of {len(cells)} arms with intervals">'
    ]
    for tick in ticks(low, high, 5):
        x = place(tick)
        anchor = "start" if x < 14 else "end" if x > WIDTH - 14 else "middle"
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{bottom}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 13}" text-anchor="{anchor}">{number(tick)}</text>')
    if table.best:
        x = place(table.best.estimates[table.metric].mean)
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{bottom}" stroke="var(--accent)" stroke-dasharray="3 3"/>'
        )
    for place_of, (row, cell) in enumerate(cells):
        top, middle = ROW * place_of, ROW * place_of + 23
        colour = "var(--muted)" if row.bound else "var(--accent)" if row == table.best else "var(--bar)"
        full = row.bound or row == table.best or (row.against_best is not None and row.against_best.claim)
        left, centre, right = (place(value) for value in (cell.low, cell.mean, cell.high))
        shown = row.name if len(row.name) <= LONGEST_NAME else row.name[: LONGEST_NAME - 1] + "\u2026"
        parts.append(
            f"<g><title>{escape(row.name)}: {_interval(cell)}</title>"
            f'<text x="{edge}" y="{top + 13}" {over}>{escape(shown)}</text>'
            f'<text x="{WIDTH - edge}" y="{top + 13}" text-anchor="end" {over}>{cell.mean:.4f}</text>'
            f'<line x1="{left:.1f}" x2="{right:.1f}" y1="{middle}" y2="{middle}" stroke="{colour}" stroke-width="2"/>'
            f'<circle cx="{centre:.1f}" cy="{middle}" r="3.5" stroke="{colour}" stroke-width="2" '
            f'fill="{colour if full else "var(--page)"}"/></g>'
        )
    parts.append(f'<text x="{WIDTH / 2:.0f}" y="{bottom + 27}" text-anchor="middle">{metric_name(table.metric)}</text>')
    return "".join(parts) + "</svg>"


def html_of(tables: Sequence[Table]) -> str:
    """One HTML page of all tables and plots, without scripts or links to elsewhere."""
    runs = list(dict.fromkeys(run for table in tables for run in table.runs))
    title = escape("Comparison of " + ", ".join(runs))
    return html_page(title, [f"<h1>CPRec: {title}</h1>", *(_section(table) for table in tables)])


def _section(table: Table) -> str:
    metrics = list(table.rows[0].estimates)
    heads = [metric_name(table.metric), "less the best", "p", "detectable", *(metric_name(m) for m in metrics[1:])]
    body = ""
    for row in table.rows:
        cells = [_interval(row.estimates[table.metric]), _difference(row.against_best), _p_value(row.against_best)]
        cells += [_detectable(row.against_best), *(_interval(row.estimates[metric]) for metric in metrics[1:])]
        name = f"<strong>{escape(row.name)}</strong>" if row == table.best else escape(row.name)
        body += f"<tr><th>{name}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
    caption = f"{metric_name(table.metric)} with 95 % intervals; a hollow dot is not told from the best"
    warning = ' class="warning"'
    lines = "".join(f"<p{warning if line == UNCERTIFIED else ''}>{escape(line)}</p>" for line in notes(table))
    return (
        f"<section><h2>{escape(title_of(table))}</h2><figure><figcaption>{escape(caption)}</figcaption>{forest_plot(table)}</figure>"
        f'<div class="scroll"><table class="metrics"><tr><th></th>{"".join(f"<th>{head}</th>" for head in heads)}</tr>'
        f'{body}</table></div><div class="box">{lines}<p>{escape(settings_line(table))}</p></div></section>'
    )


# ---- for papers ------------------------------------------------------------------------------------------------------


def _for_papers(table: Table) -> list[list[str]]:
    metrics = list(table.rows[0].estimates)
    lines = [["", *(metric_name(metric) for metric in metrics), "less the best", "p"]]
    for row in table.rows:
        means = [_interval(row.estimates[metric]) for metric in metrics]
        lines.append([row.name, *means, _difference(row.against_best), _p_value(row.against_best)])
    return lines


def markdown_table(table: Table) -> str:
    """A table in Markdown, the best arm bold, with what was asked below."""
    head, *lines = _for_papers(table)
    best = next((number for number, row in enumerate(table.rows) if row == table.best), None)
    return f"{markdown_rows(head, lines, best)}\n\n{title_of(table)}. {' '.join(notes(table))}\n"


def latex_table(table: Table) -> str:
    """A table in LaTeX, the best arm bold, for a document that uses the package booktabs."""
    head, *lines = _for_papers(table)
    rows = []
    for row, cells in zip(table.rows, lines, strict=True):
        escaped = [latex_text(cell) for cell in cells]
        rows.append([rf"\textbf{{{cell}}}" if cell and row == table.best else cell for cell in escaped])
    body = "\n".join(f"{' & '.join(cells)} \\\\" for cells in rows)
    comment = "\n".join(f"% {line}" for line in (title_of(table), *notes(table)))
    below = "".join(f"\\multicolumn{{{len(head)}}}{{l}}{{{latex_text(line)}}} \\\\\n" for line in warnings(table))
    return (
        f"{comment}\n\\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}\n\\toprule\n"
        f"{' & '.join(map(latex_text, head))} \\\\\n\\midrule\n{body}\n\\bottomrule\n{below}\\end{{tabular}}\n"
    )
