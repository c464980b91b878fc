"""The report that people read: in the terminal, as one HTML file that needs nothing beside it, as Markdown tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from cprec.evaluate.charts import Points, interval_bar, line_chart, thinned
from cprec.evaluate.details import details_of
from cprec.evaluate.markup import latex_text, markdown_rows
from cprec.evaluate.statistics import ALPHA, MIN_QUERIES

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

UNCERTIFIED = "UNCERTIFIED: no clean leakage certificate covers these results. They may rest on held-out events."
SHOWN_HISTORY = 8
"""Latest events of an example's history that are shown."""
FAR_START = 10
"""A perplexity at the start this many times all later ones is left out of the curves, which it would flatten."""

Report = Mapping[str, Any]


# ---- what the numbers say, in words ----------------------------------------------------------------------------------


def cut_of(report: Report) -> int:
    """K of the full rankings, read from the names of the metrics."""
    arms = next(iter(report["domains"].values()))["arms"]
    arm = next(iter(arms.values()))
    return max(int(name.partition("@")[2]) for name in arm if name.startswith("ndcg@"))


def sampled_of(arm: Mapping[str, Any]) -> tuple[int, Mapping[str, Any]]:
    """Size of the candidate sets, and an arm's metrics on them."""
    name = next(name for name in arm if name.startswith("candidates"))
    return int(name.removeprefix("candidates")), arm[name]


def domain_line(domain: str, result: Mapping[str, Any]) -> str:
    """One line on a domain: whether pre-training saw it (None: nothing was pre-trained), items, queries."""
    seen = {True: "unseen in pre-training, ", False: "seen in pre-training, ", None: ""}[result["unseen"]]
    return f"{domain}: {seen}{result['num_items']:,} items, {result['num_queries']:,} queries"


def difference_line(difference: Mapping[str, Any]) -> str:
    """A paired comparison as a sentence, which claims a winner only if `MIN_QUERIES` were asked, 0 lies outside the
    interval and, where several were compared, the corrected p value is below 5 %.

    >>> line = {"a": "new", "b": "old", "metric": "ndcg@10", "mean": 0.02, "low": 0.01, "high": 0.03}
    >>> difference_line({**line, "num_queries": 1000})
    'new beats old by 0.0200 NDCG@10 [0.0100, 0.0300] (1,000 queries)'
    >>> difference_line({**line, "low": -0.01, "num_queries": 1000})
    'new against old: no difference shown, +0.0200 NDCG@10 [-0.0100, +0.0300] (1,000 queries)'
    >>> difference_line({**line, "num_queries": 999})
    'new against old: no claim under 1,000 queries, +0.0200 NDCG@10 [+0.0100, +0.0300] (999 queries)'
    >>> difference_line({**line, "num_queries": 2000, "p_adjusted": 0.002, "detectable": 0.014})
    'new beats old by 0.0200 NDCG@10 [0.0100, 0.0300] (2,000 queries, p 0.0020, could find 0.0140)'
    """
    a, b, mean, low, high = (difference[name] for name in ("a", "b", "mean", "low", "high"))
    metric, p_value = metric_name(difference["metric"]), difference.get("p_adjusted", 0.0)
    tested = f", p {p_value:.4f}" if "p_adjusted" in difference else ""
    if difference.get("detectable") is not None:
        tested += f", could find {difference['detectable']:.4f}"
    queries = f"({difference['num_queries']:,} queries{tested})"
    if difference["num_queries"] < MIN_QUERIES:
        verdict = f"no claim under {MIN_QUERIES:,} queries"
    elif p_value >= ALPHA:
        verdict = "no difference shown"
    elif low > 0:
        return f"{a} beats {b} by {mean:.4f} {metric} [{low:.4f}, {high:.4f}] {queries}"
    elif high < 0:
        return f"{b} beats {a} by {-mean:.4f} {metric} [{-high:.4f}, {-low:.4f}] {queries}"
    else:
        verdict = "no difference shown"
    return f"{a} against {b}: {verdict}, {mean:+.4f} {metric} [{low:+.4f}, {high:+.4f}] {queries}"


def metric_name(name: str) -> str:
    """A metric as people write it.

    >>> metric_name("ndcg@10"), metric_name("recall@5"), metric_name("mrr")
    ('NDCG@10', 'Recall@5', 'MRR')
    """
    metric, _, cut = name.partition("@")
    written = {"ndcg": "NDCG", "recall": "Recall", "mrr": "MRR", "precision": "Precision", "map": "MAP"}[metric]
    return f"{written}@{cut}" if cut else written


