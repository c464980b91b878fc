"""What a shortcut audit tells people: findings in words, one table for the terminal, and one HTML page with plots."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import TextIO

from cprec.evaluate.charts import interval_bar
from cprec.evaluate.report import html_page
from cprec.evaluate.shortcuts import (
    BACKWARD,
    FROM_ANY,
    ONE_STEP,
    SHUFFLED,
    TITLES,
    TWO_STEPS,
    USERS,
    Dependence,
    Interval,
    K,
    ShortcutAudit,
)
from cprec.evaluate.statistics import MIN_QUERIES

METRIC = f"NDCG@{K}"

SOME, MUCH = 0.05, 0.2
"""Shares of targets from which something is mentioned, and from which it decides what may be concluded. Differences
between published models are often 5 % of a metric, so a fault of 5 % of the targets can make one; with every fifth
target it is no longer a side effect. (`MIN_QUERIES` bounds claims everywhere, see `cprec.evaluate.statistics`.)"""
EVERYTHING = 0.5
"""Share of the training events from which reaching a set of items says nothing: half of all that is bought is in it."""
NEARLY_ALL = 0.9
"""Share of a model's NDCG@10 from which the rest is called little: what is left is within the differences between
published models."""
SHORT = 6
"""Median events of a history below which a data set has no long histories to learn from: the paper of CPRec and most
others show models 10 to 50."""

CAN, CARE, CANNOT = "can", "take care", "cannot"


@dataclass(frozen=True)
class Finding:
    """A sentence on what a data set can and cannot show."""

    kind: str
    """`CAN`, `CARE` or `CANNOT`."""
    text: str


# ---- findings --------------------------------------------------------------------------------------------------------


def findings(audit: ShortcutAudit) -> list[Finding]:
    """What the numbers of a domain mean for a claim about recommenders on it, the most serious first."""
    found = [
        *_on_queries(audit),
        *_on_ties(audit),
        *_on_reach(audit),
        *_on_similarity(audit),
        *(finding for each in audit.dependence for finding in _on_dependence(audit, each)),
        *_on_targets(audit),
    ]
    return sorted(found, key=lambda finding: (CANNOT, CARE, CAN).index(finding.kind))


def _on_queries(audit: ShortcutAudit) -> list[Finding]:
    found = []
    if audit.num_queries < MIN_QUERIES:
        found.append(
            Finding(
                CANNOT,
                f"{audit.num_queries:,} queries, fewer than {MIN_QUERIES:,}: no claim that one recommender beats "
                "another",
            )
        )
    elif audit.dependence and audit.sample < MIN_QUERIES:
        found.append(
            Finding(
                CANNOT,
                f"models were asked {audit.sample:,} queries, fewer than {MIN_QUERIES:,}: what they need of a "
                "history is not claimed; ask more (--max-queries)",
            )
        )
    best = max(audit.dependence, key=lambda each: each.ndcg.mean, default=None)
    if best is not None and best.ndcg.mean > 0 < best.smallest_difference:
        share = best.smallest_difference / best.ndcg.mean
        found.append(
            Finding(
                CANNOT if share > MUCH else CARE,
                f"a difference of less than about {best.smallest_difference:.4f} {METRIC} will not show "
                f"({share:.0%} of the {best.model}'s {best.ndcg.mean:.4f})",
            )
        )
    if audit.median_history < SHORT:
        found.append(
            Finding(
                CANNOT,
                f"half of the histories have {audit.median_history:g} events or fewer: what long histories are "
                "worth cannot be shown",
            )
        )
    return found


def _on_ties(audit: ShortcutAudit) -> list[Finding]:
    tied = audit.targets.tied
    if tied is None:
        return [
            Finding(
                CARE,
                "times are an order only: how many targets the order of equal times decided cannot be known",
            )
        ]
    if tied < SOME:
        return []
    decided = f"{tied:.0%} of the targets are decided by the order of events of equal time"
    if audit.tie_order == "shuffle":
        return [Finding(CARE, f"{decided}, which was drawn: their order shows nothing of the users")]
    return [
        Finding(
            CANNOT if tied >= MUCH else CARE,
            f"{decided}, which is the file's and not the user's: what depends on order may be an artefact; prepare "
            "with tie_order=shuffle too and compare",
        )
    ]


def _on_reach(audit: ShortcutAudit) -> list[Finding]:
    found = []
    one, back = audit.reach[ONE_STEP], audit.reach[BACKWARD]
    if one.targets < SOME:
        found.append(
            Finding(
                CAN,
                f"only {one.targets:.0%} of the targets ever followed the last item in training: what a model finds "
                "beyond these is more than a pair that it has seen",
            )
        )
    elif one.popular < EVERYTHING:
        found.append(
            Finding(
                CARE,
                f"{one.targets:.0%} of the targets followed the last item in training before ({one.lift:.1f} times as "
                "many as popularity explains): compare with the transition graph before claiming that a model learnt "
                "more",
            )
        )
    if one.targets and back.targets >= NEARLY_ALL * one.targets:
        found.append(
            Finding(
                CANNOT,
                f"the target came before the last item in training as often as after it ({back.targets:.1%} and "
                f"{one.targets:.1%} of the targets): pairs carry no direction, so there is little order to learn from "
                "them",
            )
        )
    for name in (TWO_STEPS, FROM_ANY):
        reach = audit.reach[name]
        if reach.popular >= EVERYTHING:
            found.append(
                Finding(
                    CARE,
                    f"{name}: {reach.targets:.0%} of the targets are in reach, but so are {reach.popular:.0%} of all "
                    "training events, so that says nothing",
                )
            )
    return found


def _on_similarity(audit: ShortcutAudit) -> list[Finding]:
    found = []
    for name, what in ((USERS, "by the users they share"), (TITLES, "by the words of their titles")):
        nearest = audit.similarity[name].nearest
        if nearest >= SOME:
            found.append(
                Finding(
                    CARE,
                    f"{nearest:.0%} of the targets are among the 1% of the items nearest to the last one {what}",
                )
            )
        elif name == TITLES:
            found.append(
                Finding(
                    CARE,
                    f"the words of titles hardly lead to the target ({nearest:.1%} are among the nearest 1%): "
                    "what a model of text finds here, it knows from elsewhere or from the events",
                )
            )
    return found


def _on_dependence(audit: ShortcutAudit, model: Dependence) -> list[Finding]:
    found = []
    one = model.shares["last 1"]
    if one is not None and one.mean >= NEARLY_ALL:
        found.append(
            Finding(
                CANNOT,
                f"{model.model}: the last event alone gives {_percent(one)} of the {METRIC}: what it makes of longer "
                "histories hardly shows",
            )
        )
    elif one is not None and one.high < 1 and audit.sample >= MIN_QUERIES:
        found.append(
            Finding(
                CAN,
                f"{model.model}: the last event alone gives {_percent(one)} of the {METRIC}: older events count",
            )
        )
    shuffled = model.shares[SHUFFLED]
    if shuffled is not None and shuffled.high >= 1 and shuffled.mean >= NEARLY_ALL:
        told = f"{_percent(shuffled)} of the {METRIC}"
        told += "; so wide an interval leaves open whether it counts" if shuffled.low < NEARLY_ALL else ""
        found.append(
            Finding(
                CANNOT,
                f"{model.model}: order shows no gain, shuffled histories give {told}",
            )
        )
    elif shuffled is not None and shuffled.high < 1 and audit.sample >= MIN_QUERIES:
        tied = (audit.targets.tied or 0) >= MUCH and audit.tie_order != "shuffle"
        found.append(
            Finding(
                CARE if tied else CAN,
                f"{model.model}: order counts, shuffled histories give {_percent(shuffled)} of the {METRIC}"
                + ("; part of that may be the file's order of equal times" if tied else ""),
            )
        )
    if one is None or shuffled is None:
        found.append(Finding(CANNOT, f"{model.model} finds too little to say what it needs of a history"))
    return found


def _on_targets(audit: ShortcutAudit) -> list[Finding]:
    targets, found = audit.targets, []
    if targets.repeated >= SOME:
        found.append(
            Finding(
                CARE,
                f"{targets.repeated:.0%} of the targets are in the history: a ranking that leaves out seen items "
                "cannot find these",
            )
        )
    if targets.cold >= SOME:
        found.append(
            Finding(
                CARE,
                f"{targets.cold:.0%} of the targets have no training event: a model of item ids cannot find these",
            )
        )
    if targets.popular_10 >= SOME:
        found.append(
            Finding(
                CARE,
                f"the same 10 items for everybody find {targets.popular_10:.0%} of the targets: compare with "
                "popularity",
            )
        )
    return found


def _percent(share: Interval) -> str:
    """A share with its interval.

    >>> _percent(Interval(mean=0.954, low=0.874, high=1.036))
    '95% [87, 104]'
    """
    return f"{share.mean:.0%} [{100 * share.low:.0f}, {100 * share.high:.0f}]"


# ---- one row a domain ------------------------------------------------------------------------------------------------


def table_rows(audits: Sequence[ShortcutAudit]) -> dict[str, dict[str, str]]:
    """The leading numbers of each domain, in reading order; those of the first model where there are several."""
    return {audit.domain: _row(audit) for audit in audits}


def _row(audit: ShortcutAudit) -> dict[str, str]:
    one, two = audit.reach[ONE_STEP], audit.reach[TWO_STEPS]
    row = {
        "queries": f"{audit.num_queries:,}",
        "items": f"{audit.num_items:,}",
        "history": f"{audit.median_history:g}",
        "tied": "?" if audit.targets.tied is None else f"{audit.targets.tied:.0%}",
        "repeats": f"{audit.targets.repeated:.1%}",
        "cold": f"{audit.targets.cold:.1%}",
        "top 10": f"{audit.targets.popular_10:.1%}",
        "out-degree": f"{audit.out_degree.quartiles[1]:g}",
        "1 step": f"{one.targets:.1%} ({one.popular:.1%})",
        "2 steps": f"{two.targets:.0%} ({two.popular:.0%})",
        "1 back": f"{audit.reach[BACKWARD].targets:.1%}",
        "users": f"{audit.similarity[USERS].nearest:.0%}",
        "titles": f"{audit.similarity[TITLES].nearest:.0%}",
    }
    if audit.dependence:
        model = audit.dependence[0]
        row[METRIC] = f"{model.ndcg.mean:.4f}"
        row |= {
            name: "-" if share is None else f"{100 * share.mean:.0f} [{100 * share.low:.0f}, {100 * share.high:.0f}]"
            for name in ("last 1", SHUFFLED)
            for share in [model.shares[name]]
        }
    return row


def reading(audits: Sequence[ShortcutAudit]) -> dict[str, str]:
    """What each column of `table_rows` is."""
    model = next((audit.dependence[0].model for audit in audits if audit.dependence), "")
    about = {
        "queries": "test events asked for",
        "items": "items of the catalogue",
        "history": "median number of events before the target",
        "tied": "targets that the order of events of equal time decided; ? where times are an order only",
        "repeats": "targets that are in the history already",
        "cold": "targets without a training event",
        "top 10": "targets among the 10 most popular items",
        "out-degree": "median number of different items that followed the last item in training",
        "1 step": "targets that followed the last item in training (in brackets: what popularity alone would reach)",
        "2 steps": "targets within two such steps (in brackets as before)",
        "1 back": "targets that came just before the last item in training",
        "users": "targets among the 1% of the items that share most users with the last one (1% by chance)",
        "titles": "targets among the 1% of the items with titles most like the last one's (1% by chance)",
    }
    if model:
        about |= {
            METRIC: f"of the {model}, full catalogue without seen items",
            "last 1": f"per cent of that {METRIC} when only the last event is shown, with 95% interval",
            SHUFFLED: f"per cent of that {METRIC} when histories are shuffled, with 95% interval",
        }
    return about


def markdown_table(audits: Sequence[ShortcutAudit]) -> str:
    """The table in Markdown."""
    rows = table_rows(audits)
    heads = list(next(iter(rows.values()), {}))
    lines = [
        ["domain", *heads],
        ["---", *["---:"] * len(heads)],
        *([name, *row.values()] for name, row in rows.items()),
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# ---- terminal --------------------------------------------------------------------------------------------------------


def print_shortcuts(audits: Sequence[ShortcutAudit], file: TextIO | None = None) -> None:
    """Print the numbers of all domains, a column each, then what they mean; `file` is standard output if None."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=file, highlight=False)
    if not console.is_terminal:
        console = Console(file=file, highlight=False, width=max(console.width, 120))
    rows, about = table_rows(audits), reading(audits)
    widths = [max(len(audit.domain), *map(len, rows[audit.domain].values())) for audit in audits]
    fitting = max(1, (console.width - max(map(len, about))) // (max(widths) + 1))
    for start in range(0, len(audits), fitting):
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column("", no_wrap=True)
        for audit in audits[start : start + fitting]:
            table.add_column(Text(audit.domain), justify="right")
        for head in about:
            table.add_row(head, *(rows[audit.domain].get(head, "-") for audit in audits[start : start + fitting]))
        console.print(table)
        console.print()
    for head, text in about.items():
        console.print(Text(f"{head}: {text}"), style="dim")
    for audit in audits:
        console.print()
        console.print(Text(audit.domain), style="bold")
        for finding in findings(audit):
            console.print(Text(f"  {finding.kind}: {finding.text}"))


# ---- files -----------------------------------------------------------------------------------------------------------


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
    told = {"protocol": dict(protocol), "domains": numbers}
    text = json.dumps(told, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    for path, content in ((record, text), (page, shortcut_page(title, audits, protocol))):
        temporary = path.with_name(path.name + ".incomplete")
        temporary.write_text(content, encoding="utf-8")
        temporary.replace(path)


def shortcut_page(title: str, audits: Sequence[ShortcutAudit], protocol: Mapping[str, str]) -> str:
    """The text of the page: one table, how it was measured, then the findings and plots of each domain."""
    how = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in protocol.items())
    terms = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in reading(audits).items())
    about = f"<details><summary>What the columns are</summary><dl>{terms}</dl></details>"
    body = [
        f"<h1>CPRec: shortcuts in {escape(title)}</h1>",
        "<p>How much of what is asked could be found without learning what users want: read this before a claim that a "
        "recommender beats another on these data. Everything is learnt from the training part.</p>",
        f"<section>{_table(audits)}{about}</section>",
        f'<section class="box"><h2>How this was measured</h2><dl>{how}</dl></section>',
        *map(_section, audits),
    ]
    return html_page(escape(f"shortcuts in {title}"), body)


