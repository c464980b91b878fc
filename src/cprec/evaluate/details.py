"""Details of a domain's results as HTML: the other rule for seen items, popular candidates, new items, slices, lists,
cost. What a report does not have is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from cprec.evaluate.slices import ABOUT

Arms = Mapping[str, Mapping[str, Any]]

LISTS = {
    "coverage": "share of the catalogue that is in at least one list",
    "gini": "inequality of how often items are listed; 0 is even",
    "novelty": "bits: how rare the listed items were in training",
    "tail_share": "share of listed items outside the most popular 20 %",
    "diversity": "mean distance of the titles in a list",
}
"""Measures of lists, with what they are."""


def details_of(arms: Arms, cut: int) -> str:
    """The tables of a domain, one after the other."""
    leading = (f"ndcg@{cut}", f"recall@{cut}")
    parts = [
        _pool(arms, "seen_kept", "Full catalogue, seen items may be recommended again", leading),
        _pool(arms, "seen_left_out", "Full catalogue, seen items left out", leading),
        *(
            _pool(arms, name, f"{size.removeprefix('candidates')} candidates, the others by popularity", ("recall@1",))
            for name, size in _popular(arms).items()
        ),
        _new_items(arms, cut),
        *_slices(arms, cut),
        _lists(arms),
        _cost(arms),
    ]
    return f'<div class="tables">{"".join(parts)}</div>'


def _popular(arms: Arms) -> dict[str, str]:
    first = next(iter(arms.values()))
    return {name: name.removesuffix("_popularity") for name in first if name.endswith("_popularity")}


def _pool(arms: Arms, name: str, caption: str, metrics: Sequence[str]) -> str:
    having = {arm: values[name] for arm, values in arms.items() if name in values}
    heads = [_written(metric) for metric in metrics]
    rows = {arm: [_interval(values[metric]) for metric in metrics] for arm, values in having.items()}
    return _table(caption, heads, rows)


def _new_items(arms: Arms, cut: int) -> str:
    having = {arm: values["new_items"] for arm, values in arms.items() if "new_items" in values}
    if not having:
        return ""
    about = next(iter(having.values()))
    caption = (
        f"New items: the {about['num_queries']:,} queries whose target never occurs in training, ranked among the "
        f"{about['num_items']:,} items that do not. An arm that knows items by their events alone names none, or "
        "ranks them by nothing it has learnt."
    )
    metrics = (f"ndcg@{cut}", f"recall@{cut}")
    rows = {arm: [_interval(values[metric]) for metric in metrics] for arm, values in having.items()}
    return _table(caption, [_written(metric) for metric in metrics], rows)


def _slices(arms: Arms, cut: int) -> list[str]:
    having = {arm: values["slices"] for arm, values in arms.items() if values.get("slices")}
    out = []
    for name, groups in next(iter(having.values()), {}).items():
        heads = [f"{escape(group)}<br><small>{cell['num_queries']:,} queries</small>" for group, cell in groups.items()]
        rows = {
            arm: [_interval(slices[name][group][f"ndcg@{cut}"]) for group in groups] for arm, slices in having.items()
        }
        out.append(_table(f"NDCG@{cut} by {name}: {ABOUT[name]}", heads, rows))
    return out


def _lists(arms: Arms) -> str:
    having = {arm: values["lists"] for arm, values in arms.items() if values.get("lists")}
    heads = [name.replace("_", " ") for name in LISTS]
    rows = {arm: [f"{lists[name]:.3f}" if name in lists else "" for name in LISTS] for arm, lists in having.items()}
    caption = "Lists: " + "; ".join(f"{name.replace('_', ' ')}, {about}" for name, about in LISTS.items())
    return _table(caption, heads, rows)


def _cost(arms: Arms) -> str:
    having = {arm: values["cost"] for arm, values in arms.items() if "cost" in values}
    rows = {
        arm: [
            f"{cost['num_parameters'] / 1e6:,.2f} M" if "num_parameters" in cost else "",
            f"{cost['train_seconds']:,.0f}" if "train_seconds" in cost else "",
            f"{cost['milliseconds_per_query']:,.2f}",
        ]
        for arm, cost in having.items()
    }
    return _table("Cost, on the machine that made them", ["parameters", "seconds of training", "ms per query"], rows)


def _interval(cell: Mapping[str, float]) -> str:
    return f"{cell['mean']:.4f}<br><small>{cell['low']:.4f} to {cell['high']:.4f}</small>"


def _written(metric: str) -> str:
    name, _, cut = metric.partition("@")
    return f"{ {'ndcg': 'NDCG', 'recall': 'Recall'}[name] }@{cut}"


def _table(caption: str, heads: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """Rows by arm, cells as HTML; nothing where there are none."""
    if not rows:
        return ""
    head = "".join(f"<th>{text}</th>" for text in heads)
    body = "".join(
        f"<tr><th>{escape(arm)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>" for arm, cells in rows.items()
    )
    return (
        f'<div class="scroll"><table class="metrics"><caption>{escape(caption)}</caption>'
        f"<tr><th></th>{head}</tr>{body}</table></div>"
    )
