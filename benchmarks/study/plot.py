"""Plots of the study as SVG files that stand alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from cprec.evaluate.charts import Scale, number, ticks

WIDTH, LABELS, ROW, FOOT = 860, 420, 18, 40
"""Units of the drawing: the whole, the labels on the left, a row, what is below the rows."""
WIDEST = 4
COLOURS = ("#0b6e99", "#c2410c", "#4d7c0f", "#7e22ce", "#b45309", "#0f766e", "#be123c", "#475569")
STYLE = (
    '<style>text{font:12px sans-serif;fill:#333}line{stroke:#888}</style><rect width="100%" height="100%" fill="#fff"/>'
)


def forest(rows: Mapping[str, tuple[float, float, float]], x_label: str) -> str:
    """Means as dots with their intervals (mean, low, high), a row each, and a line at 0.

    The axis ends at `WIDEST` times the largest mean: an interval that is wider is cut there.
    """
    ends = [end for row in rows.values() for end in row]
    most = WIDEST * max(abs(mean) for mean, _, _ in rows.values()) or 1.0
    low, high = max(-most, min(0.0, *ends)), min(most, max(0.0, *ends))
    x = Scale(low, high, LABELS, WIDTH - 20)
    bottom = ROW * len(rows) + 8
    parts = [_axis(x, ticks(low, high, 6), bottom, x_label)]
    parts.append(f'<line x1="{x(0):.1f}" x2="{x(0):.1f}" y1="0" y2="{bottom}" stroke-dasharray="3 3"/>')
    for place, (name, (mean, left, right)) in enumerate(rows.items()):
        y = ROW * place + 14
        ends = max(left, low), min(right, high)
        colour = COLOURS[0] if left > 0 else COLOURS[1] if right < 0 else COLOURS[7]
        parts.append(f'<text x="{LABELS - 8}" y="{y + 4}" text-anchor="end">{escape(name)}</text>')
        parts.append(f'<line x1="{x(ends[0]):.1f}" x2="{x(ends[1]):.1f}" y1="{y}" y2="{y}" style="stroke:{colour}"/>')
        parts.append(f'<circle cx="{x(mean):.1f}" cy="{y}" r="4" fill="{colour}"/>')
    return _svg(bottom + FOOT, parts)


def lines(curves: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str) -> str:
    """Points by name, joined in order, over one pair of axes, with a legend on the left."""
    xs, ys = zip(*(point for points in curves.values() for point in points), strict=True)
    x, y = Scale(min(xs), max(xs), LABELS, WIDTH - 20), Scale(min(ys), max(ys), 240, 10)
    parts = [_axis(x, ticks(min(xs), max(xs), 5), 250, x_label)]
    for tick in ticks(min(ys), max(ys), 5):
        parts.append(f'<text x="{LABELS - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    parts.append(f'<text x="8" y="14">{escape(y_label)}</text>')
    for place, (name, points) in enumerate(curves.items()):
        colour, path = COLOURS[place % len(COLOURS)], " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts += [f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="2.5" fill="{colour}"/>' for a, b in points]
        parts.append(f'<text x="8" y="{38 + ROW * place}" style="fill:{colour}">{escape(name)}</text>')
    return _svg(250 + FOOT, parts)


def _axis(x: Scale, at: Sequence[float], bottom: int, label: str) -> str:
    """The axis below a plot."""
    marks = [f'<line x1="{x.start}" x2="{x.end}" y1="{bottom}" y2="{bottom}"/>']
    marks += [f'<text x="{x(tick):.1f}" y="{bottom + 15}" text-anchor="middle">{number(tick)}</text>' for tick in at]
    middle = (x.start + x.end) / 2
    return "".join([*marks, f'<text x="{middle}" y="{bottom + 32}" text-anchor="middle">{escape(label)}</text>'])


def _svg(height: int, parts: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">'
    return "\n".join([head, STYLE, *parts, "</svg>"]) + "\n"
