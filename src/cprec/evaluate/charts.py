"""Charts as inline SVG text: they take the page's font and colours, in light and dark mode, and need no library.

Colours are the CSS variables --line-0 .. --line-7, --accent, --bar, --muted and --grid of the page around them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

NUM_COLOURS = 8
WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 8, 34
"""Margins of the plotting area, in units of the drawing: on a phone about a pixel each."""
DASHES = ("", "5 3", "1.5 2.5")
"""Past the eighth line colours start again, dashed."""

Points = Sequence[tuple[float, float]]
Band = tuple[str, float, float]
"""A name, and the first and last x of what it names."""


def interval_bar(mean: float, low: float, high: float, largest: float, colour: str) -> str:
    """A horizontal bar to `mean` with a whisker from `low` to `high`; the full width stands for `largest`."""
    share = [f"{100 * value / largest if largest > 0 else 0.0:.2f}%" for value in (mean, low, high)]
    whisker = "".join(f'<line x1="{x}" x2="{x}" y1="4" y2="12"/>' for x in share[1:])
    return (
        f'<svg class="bar" width="100%" height="16" role="img" aria-label="{mean:.4f}, from {low:.4f} to {high:.4f}">'
        f'<rect width="{share[0]}" y="2" height="12" rx="2" fill="var(--{colour})"/>'
        f'<g stroke="currentColor"><line x1="{share[1]}" x2="{share[2]}" y1="8" y2="8"/>{whisker}</g></svg>'
    )


def line_chart(
    lines: Mapping[str, Points],
    *,
    x_label: str,
    log_y: bool = False,
    from_zero: bool = False,
    bands: Sequence[Band] = (),
) -> str:
    """Lines by name over one pair of axes, x in whole steps, with a legend of names below if there is more than one.

    `bands` are stretches of x that are shaded, as far as the lines go. Points that are not finite are left out, and
    with a logarithmic axis those that are not above 0. Returns '' where nothing is left to draw.
    """
    drawn = {name: _drawable(points, log_y) for name, points in lines.items()}
    drawn = {name: points for name, points in drawn.items() if points}
    if not drawn:
        return ""
    xs = [x for points in drawn.values() for x, _ in points]
    ys = [y for points in drawn.values() for _, y in points]
    x_ticks = [tick for tick in ticks(min(xs), max(xs), 5) if tick == int(tick)]  # there is no half step
    y_ticks = log_ticks(min(ys), max(ys)) if log_y else ticks(0.0 if from_zero else min(ys), max(ys), 5)
    x_low, x_high = min(xs), max(xs)
    y_low, y_high = min(*ys, *y_ticks), max(*ys, *y_ticks)
    if x_high == x_low:
        x_high = x_low + 1
    if y_high == y_low:
        y_high = y_low + 1

    def place(x: float, y: float) -> tuple[float, float]:
        along = (math.log(y / y_low) / math.log(y_high / y_low)) if log_y else (y - y_low) / (y_high - y_low)
        across = (x - x_low) / (x_high - x_low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - along * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(", ".join(drawn))}">']
    for name, first, last in bands:
        (left, _), (right, _) = (place(min(max(x, x_low), x_high), y_low) for x in (first, last))
        if right > left:
            parts.append(
                f'<rect x="{left:.1f}" y="{TOP}" width="{right - left:.1f}" height="{HEIGHT - TOP - BOTTOM}" '
                f'fill="var(--muted)" opacity="0.35"><title>{escape(name)}</title></rect>'
            )
    for tick in y_ticks:
        _, y = place(x_low, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y + 3.5:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in x_ticks:
        x, _ = place(tick, y_low)
        anchor = "end" if x > WIDTH - 25 else "middle"
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="{anchor}">{number(tick)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle:.0f}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>')
    legend = []
    for index, (name, points) in enumerate(drawn.items()):
        dash = DASHES[index // NUM_COLOURS % len(DASHES)]
        style = f'stroke="var(--line-{index % NUM_COLOURS})"' + (f' stroke-dasharray="{dash}"' if dash else "")
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
        parts.append(f'<polyline points="{path}" fill="none" stroke-width="1.6" {style}/>')
        if len(points) == 1:
            x, y = place(*points[0])
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="var(--line-{index % NUM_COLOURS})"/>')
        swatch = f'<svg width="22" height="8"><line x1="0" x2="22" y1="4" y2="4" stroke-width="2.5" {style}/></svg>'
        legend.append(f"<span>{swatch} {escape(name)}</span>")
    parts.append("</svg>")
    if len(legend) > 1:
        parts.append(f'<div class="legend">{" ".join(legend)}</div>')
    return "".join(parts)


def _drawable(points: Points, log_y: bool) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y) and (y > 0 or not log_y)]


def thinned(points: Points, most: int = 240) -> list[tuple[float, float]]:
    """At most `most` points: means of neighbours, in order, where there are more.

    >>> thinned([(0, 1.0), (1, 3.0), (2, 5.0), (3, 7.0)], most=2)
    [(0.5, 2.0), (2.5, 6.0)]
    """
    size = math.ceil(len(points) / most) if points else 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    if size == 1:
        return [(float(x), float(y)) for x, y in points]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers within low..high, 1, 2 or 5 times a power of ten apart, at most `most` + 1 of them.

    >>> ticks(0, 0.003, 5)
    [0.0, 0.001, 0.002, 0.003]
    >>> ticks(3, 477, 5)
    [100, 200, 300, 400]
    """
    if high <= low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(factor * power for factor in (1, 2, 5, 10) if (high - low) / (factor * power) <= most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    decimals = max(0, -math.floor(math.log10(step)))
    return [round(place * step, decimals) if decimals else round(place * step) for place in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten that span low..high; powers of ten alone where these are many.

    >>> log_ticks(3, 40)
    [2, 5, 10, 20, 50]
    >>> log_ticks(3, 2000)
    [1, 10, 100, 1000, 10000]
    """
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    fine = [factor * 10**power if power >= 0 else factor / 10**-power for power in powers for factor in (1, 2, 5)]
    chosen = _span(fine, low, high)
    return chosen if len(chosen) <= 7 else _span([10**p if p >= 0 else 1 / 10**-p for p in powers], low, high)


def _span(ordered: Sequence[float], low: float, high: float) -> list[float]:
    """The shortest run of numbers from one at most `low` to one at least `high`."""
    first = max(place for place, value in enumerate(ordered) if value <= low * (1 + 1e-9))
    last = min(place for place, value in enumerate(ordered) if value >= high * (1 - 1e-9))
    return list(ordered[first : last + 1])


def number(value: float) -> str:
    """A tick's label.

    >>> number(0.0), number(0.003), number(1500), number(2_500_000), number(0.00002)
    ('0', '0.003', '1,500', '2.5M', '2e-05')
    """
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"
