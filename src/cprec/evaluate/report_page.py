"""The results of an evaluation for people: in the terminal, on a page, in Markdown and in LaTeX."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TextIO

from markupsafe import Markup
from rich.console import Console
from rich.table import Table

from cprec.evaluate.charts import Bar, bars
from cprec.evaluate.grid import Cell, Column, Grid, Row, console_for, latex_text, print_line, printable, widest_fitting
from cprec.evaluate.pages import SHOWN_HISTORY, Section, render
from cprec.evaluate.results import (
    CANDIDATES_POPULARITY,
    CANDIDATES_UNIFORM,
    FULL,
    FULL_WITH_SEEN,
    NEW_ITEMS,
    Arm,
    CertificateSummary,
    Difference,
    DomainResult,
    Example,
    Interval,
    Metric,
    Report,
)
from cprec.evaluate.slices import ABOUT
from cprec.evaluate.statistics import ALPHA, MIN_QUERIES
from cprec.evaluate.training_page import final_section, run_section
from cprec.evaluate.training_run import TrainingRun
from cprec.files import write_whole

UNCERTIFIED = "UNCERTIFIED: no clean leakage certificate covers these results. They may rest on held-out events."
METRICS = {"ndcg": "NDCG", "recall": "Recall", "mrr": "MRR", "precision": "Precision", "map": "MAP"}
LISTS = {
    "coverage": "share of the catalogue that is in at least one list",
    "gini": "inequality of how often items are listed; 0 is even",
    "novelty": "bits: how rare the listed items were in training",
    "tail_share": "share of listed items outside the most popular 20 %",
    "diversity": "mean distance of the titles in a list",
}
"""Measures of lists, with what they are."""
SEEN_RULES = {FULL_WITH_SEEN: "seen kept", FULL: "seen left out"}
COLOURS = {"model": "accent", "baseline": "bar", "bound": "muted"}


# ---- in words --------------------------------------------------------------------------------------------------------


def metric_name(metric: Metric) -> str:
    """A metric as people write it.

    >>> metric_name(Metric("ndcg", 10, FULL)), metric_name(Metric("mrr", None, FULL))
    ('NDCG@10', 'MRR')
    """
    return METRICS[metric.name] + ("" if metric.k is None else f"@{metric.k}")


def domain_line(result: DomainResult) -> str:
    """One line on a domain: whether pre-training saw it, items, queries."""
    seen = {True: "unseen in pre-training, ", False: "seen in pre-training, ", None: ""}[result.unseen]
    return f"{result.domain}: {seen}{result.num_items:,} items, {result.num_queries:,} queries"


def difference_line(difference: Difference) -> str:
    """A paired comparison as a sentence, which claims a winner only if `MIN_QUERIES` were asked, 0 lies outside the
    interval and the corrected p value is below 5 %.

    >>> from cprec.evaluate.statistics import Comparison
    >>> line = {"mean": 0.02, "low": 0.01, "high": 0.03, "p_value": 0.001, "num_queries": 2000, "detectable": 0.014}
    >>> test = Comparison(**line, p_adjusted=0.002)
    >>> difference_line(Difference(a="new", b="old", metric=Metric("ndcg", 10, FULL), test=test))
    'new beats old by 0.0200 NDCG@10 [0.0100, 0.0300] (2,000 queries, p 0.0020, could find 0.0140)'
    """
    a, b, test, metric = difference.a, difference.b, difference.test, metric_name(difference.metric)
    found = "" if test.detectable is None else f", could find {test.detectable:.4f}"
    queries = f"({test.num_queries:,} queries, p {test.p_adjusted:.4f}{found})"
    verdict = "no difference shown"
    if test.num_queries < MIN_QUERIES:
        verdict = f"no claim under {MIN_QUERIES:,} queries"
    elif test.p_adjusted < ALPHA and test.low > 0:
        return f"{a} beats {b} by {test.mean:.4f} {metric} [{test.low:.4f}, {test.high:.4f}] {queries}"
    elif test.p_adjusted < ALPHA and test.high < 0:
        return f"{b} beats {a} by {-test.mean:.4f} {metric} [{-test.high:.4f}, {-test.low:.4f}] {queries}"
    return f"{a} against {b}: {verdict}, {test.mean:+.4f} {metric} [{test.low:+.4f}, {test.high:+.4f}] {queries}"


def certificate_line(certificate: CertificateSummary) -> str:
    """What the leakage certificate found."""
    found = f"{certificate.checked:,} checks, {certificate.violations:,} violations"
    if certificate.uncertified:
        return UNCERTIFIED
    return f"clean ({found}) and covers every model and query here" if certificate.clean else f"not clean ({found})"


def protocol_lines(report: Report) -> dict[str, str]:
    """What every number depends on, the certificate and the bound included."""
    lines = {**report.protocol, "leakage certificate": certificate_line(report.certificate)}
    bounds = {arm.name for result in report.domains.values() for arm in result.arms.values() if arm.kind == "bound"}
    if bounds:
        names = ", ".join(sorted(bounds))
        lines["bound"] = f"{names}: ranks by the true chances of this generated world; none is better on average"
    return lines


def explanation(k: int | None) -> str:
    """What the leading metrics are."""
    return (
        f"Recall@{k} is the share of queries whose held-out item is among the first {k}; NDCG@{k} also counts how far "
        "up it stands (1 is always first, 0 never listed). Intervals are 95 % over queries."
    )


def ranking_lines(result: DomainResult) -> list[str]:
    """What is known of the questions and of how exact each model's lists are, and what it wrote freely."""
    lines = list(result.notes)
    for arm in result.arms.values():
        if arm.proofs:
            line = f"{arm.name}: {arm.proofs.proven:.1%} of the lists proven exact"
            if arm.proofs.proven < 1:
                gap = arm.proofs.mean_gap
                line += f"; in the others a missed item could score up to {gap:.2f} more than the last (mean)"
            line += f"; {arm.proofs.expanded:,.0f} prefixes read a query"
            if found := arm.found_of_exact:
                line += f"; {found.share:.1%} of the exact lists found ({found.num_queries} queries)"
            lines.append(line)
        if free := arm.generated:
            lines.append(
                f"{arm.name}, writing freely: ValidRatio {free.valid_ratio:.3f}, HR@1-all {free.hit_rate_all:.4f}, "
                f"HR@1-valid {free.hit_rate_valid:.4f}"
            )
    return lines


