"""Charts for the pages: what they show is computed here, and drawn as SVG by `templates/charts.html`."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean
from typing import Any

from markupsafe import Markup

from cprec.evaluate.pages import TEMPLATES

WIDTH, HEIGHT, HISTOGRAM_HEIGHT = 360, 210, 170
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 8, 34
"""Margins of the plotting area, in units of the drawing: on a phone about a pixel each."""

Points = Sequence[tuple[float, float]]
Band = tuple[str, float, float]
"""A name, and the first and last x of the stretch that it names."""


@dataclass(frozen=True)
class Scale:
    """Where values stand along an axis: `low` at `start`, `high` at `end`."""

    low: float
    high: float
    start: int
    end: int
    log: bool = False

    def __call__(self, value: float) -> float:
        high = self.high if self.high > self.low else self.low + 1
        if self.log:
            share = math.log(value / self.low) / math.log(high / self.low)
        else:
            share = (value - self.low) / (high - self.low)
        return self.start + share * (self.end - self.start)


ACROSS = LEFT, WIDTH - RIGHT
"""Where an axis of x starts and ends."""
MACROS: Any = TEMPLATES.get_template("charts.html").module
"""What draws the charts, and escapes all text in them."""


@dataclass(frozen=True)
class Value:
    """A number with the ends of its interval, where it has one: drawn as a bar, or as a full or hollow dot."""

    value: float
    ends: tuple[float, float] | None = None
    colour: str = "accent"
    dot: bool = False
    hollow: bool = False

    def __str__(self) -> str:
        return f"{self.value:.4f}" + ("" if self.ends is None else f", from {self.ends[0]:.4f} to {self.ends[1]:.4f}")


@dataclass(frozen=True)
class Box:
    """A rectangle that stands on the axis: a `column` of a histogram, or a `band` behind lines, as high as the plot."""

    kind: str
    title: str
    left: float
    right: float
    top: float | None = None


def row_chart(
    rows: Mapping[str, Sequence[Value]],
    form: str,
    *,
    low: float = 0.0,
    high: float | None = None,
    level: float | None = None,
) -> Markup:
    """Rows by name, each with its values drawn one under the other and written as `form` says, a dash without any.

    The axis goes from `low` to `high`, by default the largest number that is drawn; a dashed line marks `level`.
    """
    if high is None:
        high = max((max(value.ends or (value.value,)) for row in rows.values() for value in row), default=0.0)
    return Markup(MACROS.row_chart(rows, form, low, high, level))


def histogram(shares: Sequence[float], x_label: str) -> Markup:
    """Shares in equal bins over 0 to 100, with a line at the height that all bins would have by chance."""
    largest, width = max(*shares, 2 / len(shares)), 100 / len(shares)
    x, y = Scale(0, 100, *ACROSS), Scale(0, largest, HISTOGRAM_HEIGHT - BOTTOM, TOP)
    boxes = [Box("column", f"{share:.1%}", n * width, (n + 1) * width, share) for n, share in enumerate(shares)]
    x_ticks, y_ticks = {tick: str(tick) for tick in (0, 25, 50, 75, 100)}, {0: "0%", largest: f"{largest:.0%}"}
    return Markup(MACROS.plot(x_label, x, y, x_ticks, y_ticks, x_label, boxes, level=1 / len(shares)))


def line_chart(
    lines: Mapping[str, Points],
    *,
    x_label: str,
    log_y: bool = False,
    from_zero: bool = False,
    bands: Sequence[Band] = (),
) -> Markup:
    """Lines by name over one pair of axes, x in whole numbers, with a legend of names below if there is more than one.

    `bands` are stretches of x that are shaded, as far as the lines go. Points that are not finite are left out, and
    with a logarithmic axis those that are not above 0. Returns '' where no point is left.
    """
    drawn = {}
    for name, points in lines.items():
        if kept := [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y) and (y > 0 or not log_y)]:
            drawn[name] = kept
    if not drawn:
        return Markup("")
    xs, ys = zip(*chain(*drawn.values()), strict=True)
    x_ticks = [tick for tick in ticks(min(xs), max(xs), 5) if tick == int(tick)]  # steps and tokens are whole numbers
    y_ticks = log_ticks(min(ys), max(ys)) if log_y else ticks(0.0 if from_zero else min(ys), max(ys), 5)
    x = Scale(min(xs), max(xs), *ACROSS)
    y = Scale(min(*ys, *y_ticks), max(*ys, *y_ticks), HEIGHT - BOTTOM, TOP, log=log_y)
    boxes = [Box("band", name, max(first, x.low), min(last, x.high)) for name, first, last in bands]
    shaded = [box for box in boxes if box.left < box.right]
    labels = ({tick: number(tick) for tick in chosen} for chosen in (x_ticks, y_ticks))
    return Markup(MACROS.plot(", ".join(drawn), x, y, *labels, x_label, shaded, drawn))


# ---- numbers ---------------------------------------------------------------------------------------------------------


def thinned(points: Points, most: int = 240) -> list[tuple[float, float]]:
    """At most `most` points: means of neighbours, in order, where there are more.

    >>> thinned([(0, 1.0), (1, 3.0), (2, 5.0), (3, 7.0)], most=2)
    [(0.5, 2.0), (2.5, 6.0)]
    """
    size = max(1, math.ceil(len(points) / most))
    groups = (zip(*points[start : start + size], strict=True) for start in range(0, len(points), size))
    return [(fmean(xs), fmean(ys)) for xs, ys in groups]


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
    [2.0, 5.0, 10.0, 20.0, 50.0]
    >>> log_ticks(3, 2000)
    [1.0, 10.0, 100.0, 1000.0, 10000.0]
    """
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)

    def spanning(factors: Sequence[int]) -> list[float]:
        values = [float(f"{factor}e{power}") for power in powers for factor in factors]
        # Rounding errors must not add a tick beyond an end that lies on one.
        return values[bisect_right(values, low * (1 + 1e-9)) - 1 : bisect_left(values, high * (1 - 1e-9)) + 1]

    fine = spanning((1, 2, 5))
    return fine if len(fine) <= 7 else spanning((1,))


def number(value: float) -> str:
    """A tick's label.

    >>> number(0.0), number(0.003), number(1500), number(2_500_000), number(0.00002)
    ('0', '0.003', '1,500', '2.5M', '2e-05')
    """
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"
