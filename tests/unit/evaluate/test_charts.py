from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cprec.evaluate.charts import HEIGHT, WIDTH, Value, line_chart, log_ticks, row_chart, thinned, ticks


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(f"<div>{svg}</div>")


def points_of(svg: str) -> list[list[tuple[float, float]]]:
    return [
        [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]
        for line in parsed(svg).iter("polyline")
    ]


def test_higher_values_are_drawn_higher_and_stay_inside() -> None:
    (points,) = points_of(line_chart({"a": [(0, 1.0), (5, 3.0), (10, 2.0)]}, x_label="step"))
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    heights = [HEIGHT - y for _, y in points]
    assert heights[0] < heights[2] < heights[1]
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in points)


def test_a_logarithmic_axis_has_equal_steps_for_equal_factors() -> None:
    (points,) = points_of(line_chart({"a": [(0, 10), (1, 100), (2, 1000)]}, x_label="step", log_y=True))
    first, second, third = (y for _, y in points)
    assert first - second == pytest.approx(second - third, abs=0.11)


def test_what_cannot_be_drawn_is_left_out() -> None:
    lines = {"a": [(0, math.nan), (1, 2.0), (2, math.inf), (3, 0.0), (4, 3.0)], "b": [(0, math.nan)]}
    (points,) = points_of(line_chart(lines, x_label="step", log_y=True))
    assert len(points) == 2
    assert line_chart({"b": [(0, math.nan)]}, x_label="step") == line_chart({}, x_label="step") == ""


@pytest.mark.parametrize("points", [[(3, 2.0)], [(3, 2.0), (3, 2.0)], [(0, 0.0), (9, 0.0)]])
@pytest.mark.parametrize("from_zero", [False, True])
def test_a_single_value_is_drawn(points: list[tuple[float, float]], from_zero: bool) -> None:
    assert points_of(line_chart({"a": points}, x_label="step", from_zero=from_zero))


def test_names_are_escaped_and_the_ninth_line_is_dashed() -> None:
    lines = {f"<{number}> & co": [(0, number), (1, number + 1)] for number in range(9)}
    svg = line_chart(lines, x_label="<step>")
    texts = "".join(parsed(svg).itertext())
    assert all(name in texts for name in lines) and "<step>" in texts
    drawn = list(parsed(svg).iter("polyline"))
    assert [line.attrib["stroke"] for line in drawn[:1]] == [drawn[8].attrib["stroke"]]
    assert "stroke-dasharray" in drawn[8].attrib and "stroke-dasharray" not in drawn[0].attrib


def test_bars_are_shares_of_the_largest() -> None:
    drawn = row_chart({"<a>": [Value(0.2, (0.1, 0.4))], "b": [Value(0.1), Value(0.4, colour="bar")], "c": []}, "{:.1f}")
    rectangles = list(parsed(drawn).iter("rect"))
    assert [each.attrib["width"] for each in rectangles] == ["50.00%", "25.00%", "100.00%"]
    assert re.findall(r'x1="([\d.]+)%"', drawn) == ["25.00", "25.00", "100.00"]
    assert "".join("".join(parsed(drawn).itertext()).split()) == "<a>0.2b0.10.4c-"
    assert 'width="0.00%"' in row_chart({"a": [Value(0, (0, 0))]}, "{:.0f}")
    assert 'width="20.00%"' in row_chart({"a": [Value(0.2)]}, "{:.0%}", high=1)


def test_attributes_are_escaped_and_coordinates_have_one_decimal() -> None:
    drawn = line_chart({'"<': [(0, 0.0), (3, 1.0)]}, x_label="step")
    assert 'aria-label="&#34;&lt;"' in drawn
    assert all(
        re.fullmatch(r"\d+\.\d,\d+\.\d", pair) for pair in re.findall(r"[^ \"]+,[^ \"]+", drawn.split("points=")[1])
    )


def test_bands_are_shaded_as_far_as_the_lines_go() -> None:
    lines = {"a": [(100, 1.0), (300, 2.0)]}
    bands = [("<warm-up>", 0, 150), ("annealing", 250, 999), ("before", 0, 100), ("after", 300, 400)]
    chart = parsed(line_chart(lines, x_label="tokens", bands=bands))
    first, second = chart.iter("rect")
    ((left, _), (right, _)) = points_of(line_chart(lines, x_label="tokens"))[0]
    width = right - left
    assert float(first.attrib["x"]) == left and float(first.attrib["width"]) == pytest.approx(width / 4, abs=0.1)
    assert float(second.attrib["x"]) == pytest.approx(left + 0.75 * width, abs=0.1)
    assert float(second.attrib["x"]) + float(second.attrib["width"]) == pytest.approx(right, abs=0.1)
    assert [title.text for title in chart.iter("title")] == ["<warm-up>", "annealing"]


finite = st.floats(-1e6, 1e6, allow_nan=False)


@given(low=finite, high=finite, most=st.integers(2, 8))
def test_ticks_are_few_and_inside(low: float, high: float, most: int) -> None:
    found = ticks(low, high, most)
    assert len(found) <= most + 1
    assert found == sorted(found)
    slack = 1e-6 * max(1.0, abs(low), abs(high))
    assert all(min(low, low) - slack <= tick <= max(low, high) + slack for tick in found)


@given(low=st.floats(0.01, 1e6), factor=st.floats(1, 1e6))
def test_log_ticks_span_the_values(low: float, factor: float) -> None:
    found = log_ticks(low, low * factor)
    assert found == sorted(set(found))
    assert found[0] <= low * 1.001 and found[-1] >= low * factor * 0.999


@given(values=st.lists(st.floats(0, 10), max_size=50), most=st.integers(1, 20))
def test_thinning_keeps_order_and_range(values: list[float], most: int) -> None:
    found = thinned(list(enumerate(values)), most)
    assert len(found) <= most or not values
    assert [x for x, _ in found] == sorted(x for x, _ in found)
    assert all(min(values) - 1e-9 <= y <= max(values) + 1e-9 for _, y in found)