def certificate_line(certificate: Mapping[str, Any]) -> str:
    """What the leakage certificate found."""
    found = f"{certificate['checked']:,} checks, {certificate['violations']:,} violations"
    if certificate["uncertified"]:
        return UNCERTIFIED
    return f"clean ({found}) and covers every model and query here" if certificate["clean"] else f"not clean ({found})"


def bound_line(report: Report) -> str:
    """What the row of the bound is, where there is one; else ''."""
    bounds = {
        name for result in report["domains"].values() for name, arm in result["arms"].items() if arm["kind"] == "bound"
    }
    if not bounds:
        return ""
    return f"{', '.join(sorted(bounds))}: ranks by the true chances of this generated world; none is better on average"


def _explanation(cut: int) -> str:
    return (
        f"Recall@{cut} is the share of queries whose held-out item is among the first {cut}; NDCG@{cut} also counts "
        "how far up it stands (1 is always first, 0 never listed). Intervals are 95 % over queries."
    )


def markdown_table(report: Report, domain: str) -> str:
    """The table of a domain in Markdown, with a line below that says what was asked; the best arm's row is bold.

    NDCG and Recall at the cut with intervals; beside them, where arms have them, both under the other rule for seen
    items, Recall@1 among each kind of candidates, coverage, and the seconds of training.

    Raises ValueError if the report has no such domain.
    """
    if domain not in report["domains"]:
        raise ValueError(f"domain={domain!r} is not in this report: it has {', '.join(report['domains'])}")
    result, cut = report["domains"][domain], cut_of(report)
    arms = result["arms"]
    best = _best(arms, f"ndcg@{cut}")
    columns = {head: cells for head, cells in _markdown_columns(arms, cut).items() if any(cells)}
    rows = [list(row) for row in zip(arms, *columns.values(), strict=True)]
    table = markdown_rows(["", *columns], rows, None if best is None else list(arms).index(best))
    pool = "full catalogue unless another pool is named, 95 % intervals in brackets"
    warning = "" if result["certified"] else f" {UNCERTIFIED}"
    return f"{table}\n\n{domain_line(domain, result)}; {pool}.{warning}\n"


def _markdown_columns(arms: Mapping[str, Any], cut: int) -> dict[str, list[str]]:
    """The cell of each arm by the head of its column, '' where an arm has none."""

    def cells(form: str, *path: str) -> list[str]:
        found: list[Any] = list(arms.values())
        for key in path:
            found = [value.get(key) if value is not None else None for value in found]
        return ["" if value is None else form.format(value) for value in found]

    ndcg, recall, size = f"ndcg@{cut}", f"recall@{cut}", sampled_of(next(iter(arms.values())))[0]
    interval = "{0[mean]:.4f} [{0[low]:.4f}, {0[high]:.4f}]"
    columns = {metric_name(metric): cells(interval, metric) for metric in (ndcg, recall)}
    for other in ("seen kept", "seen left out"):
        for metric in (ndcg, recall):
            columns[f"{metric_name(metric)}, {other}"] = cells("{0[mean]:.4f}", other.replace(" ", "_"), metric)
    columns[f"Recall@1 of {size}, uniform"] = cells("{0[mean]:.3f}", f"candidates{size}", "recall@1")
    columns[f"of {size}, popular"] = cells("{0[mean]:.3f}", f"candidates{size}_popularity", "recall@1")
    columns["coverage"] = cells("{:.2f}", "lists", "coverage")
    return columns | {"seconds of training": cells("{:,.0f}", "cost", "train_seconds")}