def _table(audits: Sequence[ShortcutAudit]) -> str:
    rows, heads = table_rows(audits), list(reading(audits))
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    lines = ""
    for name, row in rows.items():
        cells = "".join(f"<td>{escape(row.get(head, '-'))}</td>" for head in heads)
        lines += f"<tr><th>{escape(name)}</th>{cells}</tr>"
    return f'<div class="scroll"><table class="metrics"><tr><th></th>{head}</tr>{lines}</table></div>'


def _section(audit: ShortcutAudit) -> str:
    reached = {name: (reach.targets, reach.popular) for name, reach in audit.reach.items()}
    figures = [
        _figure("Targets reached (grey: what popularity alone would reach)", _pairs(reached)),
        _figure("Items that follow the last item", _bars(audit.out_degree.histogram)),
        *(
            _figure(
                f"Similarity of the target to the last item, by {name}",
                _columns(similarity.histogram, "percentile among all items; no likeness at all lies near 50"),
            )
            for name, similarity in audit.similarity.items()
        ),
        *(
            _figure(f"{each.model}: {METRIC} kept ({each.ndcg.mean:.4f} on whole histories)", _kept(each.shares))
            for each in audit.dependence
        ),
    ]
    lines = "".join(f"<li><b>{finding.kind}</b>: {escape(finding.text)}</li>" for finding in findings(audit))
    return (
        f"<section><h2>{escape(audit.domain)}: {audit.num_queries:,} queries, {audit.num_items:,} items</h2>"
        f'<ul>{lines}</ul><div class="charts">{"".join(figures)}</div>'
        f"<p><small>Similarity and models on {audit.sample:,} queries, drawn with seed {audit.seed}; the rest on all. "
        f"{audit.num_train_events:,} training events, {audit.immediate_repeats:.1%} of them repeats of the event "
        f"before. More than 1, 2 and 5 events of history: {', '.join(f'{s:.0%}' for s in audit.longer.values())} of "
        "the queries.</small></p></section>"
    )