# ---- terminal --------------------------------------------------------------------------------------------------------


def print_report(
    report: Report, examples: Sequence[Example] = (), file: TextIO | None = None, *, width: int | None = None
) -> None:
    """Print one table of all domains and arms, paired comparisons, the protocol, and examples.

    `file` and `width` are as in `console_for`. The table has as many metrics as fit.
    """
    console = console_for(file, width)
    heading = "bold underline" if console.is_terminal else ""
    alarm = "bold red" if report.certificate.uncertified else "dim"

    def line(text: str, style: str = "", indent: int = 0) -> None:
        print_line(console, text, style, indent)

    console.print()
    line(report.title, heading)
    if report.certificate.uncertified:
        line(UNCERTIFIED, alarm)
    console.print()
    console.print(_terminal_table(report, console))
    console.print()
    line(explanation(report.main.k), "dim")
    for result in report.domains.values():
        console.print()
        line(domain_line(result), heading)
        for difference in result.differences:
            line(difference_line(difference), indent=2)
        for text in ranking_lines(result):
            line(text, "dim", 2)
    console.print()
    line("How this was measured", heading)
    for name, text in protocol_lines(report).items():
        line(f"{name}: {text}", alarm if name == "leakage certificate" else "dim", 2)
    for example in examples:
        console.print()
        line(f"User {example.user} in {example.domain}", heading)
        _print_example(console, example)
    console.print()


def _print_example(console: Console, example: Example) -> None:
    more = len(example.history) - SHOWN_HISTORY
    print_line(console, f"had, latest last{f' ({more:,} earlier left out)' if more > 0 else ''}:", indent=2)
    for title in example.history[-SHOWN_HISTORY:]:
        print_line(console, title, indent=5)
    print_line(console, "held out, came next:", indent=2)
    print_line(console, example.target, "bold", 5)
    for arm, found in example.recommendations.items():
        print_line(console, f"{arm} recommends:", indent=2)
        for place, (title, score) in enumerate(found, 1):
            hit = title == example.target
            text = f"{place}. {title} ({score:.2f}){'  <- came next' if hit else ''}"
            print_line(console, text, "green" if hit else "", 5)