def latex_table(report: Report, domain: str) -> str:
    """The table of a domain in LaTeX (booktabs), intervals as small print; the best arm's row is bold.

    Raises ValueError if the report has no such domain.
    """
    if domain not in report["domains"]:
        raise ValueError(f"domain={domain!r} is not in this report: it has {', '.join(report['domains'])}")
    result, cut = report["domains"][domain], cut_of(report)
    best, metrics = _best(result["arms"], f"ndcg@{cut}"), _leading_metrics(cut)
    head = " & ".join(["", *(latex_text(metric_name(metric)) for metric in metrics)])
    rows = []
    for name, arm in result["arms"].items():
        cells = [f"{arm[m]['mean']:.4f} {{\\scriptsize [{arm[m]['low']:.4f}, {arm[m]['high']:.4f}]}}" for m in metrics]
        label = f"\\textbf{{{latex_text(name)}}}" if name == best else latex_text(name)
        rows.append(" & ".join([label, *cells]) + r" \\")
    warning = "" if result["certified"] else f"{UNCERTIFIED} "
    caption = latex_text(f"{warning}{domain_line(domain, result)}; full catalogue, 95 % intervals")
    body = "\n".join(rows)
    return (
        f"\\begin{{table}}\n\\caption{{{caption}}}\n\\begin{{tabular}}{{l{'r' * len(metrics)}}}\n\\toprule\n"
        f"{head} \\\\\n\\midrule\n{body}\n\\bottomrule\n\\end{{tabular}}\n\\end{{table}}\n"
    )


def _leading_metrics(cut: int) -> list[str]:
    """Metrics of the full catalogue in short tables, the most important first."""
    return list(dict.fromkeys([f"ndcg@{cut}", f"recall@{cut}", "ndcg@5", "mrr"]))


# ---- terminal --------------------------------------------------------------------------------------------------------


def ranking_lines(result: Mapping[str, Any]) -> list[str]:
    """What is known of the questions and of how exact each model's lists are, and what it wrote freely."""
    lines = list(result.get("notes", []))
    for name, arm in result["arms"].items():
        if "proven" in arm:
            line = f"{name}: {arm['proven']:.1%} of the lists proven exact"
            if arm["proven"] < 1:
                line += (
                    f"; in the others a missed item could score up to {arm['mean_gap']:.2f} more than the last (mean)"
                )
            line += f"; {arm['expanded']:,.0f} prefixes read a query"
            if "found_of_exact" in arm:
                found = arm["found_of_exact"]
                line += f"; {found['share']:.1%} of the exact lists found ({found['num_queries']} queries)"
            lines.append(line)
        if "generate" in arm:
            free = arm["generate"]
            lines.append(
                f"{name}, writing freely: ValidRatio {free['valid_ratio']:.3f}, HR@1-all {free['hr@1-all']:.4f}, "
                f"HR@1-valid {free['hr@1-valid']:.4f}"
            )
    return lines


