"""Anneal forks side by side: one table in the terminal, one page with the curves of all branches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from cprec.evaluate.charts import line_chart, thinned
from cprec.evaluate.report import html_page

Comparison = Mapping[str, Any]
"""What `cprec anneal` writes as forks.json: run, start, domain, and a row for each branch by name."""


Columns = dict[str, Callable[[Mapping[str, Any]], str]]
"""Heads of a table in reading order, and what makes a row's cell; a dash stands for what was not measured."""


def columns_of(comparison: Comparison) -> Columns:
    """What a branch cost, and what fine-tuning made of it."""
    rows = comparison["rows"].values()
    columns: Columns = {
        "tokens": lambda row: f"{row['tokens']:,}",
        "seconds": lambda row: f"{row['seconds']:,.0f}",
    }
    if any("next_item_perplexity" in row for row in rows):
        head = f"next item in {comparison['domain']}"
        columns[head] = lambda row: _shown(row.get("next_item_perplexity"), "{:.3f}")
    if any("ndcg@10" in row for row in rows):
        interval = "{mean:.4f} [{low:.3f}, {high:.3f}]"
        columns["NDCG@10, validation"] = lambda row: _shown(row.get("ndcg@10"), interval)
        paired = "{mean:+.4f} [{low:+.4f}, {high:+.4f}]"
        columns["against no annealing"] = lambda row: _shown(row.get("against_trunk"), paired)
    return columns


def perplexities_of(comparison: Comparison) -> Columns:
    """Held-out perplexity at the end of each branch, of each domain's specific documents and of mixed ones."""
    groups = dict.fromkeys(name for row in comparison["rows"].values() for name in row["heldout"])
    return {
        name.removesuffix(" (specific)"): lambda row, name=name: _shown(row["heldout"].get(name), "{:.3f}")  # type: ignore[misc]
        for name in groups
    }


def _shown(value: Any, form: str) -> str:
    if value is None:
        return "-"
    return form.format(**value) if isinstance(value, Mapping) else form.format(value)


def print_forks(comparison: Comparison) -> None:
    """The table on standard output."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for title, columns in (("", columns_of(comparison)), ("held-out perplexity", perplexities_of(comparison))):
        if not columns:
            continue
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column(title or f"branches of {comparison['start']}", no_wrap=True)
        for head in columns:
            table.add_column(head, justify="right")
        for name, row in comparison["rows"].items():
            table.add_row(name, *(cell(row) for cell in columns.values()))
        console.print(table)
        console.print()
    console.print(_explanation(comparison), highlight=False)


def _explanation(comparison: Comparison) -> str:
    text = (
        "Tokens and seconds are what a branch costs beyond the run that it shares. Held-out perplexity is that of "
        "users never trained on."
    )
    if comparison["domain"]:
        text += (
            f" Every branch was fine-tuned in the same short way on {comparison['domain']}; NDCG@10 is over the full "
            "catalogue, of validation queries: test queries are not touched by a choice between branches. Intervals "
            "are 95 % over users, and the last column is paired."
        )
    return text


def write_forks(
    path: Path, comparison: Comparison, branches: Mapping[str, Sequence[Mapping[str, Any]]], trunk: Sequence[Any]
) -> None:
    """The page: the table, then learning rate, loss and held-out perplexity of the run and its branches over tokens.

    `branches` and `trunk` are the records of training logs.
    """
    rows = comparison["rows"]
    start = min((row["total_tokens"] for row in rows.values()), default=0)
    run = [record for record in trunk if record["tokens"] <= start]
    # A branch begins where the run was when it was left.
    last = {key: record[key] for record in run for key in ("learning_rate", "loss", "heldout") if key in record}
    logs = {"run": run} | {name: [{"tokens": start, **last}, *log] for name, log in branches.items()}
    charts = {
        "Learning rate": _chart(logs, lambda record: record.get("learning_rate"), from_zero=True),
        "Training loss (nats per target token)": _chart(logs, lambda record: record.get("loss")),
    }
    for group in dict.fromkeys(name for row in rows.values() for name in row["heldout"]):
        value = partial(_heldout, group)
        charts[f"Held-out perplexity: {group}"] = _chart({"run": [], **{n: logs[n] for n in branches}}, value)
    figures = "".join(
        f"<figure><figcaption>{escape(caption)}</figcaption>{chart}</figure>"
        for caption, chart in charts.items()
        if chart
    )
    title = escape(f"anneal forks of {comparison['run']}")
    body = [
        f"<h1>CPRec: {title}</h1>",
        f"<p>{escape(_explanation(comparison))}</p>",
        _html_table(f"Branches of {comparison['start']}", columns_of(comparison), rows),
        _html_table("Held-out perplexity", perplexities_of(comparison), rows),
        f'<section><h2>Curves</h2><div class="charts">{figures}</div></section>',
    ]
    temporary = path.with_name(path.name + ".incomplete")
    temporary.write_text(html_page(title, body), encoding="utf-8")
    temporary.replace(path)


def _html_table(caption: str, columns: Columns, rows: Mapping[str, Mapping[str, Any]]) -> str:
    if not columns:
        return ""
    heads = "".join(f"<th>{escape(head)}</th>" for head in columns)
    lines = "".join(
        f"<tr><th>{escape(name)}</th>{''.join(f'<td>{escape(cell(row))}</td>' for cell in columns.values())}</tr>"
        for name, row in rows.items()
    )
    return (
        f'<div class="scroll"><table class="metrics"><caption>{escape(caption)}</caption><tr><th></th>{heads}</tr>'
        f"{lines}</table></div>"
    )


def _heldout(group: str, record: Mapping[str, Any]) -> float | None:
    value: float | None = record.get("heldout", {}).get(group)
    return value


def _chart(
    logs: Mapping[str, Sequence[Mapping[str, Any]]],
    value: Callable[[Mapping[str, Any]], float | None],
    *,
    from_zero: bool = False,
) -> str:
    """A line for each log: what `value` finds in its records, over tokens."""
    lines = {
        name: thinned([(record["tokens"], found) for record in records if (found := value(record)) is not None])
        for name, records in logs.items()
    }
    return line_chart(lines, x_label="tokens", from_zero=from_zero)