def _terminal_table(report: Report, console: Console) -> Table:
    """The table with the most columns that is no wider than the console."""
    first, second, *others = _leading_metrics(report.main)
    sampled = Metric("recall", 1, CANDIDATES_UNIFORM)
    short = dict.fromkeys(others, False)
    offers = [
        {first: True, second: True, **short, sampled: True},
        {first: True, second: True, **short, sampled: False},
        {first: True, second: True, sampled: False},
        {first: True, second: False, sampled: False},
        {first: True},
    ]
    return widest_fitting([_terminal_grid(report, columns) for columns in offers], console)


def _leading_metrics(main: Metric) -> list[Metric]:
    """Metrics of the full catalogue in short tables, the most important first."""
    others = (replace(main, name="recall"), replace(main, k=5), replace(main, name="mrr", k=None))
    return list(dict.fromkeys([main, *others]))


def _terminal_grid(report: Report, metrics: Mapping[Metric, bool]) -> Grid:
    """A section of arms for each domain; `metrics` says of each metric whether its interval is shown."""
    pools = next(iter(report.domains.values())).pools
    columns = []
    for metric, interval in metrics.items():
        if metric.pool == report.main.pool or metric.pool in pools:
            pool = f"{pools[metric.pool].num_items}\ncandidates" if metric.pool in pools else "full\ncatalogue"
            form = MEAN_AND_SHORT_INTERVAL if interval else MEAN
            columns.append(_metric_column(metric, form.format, f"{metric_name(metric)}\n{pool}"))
    rows: list[Row] = []
    for result in report.domains.values():
        seen = {True: " (unseen)", False: " (seen)", None: ""}[result.unseen]
        grid = _arm_grid(result, columns)
        rows += [Row.of([f"{result.domain}{seen}"], "section"), *grid.rows]
    return replace(grid, rows=tuple(rows))


# ---- tables of arms --------------------------------------------------------------------------------------------------

ArmColumn = tuple[Column, Callable[[Arm], Cell | str]]
"""A column, and what makes the cell of an arm: '' where the arm has nothing to show there."""

MEAN, SHORT_MEAN = "{0.mean:.4f}", "{0.mean:.3f}"
MEAN_AND_SHORT_INTERVAL = "{0.mean:.4f} [{0.low:.3f}, {0.high:.3f}]"


def _mean_beside_interval(cell: Interval) -> Cell:
    return Cell(f"{cell.mean:.4f}", f"[{cell.low:.4f}, {cell.high:.4f}]")


def _mean_above_interval(cell: Interval) -> Cell:
    return Cell(f"{cell.mean:.4f}", f"{cell.low:.4f} to {cell.high:.4f}")


def _metric_column(metric: Metric, shown: Callable[[Interval], Cell | str], head: str = "") -> ArmColumn:
    column = Column(head or metric_name(metric))
    return column, lambda arm: shown(arm.metrics[metric]) if metric in arm.metrics else ""


def _arm_grid(result: DomainResult, columns: Iterable[ArmColumn], caption: str = "") -> Grid:
    """A row for each arm of a domain that has anything to show in these columns."""
    heads, cells_of = zip(*columns, strict=True)
    rows = []
    for arm in result.arms.values():
        cells = [cell_of(arm) for cell_of in cells_of]
        if any(cells):
            kind = "" if arm.kind == "baseline" else arm.kind
            rows.append(Row.of([arm.name, *cells], kind, best=arm is result.best()))
    return Grid((Column("", align="left", wrap=True), *heads), tuple(rows), caption)


# ---- for papers ------------------------------------------------------------------------------------------------------


def markdown_table(report: Report, domain: str) -> str:
    """The table of a domain in Markdown, with a line below that says what was asked; the best arm's row is bold.

    NDCG and Recall at the cut with intervals; beside them, where arms have them, both under the other rule for seen
    items, Recall@1 among each kind of candidates, coverage, and the seconds of training.

    Raises ValueError if the report has no such domain.
    """
    result = _domain(report, domain)
    table = _arm_grid(result, _markdown_columns(result)).without_empty_columns()
    pool = "full catalogue unless another pool is named, 95 % intervals in brackets"
    warning = "" if result.certified else f" {UNCERTIFIED}"
    return f"{table.markdown()}\n\n{printable(domain_line(result))}; {pool}.{warning}\n"


