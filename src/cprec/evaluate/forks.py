"""Anneal forks side by side: one table in the terminal, one page with the curves of all branches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from cprec.evaluate.charts import line_chart, thinned
from cprec.evaluate.report import html_page

Comparison = Mapping[str, Any]
"""What `cprec anneal` writes as forks.json: run, start, domain, and a row for each branch by name."""


def columns_of(comparison: Comparison) -> dict[str, Callable[[Mapping[str, Any]], str]]:
    """Heads of the table in reading order, and what makes a row's cell; a dash stands for what was not measured."""
    rows = comparison["rows"].values()
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "tokens": lambda row: f"{row['tokens']:,}",
        "seconds": lambda row: f"{row['seconds']:,.0f}",
    }
    for group in dict.fromkeys(name for row in rows for name in row["heldout"]):
        columns[group] = lambda row, group=group: _shown(row["heldout"].get(group), "{:.3f}")  # type: ignore[misc]
    if any("next_item_perplexity" in row for row in rows):
        head = f"next item in {comparison['domain']}"
        columns[head] = lambda row: _shown(row.get("next_item_perplexity"), "{:.3f}")
    if any("ndcg@10" in row for row in rows):
        interval = "{mean:.4f} ({low:.3f} to {high:.3f})"
        columns["NDCG@10, validation"] = lambda row: _shown(row.get("ndcg@10"), interval)
        paired = "{mean:+.4f} ({low:+.4f} to {high:+.4f})"
        columns["against no annealing"] = lambda row: _shown(row.get("against_trunk"), paired)
    return columns


def _shown(value: Any, form: str) -> str:
    if value is None:
        return "-"
    return form.format(**value) if isinstance(value, Mapping) else form.format(value)


def cells_of(comparison: Comparison) -> Iterator[tuple[str, list[str]]]:
    """Name and cells of each row, under the heads of `columns_of`."""
    columns = columns_of(comparison)
    for name, row in comparison["rows"].items():
        yield name, [cell(row) for cell in columns.values()]


def print_forks(comparison: Comparison) -> None:
    """The table on standard output."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(f"branches of {comparison['start']}")
    for head in columns_of(comparison):
        table.add_column(head, justify="right")
    for name, cells in cells_of(comparison):
        table.add_row(name, *cells)
    console.print(table)
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
    title = escape(f"anneal forks of {comparison['run']}")
    start = min((row["total_tokens"] for row in comparison["rows"].values()), default=0)
    logs = {"run": [record for record in trunk if record["tokens"] <= start], **branches}
    rows = "".join(
        f"<tr><th>{escape(name)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
        for name, cells in cells_of(comparison)
    )
    heads = "".join(f"<th>{escape(head)}</th>" for head in columns_of(comparison))
    charts = {
        "Learning rate": _chart(logs, "learning_rate"),
        "Training loss (nats per target token)": _chart(logs, "loss"),
        **{
            f"Held-out perplexity: {group}": line_chart(
                {
                    name: thinned(
                        [(r["tokens"], r["heldout"][group]) for r in records if group in r.get("heldout", {})]
                    )
                    for name, records in branches.items()
                },
                x_label="tokens",
            )
            for group in dict.fromkeys(g for row in comparison["rows"].values() for g in row["heldout"])
        },
    }
    figures = "".join(
        f"<figure><figcaption>{escape(caption)}</figcaption>{chart}</figure>"
        for caption, chart in charts.items()
        if chart
    )
    body = [
        f"<h1>CPRec: {title}</h1>",
        f"<p>{escape(_explanation(comparison))}</p>",
        f'<div class="scroll"><table class="metrics"><tr><th></th>{heads}</tr>{rows}</table></div>',
        f'<section><div class="charts">{figures}</div></section>',
    ]
    temporary = path.with_name(path.name + ".incomplete")
    temporary.write_text(html_page(title, body), encoding="utf-8")
    temporary.replace(path)


def _chart(logs: Mapping[str, Sequence[Mapping[str, Any]]], field: str) -> str:
    lines = {
        name: thinned([(record["tokens"], record[field]) for record in records if field in record])
        for name, records in logs.items()
    }
    return line_chart(lines, x_label="tokens", from_zero=field == "learning_rate")
