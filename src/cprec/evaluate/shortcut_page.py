"""A shortcut audit for people: one table of all domains, in the terminal and on a page with findings and plots."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from markupsafe import Markup

from cprec.evaluate.charts import Value, histogram, row_chart
from cprec.evaluate.findings import METRIC, findings
from cprec.evaluate.grid import Column, Grid, console_for
from cprec.evaluate.pages import Section, print_sections, render
from cprec.evaluate.shortcut_audit import BACKWARD, ONE_STEP, SHUFFLED, TITLES, TWO_STEPS, USERS, ShortcutAudit
from cprec.files import write_whole

INTRODUCTION = (
    "How much of what is asked could be found without learning what users want: read this before a claim that a "
    "recommender beats another on these data. Everything is learnt from the training part."
)


COLUMNS = {
    "queries": ("{0.num_queries:,}", "test events asked for"),
    "items": ("{0.num_items:,}", "items of the catalogue"),
    "history": ("{0.median_history:g}", "median number of events before the target"),
    "tied": (
        "{0.targets.tied:.0%}",
        "targets that the order of events of equal time decided; ? where times are an order only",
    ),
    "repeats": ("{0.targets.repeated:.1%}", "targets that are in the history already"),
    "cold": ("{0.targets.cold:.1%}", "targets without a training event"),
    "top 10": ("{0.targets.popular_10:.1%}", "targets among the 10 most popular items"),
    "out-degree": (
        "{0.out_degree.quartiles[1]:g}",
        "median number of different items that followed the last item in training",
    ),
    "1 step": (
        f"{{0.reach[{ONE_STEP}].targets:.1%}} ({{0.reach[{ONE_STEP}].popular:.1%}})",
        "targets that followed the last item in training (in brackets: what popularity alone would reach)",
    ),
    "2 steps": (
        f"{{0.reach[{TWO_STEPS}].targets:.0%}} ({{0.reach[{TWO_STEPS}].popular:.0%}})",
        "targets within two such steps (in brackets as before)",
    ),
    "1 back": (f"{{0.reach[{BACKWARD}].targets:.1%}}", "targets that came just before the last item in training"),
    "users": (
        f"{{0.similarity[{USERS}].nearest:.0%}}",
        "targets among the 1% of the items that share most users with the last one (1% by chance)",
    ),
    "titles": (
        f"{{0.similarity[{TITLES}].nearest:.0%}}",
        "targets among the 1% of the items with titles most like the last one's (1% by chance)",
    ),
}
"""The columns of the table: how the cell of an audit is written, and what it is."""
MODEL_COLUMNS = {
    METRIC: "of the {model}, full catalogue without seen items",
    "last 1": f"per cent of that {METRIC} when only the last event is shown, with 95% interval",
    SHUFFLED: f"per cent of that {METRIC} when histories are shuffled, with 95% interval",
}
"""Further columns where a model was asked, and what they are; of the first model where there are several."""


def reading(audits: Sequence[ShortcutAudit]) -> dict[str, str]:
    """The columns of the table of these domains, and what each is."""
    about = {head: text for head, (_, text) in COLUMNS.items()}
    model = next((audit.dependence[0].model for audit in audits if audit.dependence), None)
    if model is None:
        return about
    return about | {head: text.replace("{model}", model) for head, text in MODEL_COLUMNS.items()}


def _cells(audit: ShortcutAudit) -> dict[str, str]:
    """The numbers of a domain by column."""
    unknown = {"tied": "?"} if audit.targets.tied is None else {}
    cells = unknown | {head: form.format(audit) for head, (form, _) in COLUMNS.items() if head not in unknown}
    for model in audit.dependence[:1]:
        cells[METRIC] = f"{model.ndcg.mean:.4f}"
        for name, share in model.shares.items():
            cells[name] = f"{100 * share.mean:.0f} [{100 * share.low:.0f}, {100 * share.high:.0f}]" if share else "-"
    return cells


def shortcut_table(audits: Sequence[ShortcutAudit]) -> Grid:
    """The numbers of each domain in a row, by `reading`; a dash stands for what no model was asked."""
    heads = reading(audits)
    rows = ([audit.domain, *(_cells(audit).get(head, "-") for head in heads)] for audit in audits)
    return Grid.of(["domain", *heads], rows)


def print_shortcuts(audits: Sequence[ShortcutAudit], file: TextIO | None = None) -> None:
    """Print the numbers of all domains, a column each, then what they mean; `file` is standard output if None."""
    console, about = console_for(file, least=120), reading(audits)
    numbers = [[cell.text for cell in row.cells] for row in shortcut_table(audits).rows]
    widest = max(len(text) for row in numbers for text in row)
    fitting = max(1, (console.width - max(map(len, about))) // (widest + 1))
    tables = []
    for start in range(0, len(audits), fitting):
        heads, *lines = zip(["", *about], *numbers[start : start + fitting], strict=True)
        columns = [Column(head, align="right" if head else "left", wrap=bool(head)) for head in heads]
        tables.append(Grid.of(columns, lines))
    print_sections(console, [Section(tables=tables, terms=about), *map(_section, audits)])


def write_shortcuts(
    page: Path, record: Path, title: str, audits: Sequence[ShortcutAudit], protocol: Mapping[str, str]
) -> None:
    """Write the HTML page, which needs nothing beside it, and the numbers as JSON; each appears whole or not at all.

    `protocol` says what every number depends on, for people.
    """
    numbers = {
        audit.domain: {**asdict(audit), "findings": [asdict(finding) for finding in findings(audit)]}
        for audit in audits
    }
    content = {"protocol": dict(protocol), "domains": numbers}
    write_whole(record, json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
    write_whole(page, shortcut_page(title, audits, protocol))


def shortcut_page(title: str, audits: Sequence[ShortcutAudit], protocol: Mapping[str, str]) -> str:
    """The text of the page: one table, how it was measured, then the findings and plots of each domain."""
    sections = [
        Section(tables=[shortcut_table(audits)], fold="What the columns are", terms=reading(audits)),
        Section(title="How this was measured", boxed=True, terms=protocol),
        *map(_section, audits),
    ]
    return render(f"shortcuts in {title}", sections, INTRODUCTION)


def _section(audit: ShortcutAudit) -> Section:
    note = (
        f"Similarity and models on {audit.sample:,} queries, drawn with seed {audit.seed}; the rest on all. "
        f"{audit.num_train_events:,} training events, {audit.immediate_repeats:.1%} of them repeats of the event "
        f"before. More than 1, 2 and 5 events of history: {', '.join(f'{s:.0%}' for s in audit.longer.values())} of "
        "the queries."
    )
    return Section(
        title=f"{audit.domain}: {audit.num_queries:,} queries, {audit.num_items:,} items",
        points=[(finding.kind, finding.text) for finding in findings(audit)],
        figures=_figures(audit),
        notes=[note],
    )


def _figures(audit: ShortcutAudit) -> dict[str, Markup]:
    reached = {name: [Value(reach.targets), Value(reach.popular, colour="bar")] for name, reach in audit.reach.items()}
    followers = {name: [Value(share)] for name, share in audit.out_degree.histogram.items()}
    figures = {
        "Targets reached (grey: what popularity alone would reach)": row_chart(reached, "{:.1%}", high=1),
        "Items that follow the last item": row_chart(followers, "{:.1%}"),
    }
    label = "percentile among all items; no likeness at all lies near 50"
    for name, similarity in audit.similarity.items():
        figures[f"Similarity of the target to the last item, by {name}"] = histogram(similarity.histogram, label)
    for model in audit.dependence:
        kept = {name: [Value(s.mean, (s.low, s.high))] if s else [] for name, s in model.shares.items()}
        caption = f"{model.model}: {METRIC} kept ({model.ndcg.mean:.4f} on whole histories)"
        figures[caption] = row_chart(kept, "{:.0%}")
    return figures
