"""Anneal forks side by side: one table in the terminal, one page with the curves of all branches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    """Held-out perplexity at the end of each branch."""
    groups = dict.fromkeys(name for row in comparison["rows"].values() for name in row["heldout"])
    return {name: lambda row, name=name: _shown(row["heldout"].get(name), "{:.3f}") for name in groups}  # type: ignore[misc]


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
    title = escape(f"anneal forks of {comparison['run']}")
    start = min((row["total_tokens"] for row in comparison["rows"].values()), default=0)
    logs = {"run": [record for record in trunk if record["tokens"] <= start], **branches}
    columns = columns_of(comparison) | {f"held out: {n}": cell for n, cell in perplexities_of(comparison).items()}
    heads = "".join(f"<th>{escape(head)}</th>" for head in columns)
    rows = "".join(
        f"<tr><th>{escape(name)}</th>{''.join(f'<td>{escape(cell(row))}</td>' for cell in columns.values())}</tr>"
        for name, row in comparison["rows"].items()
    )
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