def print_report(
    report: Report,
    examples: Sequence[Mapping[str, Any]] = (),
    file: TextIO | None = None,
    *,
    width: int | None = None,
) -> None:
    """Print one table of all domains and arms, paired comparisons, the protocol, and examples.

    `file` is standard output if None. `width` in columns is the terminal's if None; where there is no terminal it is
    100 at least. The table has as many metrics as fit.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console(file=file, width=width, highlight=False)
    if width is None and not console.is_terminal:
        console = Console(file=file, width=max(console.width, 100), highlight=False)
    cut = cut_of(report)
    uncertified = report["certificate"]["uncertified"]

    def line(text: str, style: str = "", indent: int = 0) -> None:
        printable = "".join(char if char.isprintable() else " " for char in text)  # no title may steer the terminal
        for number, part in enumerate(Text(printable).wrap(console, console.width - indent - 3)):
            console.print(Text(" " * (indent + 3 * bool(number)) + part.plain.rstrip(), style=style))

    def heading(text: str) -> None:
        console.print()
        line(text, "bold underline" if console.is_terminal else "")

    heading(report["title"])
    if uncertified:
        line(UNCERTIFIED, "bold red")
    console.print()
    console.print(_fitting_table(report, console))
    console.print()
    line(_explanation(cut), "dim")
    for domain, result in report["domains"].items():
        heading(domain_line(domain, result))
        for difference in result["differences"]:
            line(difference_line(difference), indent=2)
        for text in ranking_lines(result):
            line(text, "dim", 2)
    heading("How this was measured")
    for name, text in report["protocol"].items():
        line(f"{name}: {text}", "dim", 2)
    if bound_line(report):
        line(bound_line(report), "dim", 2)
    line(f"leakage certificate: {certificate_line(report['certificate'])}", "bold red" if uncertified else "dim", 2)
    for example in examples:
        heading(f"User {example['user']} in {example['domain']}")
        more = len(example["history"]) - SHOWN_HISTORY
        line(f"had, latest last{f' ({more:,} earlier left out)' if more > 0 else ''}:", indent=2)
        for title in example["history"][-SHOWN_HISTORY:]:
            line(title, indent=5)
        line("held out, came next:", indent=2)
        line(example["target"], "bold", 5)
        for arm, found in example["recommendations"].items():
            line(f"{arm} recommends:", indent=2)
            for place, (title, score) in enumerate(found, 1):
                hit = title == example["target"]
                line(f"{place}. {title} ({score:.2f}){'  <- came next' if hit else ''}", "green" if hit else "", 5)
    console.print()


def _fitting_table(report: Report, console: Console) -> Table:
    """The table with the most columns that is no wider than the console."""
    from rich.measure import Measurement

    cut = cut_of(report)
    first, second, *others = _leading_metrics(cut)
    offers = [
        {first: True, second: True, **dict.fromkeys(others, False), "sampled": True},
        {first: True, second: True, **dict.fromkeys(others, False), "sampled": False},
        {first: True, second: True, "sampled": False},
        {first: True, second: False, "sampled": False},
        {first: True},
    ]
    tables = [_table(report, columns) for columns in offers]
    room = console.options.update(max_width=10_000)  # a table's own wish, whatever the console's width
    fitting = (table for table in tables if Measurement.get(console, room, table).maximum <= console.width)
    return next(fitting, tables[-1])


def _table(report: Report, columns: Mapping[str, bool]) -> Table:
    """Arms as rows, a section for each domain; `columns` says of each metric whether its interval is shown."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    size = sampled_of(next(iter(next(iter(report["domains"].values()))["arms"].values())))[0]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("")
    for metric in columns:
        head = f"Recall@1\n{size}\ncandidates" if metric == "sampled" else f"{metric_name(metric)}\nfull\ncatalogue"
        table.add_column(head, justify="right", no_wrap=True)
    for position, (domain, result) in enumerate(report["domains"].items()):
        if position:
            table.add_row()
        seen = {True: " (unseen)", False: " (seen)", None: ""}[result["unseen"]]
        table.add_row(Text(f"{domain}{seen}", style="bold"))
        best = _best(result["arms"], f"ndcg@{cut_of(report)}")
        for name, arm in result["arms"].items():
            metrics = {**arm, "sampled": sampled_of(arm)[1]["recall@1"]}
            cells = [_cell(metrics[metric], interval) for metric, interval in columns.items()]
            style = {"bound": "dim", "model": "cyan"}.get(arm["kind"], "") + (" bold" if name == best else "")
            table.add_row(Text(f"  {name}", style=style), *(Text(cell, style=style) for cell in cells))
    return table


def _cell(value: Mapping[str, float], interval: bool) -> str:
    return f"{value['mean']:.4f}" + (f" [{value['low']:.3f}, {value['high']:.3f}]" if interval else "")


def _best(arms: Mapping[str, Any], metric: str) -> str | None:
    """The arm of the highest mean, bounds aside."""
    rivals = {name: arm[metric]["mean"] for name, arm in arms.items() if arm["kind"] != "bound"}
    return max(rivals, key=lambda name: rivals[name]) if rivals else None


# ---- HTML ------------------------------------------------------------------------------------------------------------


def write_html(
    path: str | Path,
    report: Report,
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    examples: Sequence[Mapping[str, Any]],
) -> None:
    """Write the report as one HTML file without scripts or links to elsewhere; it appears complete or not at all.

    `runs` maps names to the records of training logs; runs named `GROUP: ARM` share the charts of their group.
    `examples` are users with their history, target and each arm's recommendations.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".incomplete")
    temporary.write_text(html_of(report, runs, examples), encoding="utf-8")
    temporary.replace(path)


def html_of(
    report: Report, runs: Mapping[str, Sequence[Mapping[str, Any]]], examples: Sequence[Mapping[str, Any]]
) -> str:
    """The text of the HTML report; see `write_html`."""
    title = escape(report["title"])
    body = [
        f"<h1>CPRec: {title}</h1>",
        _protocol_box(report),
        *(_domain_section(domain, result, report) for domain, result in report["domains"].items()),
        *_examples_section(examples),
        *_models_section(report.get("models", {})),
        *(_run_section(group, members) for group, members in _groups(runs).items()),
    ]
    return html_page(title, body)


def html_page(title: str, body: Sequence[str]) -> str:
    """A page of its own, light or dark as the reader's system, from escaped parts."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>CPRec: {title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _protocol_box(report: Report) -> str:
    """What every number depends on, before any number."""
    uncertified = report["certificate"]["uncertified"]
    rows = {**report["protocol"], "leakage certificate": certificate_line(report["certificate"])}
    if bound_line(report):
        rows["bound"] = bound_line(report)
    cells = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in rows.items())
    banner = f'<p class="warning">{escape(UNCERTIFIED)}</p>' if uncertified else ""
    return (
        f'<section class="box">{banner}<h2>How this was measured</h2><dl>{cells}</dl>'
        f"<p>{escape(_explanation(cut_of(report)))}</p></section>"
    )


