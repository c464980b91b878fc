"""The results of an evaluation for people: in the terminal, on a page, in Markdown and in LaTeX."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any, TextIO

from markupsafe import Markup

from cprec.evaluate.charts import Value, row_chart
from cprec.evaluate.grid import Cell, Column, Grid, Row, console_for, latex_text, printable, widest_fitting
from cprec.evaluate.pages import Section, print_sections, render
from cprec.evaluate.results import (
    CANDIDATES_POPULARITY,
    CANDIDATES_UNIFORM,
    FULL,
    FULL_WITH_SEEN,
    NEW_ITEMS,
    Arm,
    Difference,
    DomainResult,
    Example,
    Interval,
    Metric,
    Report,
    Slice,
    together,
)
from cprec.evaluate.slices import ABOUT
from cprec.evaluate.statistics import MIN_QUERIES
from cprec.evaluate.training_page import TrainingRun, final_section, forgetting_table, run_section

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
    if test.claim and test.high < 0:
        a, b, test = b, a, test.reversed()
    if test.claim and test.low > 0:
        return f"{a} beats {b} by {test.mean:.4f} {metric} [{test.low:.4f}, {test.high:.4f}] {queries}"
    few = test.num_queries < MIN_QUERIES
    verdict = f"no claim under {MIN_QUERIES:,} queries" if few else "no difference shown"
    return f"{a} against {b}: {verdict}, {test.mean:+.4f} {metric} [{test.low:+.4f}, {test.high:+.4f}] {queries}"


def answer_line(result: DomainResult) -> str:
    """Which arm of a domain is best and, of a model, whether it beats the best baseline. Seeds of one model stand
    together."""
    arms = {name: arm for name, arm in result.arms.items() if arm.kind != "bound"}
    members = together(arms)
    if not members:
        return "nothing was ranked"
    means = {name: fmean(arms[one].metrics[result.main].mean for one in own) for name, own in members.items()}
    kinds = {name: arms[own[0]].kind for name, own in members.items()}
    best = max(means, key=lambda name: means[name])
    line = f"{best} has the highest {metric_name(result.main)}, {means[best]:.4f}"
    baselines = [name for name, kind in kinds.items() if kind == "baseline"]
    if kinds[best] != "model" or not baselines:
        return line
    rival = max(baselines, key=lambda name: means[name])
    told = (difference_line(each) for each in result.differences if {each.a, each.b} == {best, rival})
    return f"{line}; {next(told, f'the best baseline is {rival}')}"


def ranking_lines(result: DomainResult) -> list[str]:
    """Notes on the queries, and for each model how exact its lists are and how well it wrote titles freely."""
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
                f"{arm.name}, writing freely for {result.num_queries:,} queries: ValidRatio {free.valid_ratio:.3f}, "
                f"HR@1-all {free.hit_rate_all:.4f}, HR@1-valid {free.hit_rate_valid:.4f}"
            )
    return lines


# ---- tables of arms --------------------------------------------------------------------------------------------------

ArmColumn = tuple[Column, Callable[[Arm], Cell | str]]
"""A column, and what makes the cell of an arm: '' where the arm has nothing to show there."""

MEAN, SHORT_MEAN = "{0.mean:.4f}".format, "{0.mean:.3f}".format
MEAN_AND_SHORT_INTERVAL = "{0.mean:.4f} [{0.low:.3f}, {0.high:.3f}]".format


def _mean_beside_interval(cell: Interval) -> Cell:
    return Cell(f"{cell.mean:.4f}", f"[{cell.low:.4f}, {cell.high:.4f}]")


def _mean_above_interval(cell: Interval) -> Cell:
    return Cell(f"{cell.mean:.4f}", f"{cell.low:.4f} to {cell.high:.4f}")


def _column(head: str, found: Callable[[Arm], Any], shown: Callable[[Any], Cell | str], note: str = "") -> ArmColumn:
    """A column of what `found` returns of an arm, as `shown` writes it; empty where it is None."""
    return Column(head, note), lambda arm: "" if (value := found(arm)) is None else shown(value)


def _under(part: str, key: Any) -> Callable[[Arm], Any]:
    """Finds what a mapping of an arm (its `metrics`, `lists` or `seconds`) has under a key."""
    return lambda arm: getattr(arm, part).get(key)


def _metric_column(metric: Metric, shown: Callable[[Interval], Cell | str], head: str = "") -> ArmColumn:
    return _column(head or metric_name(metric), _under("metrics", metric), shown)


TRAIN_SECONDS = _column("seconds of training", lambda arm: arm.cost.train_seconds, "{:,.0f}".format)
COST = (
    _column("parameters", lambda arm: arm.cost.num_parameters, lambda number: f"{number / 1e6:,.2f} M"),
    TRAIN_SECONDS,
    _column("ms per query", lambda arm: arm.cost.milliseconds_per_query, "{:,.2f}".format),
)


def _leading_metrics(main: Metric) -> list[Metric]:
    """Metrics of the full catalogue in short tables, the most important first."""
    others = (replace(main, name="recall"), replace(main, k=5), replace(main, name="mrr", k=None))
    return list(dict.fromkeys([main, *others]))


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


# ---- terminal --------------------------------------------------------------------------------------------------------


def print_report(
    report: Report, examples: Sequence[Example] = (), file: TextIO | None = None, *, width: int | None = None
) -> None:
    """Print one table of all domains and arms, paired comparisons, the protocol, and examples.

    `file` and `width` are as in `console_for`. The table has as many metrics as fit.
    """
    console = console_for(file, width)
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
    table = widest_fitting([_terminal_grid(report, metrics) for metrics in offers], console)
    sections = [
        replace(_answer_section(report), title=report.title, tables=[table]),
        *map(_domain_section, report.domains.values()),
        _protocol_section(report),
        Section(examples=examples),
    ]
    print_sections(console, sections)


def _terminal_grid(report: Report, metrics: Mapping[Metric, bool]) -> Grid:
    """A section of arms for each domain; `metrics` says of each metric whether its interval is shown."""
    pools = next(iter(report.domains.values())).pools
    columns = []
    for metric, interval in metrics.items():
        if metric.pool == report.main.pool or metric.pool in pools:
            pool = f"{pools[metric.pool].num_items}\ncandidates" if metric.pool in pools else "full\ncatalogue"
            form = MEAN_AND_SHORT_INTERVAL if interval else MEAN
            columns.append(_metric_column(metric, form, f"{metric_name(metric)}\n{pool}"))
    rows: list[Row] = []
    for result in report.domains.values():
        seen = {True: " (unseen)", False: " (seen)", None: ""}[result.unseen]
        grid = _arm_grid(result, columns)
        rows += [Row.of([f"{result.domain}{seen}"], "section"), *grid.rows]
    return replace(grid, rows=tuple(rows))


# ---- for papers ------------------------------------------------------------------------------------------------------


def markdown_table(report: Report, domain: str) -> str:
    """The table of a domain in Markdown, with a line below that says what was asked; the best arm's row is bold.

    NDCG and Recall at the cut with intervals; beside them, where arms have them, both under the other rule for seen
    items, Recall@1 among each kind of candidates, coverage, and the seconds of training.

    Raises ValueError if the report has no such domain.
    """
    result = _domain(report, domain)
    leading = _leading_metrics(result.main)[:2]
    columns = [_metric_column(metric, _mean_beside_interval) for metric in leading]
    for pool, rule in SEEN_RULES.items():
        others = (replace(metric, pool=pool) for metric in leading if pool != metric.pool)
        columns += [_metric_column(metric, MEAN, f"{metric_name(metric)}, {rule}") for metric in others]
    for pool, head in ((CANDIDATES_UNIFORM, "Recall@1 of {}, uniform"), (CANDIDATES_POPULARITY, "of {}, popular")):
        if asked := result.pools.get(pool):
            columns.append(_metric_column(Metric("recall", 1, pool), SHORT_MEAN, head.format(asked.num_items)))
    columns += [_column("coverage", _under("lists", "coverage"), "{:.2f}".format), TRAIN_SECONDS]
    table = _arm_grid(result, columns).without_empty_columns()
    pool = "full catalogue unless another pool is named, 95 % intervals in brackets"
    warning = "" if result.certified else f" {UNCERTIFIED}"
    return f"{table.markdown()}\n\n{printable(domain_line(result))}; {pool}.{warning}\n"


def results_of_model(report: Report, rows: Mapping[str, Sequence[str]]) -> str:
    """What a model's card says of an evaluation, in Markdown: the tables of its domains, and what they depend on.

    `rows` are the names that the model has in the table of each domain: it alone, and its blend.
    """
    lines = [
        f"- {name}: {report.protocol[name]}"
        for name in ("split", "queries", "seen items", "language models", "statistics", "warning")
        if name in report.protocol
    ]
    found = report.certificate
    lines.append(f"- leakage certificate: {found.violations:,} violations in {found.checked:,} checks")
    tables = [
        f"### {printable(domain)}\n\nRows of this model: {', '.join(f'**{printable(row)}**' for row in mine)}.\n\n"
        f"{markdown_table(report, domain)}"
        for domain, mine in rows.items()
    ]
    return "\n\n".join(["\n".join(lines), *tables])


def latex_table(report: Report, domain: str) -> str:
    """The table of a domain in LaTeX (booktabs), intervals as small print; the best arm is bold.

    Raises ValueError if the report has no such domain.
    """
    result = _domain(report, domain)
    columns = [_metric_column(metric, _mean_beside_interval) for metric in _leading_metrics(result.main)]
    warning = "" if result.certified else f"{UNCERTIFIED} "
    caption = latex_text(f"{warning}{domain_line(result)}; full catalogue, 95 % intervals")
    return f"\\begin{{table}}\n\\caption{{{caption}}}\n{_arm_grid(result, columns).latex()}\\end{{table}}\n"


def _domain(report: Report, domain: str) -> DomainResult:
    if domain not in report.domains:
        raise ValueError(f"domain={domain!r} is not in this report: it has {', '.join(report.domains)}")
    return report.domains[domain]


# ---- page ------------------------------------------------------------------------------------------------------------


def report_page(report: Report, runs: Mapping[str, TrainingRun], examples: Sequence[Example]) -> str:
    """The text of the page: the answer, the domains, the protocol, examples, and what was trained.

    Runs named `GROUP: ARM` share the charts of their group; one without a log is left out.
    """
    sections = [_answer_section(report), *map(_domain_section, report.domains.values()), _protocol_section(report)]
    if examples:
        sections.append(Section(title="What users are recommended", examples=examples))
    logged = {name: run for name, run in runs.items() if run.records}
    if logged:
        trained = final_section(list(logged.values()), "What was trained")
        sections.append(replace(trained, tables=[*trained.tables, forgetting_table(list(logged.values()))]))
    groups: dict[str, dict[str, TrainingRun]] = {}
    for name, run in logged.items():
        group, _, arm = name.partition(": ")
        groups.setdefault(group, {})[arm or name] = run
    sections += [run_section(f"Training: {group}", members) for group, members in groups.items()]
    return render(report.title, sections)


def _answer_section(report: Report) -> Section:
    """What is best in each domain, and how to read the numbers."""
    k = report.main.k
    note = (
        f"Recall@{k} is the share of queries whose held-out item is among the first {k}; NDCG@{k} also counts how far "
        "up it stands (1 is always first, 0 never listed). Intervals are 95 % over queries."
    )
    warning = UNCERTIFIED if report.certificate.uncertified else ""
    answers = [(domain, answer_line(result)) for domain, result in report.domains.items()]
    return Section(title="In short", boxed=True, warning=warning, points=answers, notes=[note])


def _protocol_section(report: Report) -> Section:
    """What every number depends on, the certificate and the bound included."""
    certificate = report.certificate
    found = f"{certificate.checked:,} checks, {certificate.violations:,} violations"
    clean = f"clean ({found}) and covers every model and query here" if certificate.clean else f"not clean ({found})"
    terms = {**report.protocol, "leakage certificate": UNCERTIFIED if certificate.uncertified else clean}
    bounds = {arm.name for result in report.domains.values() for arm in result.arms.values() if arm.kind == "bound"}
    if bounds:
        names = ", ".join(sorted(bounds))
        terms["bound"] = f"{names}: ranks by the true chances of this generated world; none is better on average"
    return Section(title="How this was measured", boxed=True, terms=terms)


def _domain_section(result: DomainResult) -> Section:
    charts = {f"{metric_name(metric)}, full catalogue": metric for metric in _leading_metrics(result.main)[:2]}
    if uniform := result.pools.get(CANDIDATES_UNIFORM):
        charts[f"Recall@1, {uniform.num_items} candidates"] = Metric("recall", 1, CANDIDATES_UNIFORM)
    slices = next((arm.slices for arm in result.arms.values() if arm.slices), {})
    sliced = [_slice_grid(result, name, groups) for name, groups in slices.items()]
    cost = _arm_grid(result, COST, "Cost, on the machine that made them")
    return Section(
        title=domain_line(result),
        warning="" if result.certified else UNCERTIFIED,
        points=[("", line) for line in (*map(difference_line, result.differences), *ranking_lines(result))],
        figures={caption: _bars(result, metric) for caption, metric in charts.items()},
        fold="All metrics",
        details=[*_pool_grids(result), *sliced, _list_grid(result), cost],
    )


def _bars(result: DomainResult, metric: Metric) -> Markup:
    rows = {}
    for name, arm in result.arms.items():
        cell = arm.metrics[metric]
        rows[name] = [Value(cell.mean, (cell.low, cell.high), COLOURS[arm.kind])]
    return row_chart(rows, "{:.4f}")


LEADING_POOL = "Full catalogue. MRR counts items that were listed only"
POOLS = {
    CANDIDATES_UNIFORM: "{0.num_items} candidates, the others uniform",
    FULL_WITH_SEEN: "Full catalogue, seen items may be recommended again",
    FULL: "Full catalogue, seen items left out",
    CANDIDATES_POPULARITY: "{0.num_items} candidates, the others by popularity",
    NEW_ITEMS: "New items: the {0.num_queries:,} queries whose target never occurs in training, ranked among the "
    "{0.num_items:,} items that do not. An arm that knows items by their events alone names none, or ranks them by "
    "nothing it has learnt.",
}
"""Captions of the tables of each pool but the leading one."""


def _pool_grids(result: DomainResult) -> Iterator[Grid]:
    """All metrics over the full catalogue and uniform candidates, and the leading ones over the other pools."""
    main, measured = result.main.pool, next(iter(result.arms.values()))
    asked = [pool for pool in POOLS if pool in SEEN_RULES or pool in result.pools]
    for pool in sorted(asked, key=lambda pool: pool != main):  # the leading one first
        caption = LEADING_POOL if pool == main else POOLS[pool].format(result.pools.get(pool))
        shown = list(measured.of(pool)) if pool in (main, CANDIDATES_UNIFORM) else _leading_metrics(result.main)[:2]
        if pool == CANDIDATES_POPULARITY:
            shown = [Metric("recall", 1, pool)]
        columns = [_metric_column(replace(metric, pool=pool), _mean_above_interval) for metric in shown]
        seconds = _column("seconds", _under("seconds", pool), "{:.1f}".format)
        yield _arm_grid(result, [*columns, seconds], caption).without_empty_columns()


def _slice_grid(result: DomainResult, name: str, groups: Mapping[str, Slice]) -> Grid:
    """The leading metric in each group of a slice."""

    def shown(found: Slice) -> Cell:
        return _mean_above_interval(found.metrics[result.main])

    def column(group: str, num_queries: int) -> ArmColumn:
        return _column(group, lambda arm: arm.slices.get(name, {}).get(group), shown, f"{num_queries:,} queries")

    columns = [column(group, asked.num_queries) for group, asked in groups.items()]
    return _arm_grid(result, columns, f"{metric_name(result.main)} by {name}: {ABOUT[name]}")


def _list_grid(result: DomainResult) -> Grid:
    heads = {name: name.replace("_", " ") for name in LISTS}
    columns = [_column(head, _under("lists", name), "{:.3f}".format) for name, head in heads.items()]
    return _arm_grid(result, columns, "Lists: " + "; ".join(f"{heads[name]}, {about}" for name, about in LISTS.items()))
