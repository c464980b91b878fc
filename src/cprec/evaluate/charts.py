"""Charts as inline SVG: they take the page's font and colours, in light and dark mode, and need no library.

Colours are the CSS variables --line-0 .. --line-7, --accent, --bar, --muted, --warning and --grid of the page around
them. Every text in a chart is escaped by `tag`, which makes all elements.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from markupsafe import Markup

NUM_COLOURS = 8
WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 8, 34
"""Margins of the plotting area, in units of the drawing: on a phone about a pixel each."""
DASHES = ("", "5 3", "1.5 2.5")
"""Past the eighth line colours start again, dashed."""
ARM_HEIGHT, LONGEST_NAME = 32, 48
"""Height of an arm in a forest plot, in units of the drawing, and characters of its name that are shown."""

Points = Sequence[tuple[float, float]]
Band = tuple[str, float, float]
"""A name, and the first and last x of the stretch that it names."""


def tag(name: str, *children: str, **attributes: object) -> Markup:
    """An element of HTML or SVG. Children and attributes are escaped, unless they are Markup; floats get one decimal.

    >>> tag("text", "a < b", x=1.25, text_anchor="end", class_="note")
    Markup('<text x="1.2" text-anchor="end" class="note">a &lt; b</text>')
    """
    written = Markup("")
    for key, value in attributes.items():
        if value is not None:
            shown = f"{value:.1f}" if isinstance(value, float) else value
            written += Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), shown)
    return Markup("<{0}{1}>{2}</{0}>").format(name, written, Markup("").join(children))


@dataclass(frozen=True)
class Scale:
    """Where values stand along an axis: `low` at `start`, `high` at `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        high = self.high if self.high > self.low else self.low + 1
        if self.log:
            share = math.log(value / self.low) / math.log(high / self.low)
        else:
            share = (value - self.low) / (high - self.low)
        return float(self.start + share * (self.end - self.start))


# ---- bars ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """A bar from 0 to a value; the ends of its interval, where it has one, get a whisker."""

    value: float
    ends: tuple[float, float] | None = None
    colour: str = "accent"


def bars(rows: Mapping[str, Sequence[Bar]], form: str, largest: float | None = None) -> Markup:
    """Rows by name, each with its bars one under the other and their values as `form` writes them, a dash without any.

    The full width stands for `largest`, by default the largest number that is drawn.
    """
    if largest is None:
        largest = max((max(bar.ends or (bar.value,)) for row in rows.values() for bar in row), default=0.0)
    lines = []
    for name, row in rows.items():
        first, *others = [form.format(bar.value) for bar in row] or ["-"]
        number = tag("td", first, *(tag("small", text) for text in others))
        lines.append(tag("tr", tag("th", name), tag("td", *(_bar(bar, largest) for bar in row)), number))
    return tag("table", *lines, class_="bars")


def _bar(bar: Bar, largest: float) -> Markup:
    parts = [tag("rect", width=_percent(bar.value, largest), y=2, height=11, rx=2, fill=f"var(--{bar.colour})")]
    label = f"{bar.value:.4f}"
    if bar.ends is not None:
        left, right = (_percent(end, largest) for end in bar.ends)
        whiskers = (tag("line", x1=x, x2=x, y1=4, y2=12) for x in (left, right))
        parts.append(tag("g", tag("line", x1=left, x2=right, y1=8, y2=8), *whiskers, stroke="currentColor"))
        label += f", from {bar.ends[0]:.4f} to {bar.ends[1]:.4f}"
    return tag("svg", *parts, class_="bar", width="100%", height=15, role="img", aria_label=label)


def _percent(value: float, largest: float) -> str:
    return f"{100 * value / largest if largest > 0 else 0.0:.2f}%"


# ---- charts with axes ------------------------------------------------------------------------------------------------


def histogram(shares: Sequence[float], x_label: str) -> Markup:
    """Shares in equal bins over 0 to 100, with a line at the height that all bins would have by chance."""
    height, largest, step = 170, max(*shares, 2 / len(shares)), 100 / len(shares)
    x, y = Scale(0, 100, LEFT, WIDTH - RIGHT), Scale(0, largest, height - BOTTOM, TOP)
    columns = [
        _rectangle(f"{share:.1%}", x(place * step) + 1, x((place + 1) * step) - 1, y(share), y(0), fill="var(--accent)")
        for place, share in enumerate(shares)
    ]
    chance = _across(y(1 / len(shares)), stroke="var(--warning)", stroke_dasharray="4 3")
    sizes = [tag("text", f"{share:.0%}", x=LEFT - 5, y=y(share) + 4, text_anchor="end") for share in (0, largest)]
    below = _below(x, (0, 25, 50, 75, 100), x_label, height)
    return _chart([*columns, chance, *sizes, *below], height, x_label)


def line_chart(
    lines: Mapping[str, Points],
    *,
    x_label: str,
    log_y: bool = False,
    from_zero: bool = False,
    bands: Sequence[Band] = (),
) -> Markup:
    """Lines by name over one pair of axes, x in whole steps, with a legend of names below if there is more than one.

    `bands` are stretches of x that are shaded, as far as the lines go. Points that are not finite are left out, and
    with a logarithmic axis those that are not above 0. Nothing is returned where nothing is left to draw.
    """
    drawn = {name: kept for name, points in lines.items() if (kept := _drawable(points, log_y))}
    if not drawn:
        return Markup("")
    xs, ys = zip(*chain(*drawn.values()), strict=True)
    x_ticks = [tick for tick in ticks(min(xs), max(xs), 5) if tick == int(tick)]  # there is no half step
    y_ticks = log_ticks(min(ys), max(ys)) if log_y else ticks(0.0 if from_zero else min(ys), max(ys), 5)
    x = Scale(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    y = Scale(min(*ys, *y_ticks), max(*ys, *y_ticks), HEIGHT - BOTTOM, TOP, log=log_y)
    parts = []
    for name, first, last in bands:
        left, right = (x(min(max(edge, x.low), x.high)) for edge in (first, last))
        if right > left:
            parts.append(_rectangle(name, left, right, TOP, HEIGHT - BOTTOM, fill="var(--muted)", opacity="0.35"))
    for tick in y_ticks:
        parts.append(_across(y(tick), class_="grid"))
        parts.append(tag("text", number(tick), x=LEFT - 5, y=y(tick) + 3.5, text_anchor="end"))
    parts += _below(x, x_ticks, x_label, HEIGHT)
    styles = [_line_style(place) for place in range(len(drawn))]
    parts += [_line(points, x, y, style) for points, style in zip(drawn.values(), styles, strict=True)]
    chart = _chart(parts, HEIGHT, ", ".join(drawn))
    return chart + _legend(dict(zip(drawn, styles, strict=True))) if len(drawn) > 1 else chart


def _chart(parts: Iterable[Markup], height: int, label: str) -> Markup:
    return tag("svg", *parts, class_="chart", viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label=label)


def _rectangle(title: str, left: float, right: float, top: float, bottom: float, **style: str) -> Markup:
    size = {"width": float(right - left), "height": float(bottom - top)}
    return tag("rect", tag("title", title), x=left, y=top, **size, **style)


def _across(y: float, **style: str) -> Markup:
    """A line across the plot."""
    return tag("line", **style, x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y)


def _below(x: Scale, values: Sequence[float], label: str, height: int) -> Iterator[Markup]:
    """Numbers below the plot, and what they are."""
    for value in values:
        anchor = "end" if x(value) > WIDTH - 25 else "middle"
        yield tag("text", number(value), x=x(value), y=height - BOTTOM + 14, text_anchor=anchor)
    yield tag("text", label, x=(LEFT + WIDTH - RIGHT) // 2, y=height - 4, text_anchor="middle")


def _drawable(points: Points, log_y: bool) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y) and (y > 0 or not log_y)]


def _line_style(place: int) -> dict[str, str | None]:
    dash = DASHES[place // NUM_COLOURS % len(DASHES)]
    return {"stroke": f"var(--line-{place % NUM_COLOURS})", "stroke_dasharray": dash or None}


def _line(points: Points, x: Scale, y: Scale, style: Mapping[str, str | None]) -> Markup:
    path = " ".join(f"{x(across):.1f},{y(up):.1f}" for across, up in points)
    line = tag("polyline", points=path, fill="none", stroke_width="1.6", **style)
    ends = [tag("circle", cx=x(across), cy=y(up), r="2.5", fill=style["stroke"]) for across, up in points[:1]]
    return line + ends[0] if len(points) == 1 else line


def _legend(styles: Mapping[str, Mapping[str, str | None]]) -> Markup:
    names = []
    for name, style in styles.items():
        line = tag("line", x1=0, x2=22, y1=4, y2=4, stroke_width="2.5", **style)
        names.append(tag("span", tag("svg", line, width=22, height=8), " ", name))
    return tag("div", *names, class_="legend")


@dataclass(frozen=True)
class Mark:
    """A value with its interval, as a dot that is full or hollow."""

    value: float
    ends: tuple[float, float]
    colour: str
    full: bool


def forest_plot(marks: Mapping[str, Mark], label: str, line_at: float | None) -> Markup:
    """Values by name over one axis, whose `label` stands below, with a dashed line at a value."""
    low, high = min(mark.ends[0] for mark in marks.values()), max(mark.ends[1] for mark in marks.values())
    x = Scale(low, high, RIGHT, WIDTH - RIGHT)
    bottom = ARM_HEIGHT * len(marks) + 6
    parts = []
    for tick in ticks(x.low, x.high, 5):
        anchor = "start" if x(tick) < 14 else "end" if x(tick) > WIDTH - 14 else "middle"
        parts.append(tag("line", class_="grid", x1=x(tick), x2=x(tick), y1=0, y2=bottom))
        parts.append(tag("text", number(tick), x=x(tick), y=bottom + 13, text_anchor=anchor))
    if line_at is not None:
        dashed = {"stroke": "var(--accent)", "stroke_dasharray": "3 3"}
        parts.append(tag("line", x1=x(line_at), x2=x(line_at), y1=0, y2=bottom, **dashed))
    parts += [_mark(name, mark, x, ARM_HEIGHT * place) for place, (name, mark) in enumerate(marks.items())]
    parts.append(tag("text", label, x=WIDTH // 2, y=bottom + 27, text_anchor="middle"))
    return _chart(parts, bottom + 32, f"{label} of {len(marks)} arms with intervals")


def _mark(name: str, mark: Mark, x: Scale, top: int) -> Markup:
    (left, right), shown = mark.ends, name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "\u2026"
    halo = {"paint_order": "stroke", "stroke": "var(--page)", "stroke_width": 4}  # no line runs through a text
    stroke = {"stroke": f"var(--{mark.colour})", "stroke_width": 2}
    fill = f"var(--{mark.colour if mark.full else 'page'})"
    return tag(
        "g",
        tag("title", f"{name}: {mark.value:.4f} [{left:.4f}, {right:.4f}]"),
        tag("text", shown, x=RIGHT, y=top + 13, **halo),
        tag("text", f"{mark.value:.4f}", x=WIDTH - RIGHT, y=top + 13, text_anchor="end", **halo),
        tag("line", x1=x(left), x2=x(right), y1=top + 23, y2=top + 23, **stroke),
        tag("circle", cx=x(mark.value), cy=top + 23, r="3.5", **stroke, fill=fill),
    )


# ---- numbers ---------------------------------------------------------------------------------------------------------


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