def _domain_section(domain: str, result: Mapping[str, Any], report: Report) -> str:
    arms, cut = result["arms"], cut_of(report)
    size = sampled_of(next(iter(arms.values())))[0]
    charts = [
        _bars(f"NDCG@{cut}, full catalogue", {name: arm[f"ndcg@{cut}"] for name, arm in arms.items()}, arms),
        _bars(f"Recall@{cut}, full catalogue", {name: arm[f"recall@{cut}"] for name, arm in arms.items()}, arms),
        _bars(f"Recall@1, {size} candidates", {n: sampled_of(arm)[1]["recall@1"] for n, arm in arms.items()}, arms),
    ]
    sampled = _sampled_arms(arms)
    lines = "".join(f"<li>{escape(difference_line(difference))}</li>" for difference in result["differences"])
    lines += "".join(f"<li>{escape(text)}</li>" for text in ranking_lines(result))
    compared = f"<ul>{lines}</ul>" if lines else ""
    warning = "" if result["certified"] else f'<p class="warning">{escape(UNCERTIFIED)}</p>'
    return (
        f"<section><h2>{escape(domain_line(domain, result))}</h2>{warning}{compared}"
        f'<div class="charts">{"".join(charts)}</div>'
        f"<details open><summary>All metrics</summary>{_metric_table('Full catalogue', arms, _full_metrics(arms))}"
        f"{_metric_table(f'{size} candidates, the others uniform', sampled, _full_metrics(sampled))}"
        f"{details_of(arms, cut)}</details></section>"
    )


def _bars(caption: str, cells: Mapping[str, Mapping[str, float]], arms: Mapping[str, Any]) -> str:
    largest = max(cell["high"] for cell in cells.values())
    rows = "".join(
        f"<tr><th>{escape(name)}</th>"
        f"<td>{interval_bar(cell['mean'], cell['low'], cell['high'], largest, _COLOUR[arms[name]['kind']])}</td>"
        f"<td>{cell['mean']:.4f}</td></tr>"
        for name, cell in cells.items()
    )
    return f'<figure><figcaption>{escape(caption)}</figcaption><table class="bars">{rows}</table></figure>'


_COLOUR = {"model": "accent", "baseline": "bar", "bound": "muted"}


def _sampled_arms(arms: Mapping[str, Any]) -> dict[str, Any]:
    return {name: sampled_of(arm)[1] for name, arm in arms.items()}


def _full_metrics(arms: Mapping[str, Any]) -> list[str]:
    """Names of the metrics of arms, in their order."""
    return [name for name, value in next(iter(arms.values())).items() if isinstance(value, Mapping) and "mean" in value]


def _metric_table(caption: str, arms: Mapping[str, Any], metrics: Sequence[str]) -> str:
    cut = "" if "candidates" in caption else "MRR counts items that were listed only. "
    head = "".join(f"<th>{metric_name(metric)}</th>" for metric in metrics) + "<th>seconds</th>"
    rows = []
    for name, arm in arms.items():
        cells = "".join(
            f"<td>{arm[m]['mean']:.4f}<br><small>{arm[m]['low']:.4f} to {arm[m]['high']:.4f}</small></td>"
            for m in metrics
        )
        rows.append(f"<tr><th>{escape(name)}</th>{cells}<td>{arm['seconds']:.1f}</td></tr>")
    return (
        f'<div class="scroll"><table class="metrics"><caption>{escape(caption)}. {cut}</caption>'
        f"<tr><th></th>{head}</tr>{''.join(rows)}</table></div>"
    )