def latex_table(report: Report, domain: str) -> str:
    """The table of a domain in LaTeX (booktabs), intervals as small print; the best arm is bold.

    Raises ValueError if the report has no such domain.
    """
    result = _domain(report, domain)
    table = _arm_grid(
        result, [_metric_column(metric, _mean_beside_interval) for metric in _leading_metrics(result.main)]
    )
    warning = "" if result.certified else f"{UNCERTIFIED} "
    caption = latex_text(f"{warning}{domain_line(result)}; full catalogue, 95 % intervals")
    return f"\\begin{{table}}\n\\caption{{{caption}}}\n{table.latex()}\\end{{table}}\n"


def _domain(report: Report, domain: str) -> DomainResult:
    if domain not in report.domains:
        raise ValueError(f"domain={domain!r} is not in this report: it has {', '.join(report.domains)}")
    return report.domains[domain]


def _markdown_columns(result: DomainResult) -> list[ArmColumn]:
    leading = (result.main, replace(result.main, name="recall"))
    columns = [_metric_column(metric, _mean_beside_interval) for metric in leading]
    for pool, rule in SEEN_RULES.items():
        others = (replace(metric, pool=pool) for metric in leading if pool != metric.pool)
        columns += [_metric_column(metric, MEAN.format, f"{metric_name(metric)}, {rule}") for metric in others]
    for pool, head in ((CANDIDATES_UNIFORM, "Recall@1 of {}, uniform"), (CANDIDATES_POPULARITY, "of {}, popular")):
        if asked := result.pools.get(pool):
            columns.append(_metric_column(Metric("recall", 1, pool), SHORT_MEAN.format, head.format(asked.num_items)))
    coverage = (Column("coverage"), lambda arm: f"{arm.lists['coverage']:.2f}" if "coverage" in arm.lists else "")
    return [*columns, coverage, (Column("seconds of training"), _train_seconds)]


def _train_seconds(arm: Arm) -> str:
    return "" if arm.cost.train_seconds is None else f"{arm.cost.train_seconds:,.0f}"


# ---- page ------------------------------------------------------------------------------------------------------------


def write_report_page(
    path: str | Path, report: Report, runs: Mapping[str, TrainingRun], examples: Sequence[Example]
) -> None:
    """Write the report as one HTML file without scripts or links to elsewhere; it appears complete or not at all."""
    write_whole(path, report_page(report, runs, examples))


def report_page(report: Report, runs: Mapping[str, TrainingRun], examples: Sequence[Example]) -> str:
    """The text of the page. Runs named `GROUP: ARM` share the charts of their group; one without a log is left out."""
    protocol = Section(
        title="How this was measured",
        boxed=True,
        warning=UNCERTIFIED if report.certificate.uncertified else "",
        terms=protocol_lines(report),
        notes=[explanation(report.main.k)],
    )
    sections = [protocol, *map(_domain_section, report.domains.values())]
    if examples:
        sections.append(Section(title="What users are recommended", examples=examples))
    logged = {name: run for name, run in runs.items() if run.records}
    if logged:
        sections.append(final_section(list(logged.values()), "What was trained"))
    groups: dict[str, dict[str, TrainingRun]] = {}
    for name, run in logged.items():
        group, _, arm = name.partition(": ")
        groups.setdefault(group, {})[arm or name] = run
    sections += [run_section(f"Training: {group}", members) for group, members in groups.items()]
    return render(report.title, sections)


def _domain_section(result: DomainResult) -> Section:
    leading = [result.main, replace(result.main, name="recall")]
    figures = {f"{metric_name(metric)}, full catalogue": _bars(result, metric) for metric in leading}
    if uniform := result.pools.get(CANDIDATES_UNIFORM):
        figures[f"Recall@1, {uniform.num_items} candidates"] = _bars(result, Metric("recall", 1, CANDIDATES_UNIFORM))
    lines = [*map(difference_line, result.differences), *ranking_lines(result)]
    return Section(
        title=domain_line(result),
        warning="" if result.certified else UNCERTIFIED,
        points=[("", line) for line in lines],
        figures=figures,
        fold="All metrics",
        details=[*_pool_grids(result), *_slice_grids(result), _list_grid(result), _cost_grid(result)],
    )


