"""Anneal forks side by side: tables in the terminal, and a page with the curves of all branches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from markupsafe import Markup

from cprec.evaluate.charts import line_chart, thinned
from cprec.evaluate.grid import Column, Grid, console_for, plain
from cprec.evaluate.pages import Section, render
from cprec.files import write_whole

Record = Mapping[str, Any]
"""A line of a training log."""


def print_forks(comparison: Mapping[str, Any]) -> None:
    """Print the tables of `forks.json` on standard output."""
    console = console_for(None)
    for table in tables_of(comparison):
        console.print(table.for_terminal())
        console.print()
    console.print(plain(explanation(comparison)))


def write_forks(
    path: Path, comparison: Mapping[str, Any], branches: Mapping[str, Sequence[Record]], trunk: Sequence[Record]
) -> None:
    """Write the page: the tables, then learning rate, loss and held-out perplexity of the run and its branches over
    tokens.

    `comparison` is the content of `forks.json`: run, start, domain, and a row for each branch by name. `branches` and
    `trunk` are the records of training logs.
    """
    rows = comparison["rows"]
    start = min((row["total_tokens"] for row in rows.values()), default=0)
    run = [record for record in trunk if record["tokens"] <= start]
    # A branch begins where the run was when it was left.
    last = {key: record[key] for record in run for key in ("learning_rate", "loss", "heldout") if key in record}
    of_branches = {name: [{"tokens": start, **last}, *log] for name, log in branches.items()}
    logs = {"run": run, **of_branches}
    figures = {
        "Learning rate": _chart(logs, lambda record: record.get("learning_rate"), from_zero=True),
        "Training loss (nats per target token)": _chart(logs, lambda record: record.get("loss")),
    }
    for group in _groups(rows):
        figures[f"Held-out perplexity: {group}"] = _chart({"run": [], **of_branches}, partial(_heldout, group))
    sections = [Section(tables=tables_of(comparison)), Section(title="Curves", figures=figures)]
    write_whole(path, render(f"anneal forks of {comparison['run']}", sections, explanation(comparison)))


def tables_of(comparison: Mapping[str, Any]) -> list[Grid]:
    """What each branch cost and what fine-tuning made of it; held-out perplexity at its end, where it was measured."""
    rows = comparison["rows"]
    paired = "{0[mean]:+.4f} [{0[low]:+.4f}, {0[high]:+.4f}]"
    columns = {
        "tokens": ("tokens", "{:,}"),
        "seconds": ("seconds", "{:,.0f}"),
        f"next item in {comparison['domain']}": ("next_item_perplexity", "{:.3f}"),
        "NDCG@10, validation": ("ndcg@10", "{0[mean]:.4f} [{0[low]:.3f}, {0[high]:.3f}]"),
        "against no annealing": ("against_trunk", paired),
    }
    shown = {head: cell for head, cell in columns.items() if any(cell[0] in row for row in rows.values())}
    groups = {name.removesuffix(" (specific)"): (name, "{:.3f}") for name in _groups(rows)}
    heldout = {name: row["heldout"] for name, row in rows.items()}
    tables = [_table(f"branches of {comparison['start']}", shown, rows), _table("held-out perplexity", groups, heldout)]
    return [table for table in tables if len(table.columns) > 1]


def _table(first: str, columns: Mapping[str, tuple[str, str]], rows: Mapping[str, Mapping[str, Any]]) -> Grid:
    """Columns by head: the field of a row and how it is written; a dash stands for what was not measured."""
    cells = (
        [name, *(form.format(row[key]) if row.get(key) is not None else "-" for key, form in columns.values())]
        for name, row in rows.items()
    )
    return Grid.of([Column(first, align="left"), *(Column(head, wrap=True) for head in columns)], cells)


def explanation(comparison: Mapping[str, Any]) -> str:
    """How the columns were measured."""
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


def _groups(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows.values() for name in row["heldout"]))


def _heldout(group: str, record: Record) -> float | None:
    value: float | None = record.get("heldout", {}).get(group)
    return value


def _chart(
    logs: Mapping[str, Sequence[Record]], value: Callable[[Record], float | None], *, from_zero: bool = False
) -> Markup:
    """A line for each log: what `value` finds in its records, over tokens."""
    lines = {
        name: thinned([(record["tokens"], found) for record in records if (found := value(record)) is not None])
        for name, records in logs.items()
    }
    return line_chart(lines, x_label="tokens", from_zero=from_zero)