def _figure(caption: str, drawing: str) -> str:
    return f"<figure><figcaption>{escape(caption)}</figcaption>{drawing}</figure>"


def _bars(shares: Mapping[str, float]) -> str:
    """A row with a bar for each share."""
    largest = max(shares.values())
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{_bar(share, largest, 'accent')}</td><td>{share:.1%}</td></tr>"
        for name, share in shares.items()
    )
    return f'<table class="bars">{rows}</table>'


def _pairs(shares: Mapping[str, tuple[float, float]]) -> str:
    """A row with two bars, one under the other, for each pair; the full width is everything."""
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{_bar(first, 1, 'accent')}{_bar(second, 1, 'bar')}</td>"
        f"<td>{first:.1%}<br><small>{second:.1%}</small></td></tr>"
        for name, (first, second) in shares.items()
    )
    return f'<table class="bars">{rows}</table>'


def _bar(share: float, largest: float, colour: str) -> str:
    width = 100 * share / largest if largest > 0 else 0
    return (
        f'<svg class="bar" width="100%" height="12" role="img" aria-label="{share:.4f}">'
        f'<rect width="{width:.2f}%" y="1" height="9" rx="2" fill="var(--{colour})"/></svg>'
    )


def _kept(shares: Mapping[str, Interval | None]) -> str:
    """A row with a bar and its interval for each variant; those that are not known have none."""
    largest = max((share.high for share in shares.values() if share), default=1.0)
    rows = ""
    for name, share in shares.items():
        bar = interval_bar(share.mean, share.low, share.high, largest, "accent") if share else ""
        rows += f"<tr><th>{escape(name)}</th><td>{bar}</td><td>{f'{share.mean:.0%}' if share else '-'}</td></tr>"
    return f'<table class="bars">{rows}</table>'