def _bars(result: DomainResult, metric: Metric) -> Markup:
    rows = {}
    for name, arm in result.arms.items():
        cell = arm.metrics[metric]
        rows[name] = [Bar(cell.mean, (cell.low, cell.high), COLOURS[arm.kind])]
    return bars(rows, "{:.4f}")


def _pool_grids(result: DomainResult) -> Iterator[Grid]:
    """All metrics over the full catalogue and uniform candidates, and the leading ones over the other pools."""
    main, pools, first = result.main, result.pools, next(iter(result.arms.values()))
    recall = replace(main, name="recall")
    captions = {main.pool: "Full catalogue. MRR counts items that were listed only"}
    if uniform := pools.get(CANDIDATES_UNIFORM):
        captions[CANDIDATES_UNIFORM] = f"{uniform.num_items} candidates, the others uniform"
    for pool, caption in captions.items():
        seconds = (Column("seconds"), partial(_seconds_of, pool))
        yield _arm_grid(result, [*(_metric_column(m, _mean_above_interval) for m in first.of(pool)), seconds], caption)
    others = {
        FULL_WITH_SEEN: ("Full catalogue, seen items may be recommended again", [main, recall]),
        FULL: ("Full catalogue, seen items left out", [main, recall]),
    }
    if popular := pools.get(CANDIDATES_POPULARITY):
        caption = f"{popular.num_items} candidates, the others by popularity"
        others[CANDIDATES_POPULARITY] = (caption, [Metric("recall", 1, main.pool)])
    if new := pools.get(NEW_ITEMS):
        caption = (
            f"New items: the {new.num_queries:,} queries whose target never occurs in training, ranked among the "
            f"{new.num_items:,} items that do not. An arm that knows items by their events alone names none, or ranks "
            "them by nothing it has learnt."
        )
        others[NEW_ITEMS] = (caption, [main, recall])
    for pool, (caption, metrics) in others.items():
        if pool != main.pool:
            columns = [_metric_column(replace(metric, pool=pool), _mean_above_interval) for metric in metrics]
            yield _arm_grid(result, columns, caption)


def _seconds_of(pool: str, arm: Arm) -> str:
    return f"{arm.seconds[pool]:.1f}" if pool in arm.seconds else ""


def _slice_grids(result: DomainResult) -> Iterator[Grid]:
    def cell(name: str, group: str, arm: Arm) -> Cell | str:
        return _mean_above_interval(arm.slices[name][group].metrics[result.main]) if name in arm.slices else ""

    slices = next((arm.slices for arm in result.arms.values() if arm.slices), {})
    for name, groups in slices.items():
        columns = [
            (Column(group, f"{asked.num_queries:,} queries"), partial(cell, name, group))
            for group, asked in groups.items()
        ]
        yield _arm_grid(result, columns, f"{metric_name(result.main)} by {name}: {ABOUT[name]}")


def _list_grid(result: DomainResult) -> Grid:
    def cell(name: str, arm: Arm) -> str:
        return f"{arm.lists[name]:.3f}" if name in arm.lists else ""

    shown = {name: name.replace("_", " ") for name in LISTS}
    caption = "Lists: " + "; ".join(f"{shown[name]}, {about}" for name, about in LISTS.items())
    return _arm_grid(result, [(Column(head), partial(cell, name)) for name, head in shown.items()], caption)


def _cost_grid(result: DomainResult) -> Grid:
    def parameters(arm: Arm) -> str:
        return "" if arm.cost.num_parameters is None else f"{arm.cost.num_parameters / 1e6:,.2f} M"

    columns: list[ArmColumn] = [
        (Column("parameters"), parameters),
        (Column("seconds of training"), _train_seconds),
        (Column("ms per query"), lambda arm: f"{arm.cost.milliseconds_per_query:,.2f}"),
    ]
    return _arm_grid(result, columns, "Cost, on the machine that made them")