def _examples_section(examples: Sequence[Mapping[str, Any]]) -> list[str]:
    if not examples:
        return []
    cards = []
    for example in examples:
        more = len(example["history"]) - SHOWN_HISTORY
        earlier = f"<p>{more:,} earlier events, then</p>" if more > 0 else ""
        history = "".join(f"<li>{escape(title)}</li>" for title in example["history"][-SHOWN_HISTORY:])
        lists = []
        for arm, found in example["recommendations"].items():
            rows = "".join(_recommended(title, score, title == example["target"]) for title, score in found)
            lists.append(f"<div><h4>{escape(arm)}</h4><ol>{rows}</ol></div>")
        cards.append(
            f'<article class="box"><h3>{escape(example["user"])}, {escape(example["domain"])}</h3>'
            f'<div class="charts"><div><h4>had, latest last</h4>{earlier}<ul>{history}</ul>'
            f"<p>Held out, came next: <b>{escape(example['target'])}</b></p></div>{''.join(lists)}</div></article>"
        )
    return [f"<section><h2>What users are recommended</h2>{''.join(cards)}</section>"]


def _recommended(title: str, score: float, hit: bool) -> str:
    mark = ' class="hit"' if hit else ""
    came = " &#10003; came next" if hit else ""
    return f"<li{mark}>{escape(title)} <small>{score:.2f}{came}</small></li>"


def _models_section(models: Mapping[str, Mapping[str, Any]]) -> list[str]:
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{about['num_parameters'] / 1e6:,.2f} M</td><td>{about['tokens']:,}</td>"
        f"<td>{about['seconds']:,.0f}</td><td>{about['tokens'] / max(about['seconds'], 1e-9):,.0f}</td></tr>"
        for name, about in models.items()
        if about
    )
    if not rows:
        return []
    head = "<tr><th></th><th>parameters</th><th>tokens</th><th>seconds</th><th>tokens per second</th></tr>"
    return [
        '<section><h2>What was trained</h2><div class="scroll"><table class="metrics">'
        f"{head}{rows}</table></div></section>"
    ]


def _groups(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, Sequence[Mapping[str, Any]]]]:
    """Group -> arm -> records; a run whose name has no colon is a group of its own."""
    groups: dict[str, dict[str, Sequence[Mapping[str, Any]]]] = {}
    for name, records in runs.items():
        group, _, arm = name.partition(": ")
        groups.setdefault(group, {})[arm or name] = records
    return groups