def _columns(shares: Sequence[float], x_label: str) -> str:
    """A histogram over 0 to 100 in equal bins, with a line at the height that all would have by chance."""
    width, height, left, bottom, top = 360, 170, 40, 34, 8
    largest = max(*shares, 2 / len(shares))
    step, tall = (width - left - 8) / len(shares), height - bottom - top
    parts = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(x_label)}">']
    for place, share in enumerate(shares):
        size = tall * share / largest
        parts.append(
            f'<rect x="{left + place * step + 1:.1f}" y="{height - bottom - size:.1f}" width="{step - 2:.1f}" '
            f'height="{size:.1f}" fill="var(--accent)"><title>{share:.1%}</title></rect>'
        )
    chance = height - bottom - tall / len(shares) / largest
    parts.append(
        f'<line x1="{left}" x2="{width - 8}" y1="{chance:.1f}" y2="{chance:.1f}" stroke="var(--warning)" '
        'stroke-dasharray="4 3"/>'
    )
    for share in (0, largest):
        y = height - bottom - tall * share / largest + 4
        parts.append(f'<text x="{left - 5}" y="{y:.1f}" text-anchor="end">{share:.0%}</text>')
    for place in (0, 25, 50, 75, 100):
        x = left + (width - left - 8) * place / 100
        anchor = "end" if place == 100 else "middle"
        parts.append(f'<text x="{x:.1f}" y="{height - bottom + 14}" text-anchor="{anchor}">{place}</text>')
    middle = (left + width - 8) / 2
    parts.append(f'<text x="{middle:.0f}" y="{height - 4}" text-anchor="middle">{escape(x_label)}</text></svg>')
    return "".join(parts)