def _run_section(group: str, members: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Curves of the runs of a group. Their logs hold one record per line; see `cprec.train.loop`."""
    perplexities = _perplexities(members)
    drawn = without_far_starts(perplexities)
    charts = {
        "Learning rate": line_chart(_curves(members, "learning_rate"), x_label="step", from_zero=True),
        "Training loss (nats per target token)": line_chart(_curves(members, "loss"), x_label="step"),
        "Held-out perplexity": line_chart(
            {n: thinned(points) for n, points in drawn.items()}, x_label="tokens", log_y=True
        ),
    }
    figures = "".join(
        f"<figure><figcaption>{escape(caption)}</figcaption>{chart}</figure>"
        for caption, chart in charts.items()
        if chart
    )
    if not figures:
        return ""
    return (
        f'<section><h2>Training: {escape(group)}</h2><div class="charts">{figures}</div>'
        f"{_perplexity_table(perplexities, drawn)}</section>"
    )


def _curves(members: Mapping[str, Sequence[Mapping[str, Any]]], field: str) -> dict[str, Points]:
    return {
        arm: thinned([(record["step"], record[field]) for record in records if field in record])
        for arm, records in members.items()
    }


def _perplexities(members: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Points]:
    """A line over tokens for each held-out set of each run; its name tells the run where there are several."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for arm, records in members.items():
        for record in records:
            for name, value in record.get("heldout", {}).items():
                label = name if len(members) == 1 else f"{arm}, {name}"
                lines.setdefault(label, []).append((record["tokens"], value))
    return dict(lines)


def without_far_starts(lines: Mapping[str, Points]) -> dict[str, Points]:
    """The lines without first points that are more than `FAR_START` times all that follow."""
    return {
        name: points[1:] if len(points) > 2 and points[0][1] > FAR_START * max(y for _, y in points[1:]) else points
        for name, points in lines.items()
    }


def _perplexity_table(lines: Mapping[str, Points], drawn: Mapping[str, Points]) -> str:
    """Held-out perplexity at the start and the end, and the lowest, for each held-out set of each run."""
    rows = ""
    for name, points in lines.items():
        values = [y for _, y in points]
        cells = "".join(f"<td>{value:,.2f}</td>" for value in (values[0], values[-1], min(values)))
        rows += f"<tr><th>{escape(name)}</th>{cells}</tr>"
    if not rows:
        return ""
    note = " The start, far above the rest, is not drawn." if drawn != lines else ""
    return (
        f'<div class="scroll"><table class="metrics"><caption>Held-out perplexity.{note}</caption>'
        f"<tr><th></th><th>start</th><th>end</th><th>lowest</th></tr>{rows}</table></div>"
    )


STYLE = """
:root { color-scheme: light dark; --text: #1d232b; --page: #ffffff; --box: #f4f6f8; --edge: #d8dde3; --grid: #e3e7eb;
  --accent: #1668b8; --bar: #8d9aa8; --muted: #cfd6dd; --hit: #187a3c; --warning: #b3261e;
  --line-0: #1668b8; --line-1: #c4560a; --line-2: #187a3c; --line-3: #8a3ab9; --line-4: #b3261e; --line-5: #0b8384;
  --line-6: #7d6608; --line-7: #5b6673; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e8ec; --page: #14181d; --box: #1d232a; --edge: #38414b;
  --grid: #2b323a; --accent: #62aef5; --bar: #76838f; --muted: #46505b; --hit: #62cf8a; --warning: #ff8a80;
  --line-0: #62aef5; --line-1: #f5a05c; --line-2: #62cf8a; --line-3: #c795ec; --line-4: #ff8a80; --line-5: #5fd0d0;
  --line-6: #d6c25a; --line-7: #a5b0bb; } }
* { box-sizing: border-box; }
body { max-width: 70rem; margin: 0 auto; padding: 1rem; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin: 0 0 .6rem; } h3 { font-size: 1rem; margin: 0 0 .4rem; }
h4 { font-size: .9rem; margin: 0 0 .2rem; }
section { margin: 0 0 2rem; }
.box { background: var(--box); border: 1px solid var(--edge); border-radius: 8px; padding: .8rem 1rem;
  margin: 0 0 1rem; }
section.box { margin-bottom: 2rem; }
.warning { color: var(--warning); font-weight: 700; border: 2px solid var(--warning); border-radius: 6px;
  padding: .4rem .6rem; }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .2rem 1rem; margin: 0;
  font-size: .9rem; }
dt { font-weight: 600; } dd { margin: 0; }
@media (max-width: 34rem) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .4rem; } }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr)); gap: 1rem 1.6rem; }
.charts > * { min-width: 0; } section > ul { margin-bottom: .8rem; }
figure { margin: 0; } figcaption { font-weight: 600; font-size: .9rem; margin-bottom: .3rem; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .4rem 0; }
th { text-align: left; font-weight: 500; }
.bars { width: 100%; } .bars td { padding: .1rem .2rem; vertical-align: middle; }
.bars th { width: 8.2rem; padding-right: .4rem; line-height: 1.15; }
.bars td:last-child { width: 3.4rem; text-align: right; }
.bar { display: block; overflow: visible; }
.scroll { overflow-x: auto; }
.tables { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1rem 2rem; }
.tables > * { min-width: 0; } .tables caption { max-width: 34rem; white-space: normal; }
.metrics td, .metrics th { padding: .25rem .7rem .25rem 0; border-bottom: 1px solid var(--edge); white-space: nowrap; }
.metrics th:first-child { position: sticky; left: 0; background: var(--page); }
.metrics td { text-align: right; } .metrics tr:first-child th { text-align: right; font-weight: 600; }
small { opacity: .75; }
.chart { display: block; width: 100%; height: auto; max-width: 34rem; font-size: 11px; }
.chart text { fill: currentColor; opacity: .8; } .grid { stroke: var(--grid); }
.legend { display: flex; flex-wrap: wrap; gap: .1rem .9rem; font-size: .8rem; }
ol, ul { margin: .2rem 0; padding-left: 1.4rem; font-size: .9rem; } details p, .box p { font-size: .9rem; }
.hit { color: var(--hit); font-weight: 600; }
summary { cursor: pointer; margin-top: .6rem; }
@media print { body { max-width: none; padding: 0; font-size: 12px; } .metrics { font-size: .7rem; }
  .metrics td, .metrics th { padding-right: .45rem; } .scroll { overflow: visible; }
  .charts { grid-template-columns: repeat(3, 1fr); gap: .6rem 1rem; } .bars th { width: 6.4rem; }
  h2 { break-after: avoid; } figure, article, table { break-inside: avoid; }
  rect { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""
