"""The page and the tables of training: the numbers of the log, in well-formed drawings, whatever the log lacks."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest

from cprec.evaluate.training_page import (
    GENERAL_TEXT,
    TrainingRun,
    final_numbers,
    forgetting_table,
    perplexity_table,
    phases_of,
    print_training,
    training_page,
)

RATES = [0.001, 0.002, 0.002, 0.002, 0.0011, 0.0002]


def records() -> list[dict[str, Any]]:
    """A log of six steps of 1,000 tokens, three of them measured."""
    lines: list[dict[str, Any]] = [
        {
            "step": 0,
            "tokens": 0,
            "heldout": {"books <specific>": 9000.0, "mixed": 8000.0, GENERAL_TEXT: 20.0},
            "mixture_asked": {"books <specific>": 0.4, "mixed": 0.6},
        }
    ]
    for step, rate in enumerate(RATES, start=1):
        lines.append(
            {
                **{"step": step, "tokens": 1000 * step, "loss": 7.0 - step, "learning_rate": rate, "grad_norm": 1.5},
                **{"tokens_per_second": 4000.0 + step, "mfu": 0.4 + step / 100, "consumed": "00ff"},
                "mixture": {"books <specific>": 0.5 - step / 100, "mixed": 0.5 + step / 100},
            }
        )
        if step % 3 == 0:
            perplexities = {"books <specific>": 60.0 - step, "mixed": 50.0 + step, GENERAL_TEXT: 20.0 + step}
            lines.append({"step": step, "tokens": 1000 * step, "heldout": perplexities})
    return lines


FINISHED = TrainingRun("pretrain", records(), {"seconds": 83.0, "num_parameters": 10_250_000, "stage": "pretrain"})
BARE = TrainingRun("finetune/books", [{"step": 4, "tokens": 400, "loss": 2.5}])


def svgs(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.S)]


def numbers_in(page: str) -> Iterator[float]:
    """Every coordinate that is drawn."""
    for svg in svgs(page):
        for element in svg.iter():
            for name in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "width", "height", "points"):
                yield from (float(value) for value in re.findall(r"[^\s,%]+", element.attrib.get(name, "")))


class Balance(HTMLParser):
    """Raises AssertionError where a tag is closed that is not the last one open; keeps the text of each cell."""

    EMPTY = frozenset({"meta", "br"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: Any) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open and data.strip():
            self.text.append(data)


def test_the_final_numbers_are_those_of_the_log() -> None:
    assert final_numbers(FINISHED) == {
        **{"state": "finished", "parameters": "10.25 M", "steps": "6", "tokens": "6,000", "loss": "1.000"},
        **{"tokens/s": "4,006", "MFU": "46.0%", "time": "1:23", "forgetting": "1.300x"},
    }
    assert [[str(cell) for cell in row.cells] for row in perplexity_table([FINISHED, BARE]).rows] == [
        ["pretrain", "books <specific>", "9,000.00", "54.00", "54.00"],
        ["pretrain", "mixed", "8,000.00", "56.00", "53.00"],
        ["pretrain", GENERAL_TEXT, "20.00", "26.00", "20.00"],
    ]


def test_forgetting_is_told_of_the_base_model_whatever_came_between() -> None:
    def run(name: str, stage: str, trained_on: list[str], *perplexities: float) -> TrainingRun:
        log = [{"step": n, "tokens": n, "heldout": {GENERAL_TEXT: each}} for n, each in enumerate(perplexities)]
        return TrainingRun(name, log, {"stage": stage, "trained_on": trained_on})

    runs = [
        run("pre-training", "pretrain", ["shards"], 20.0, 30.0, 25.0),
        run("toys: fine-tuning only", "finetune", ["toys"], 20.0, 44.0),
        run("toys: CPRec-style", "finetune", ["shards", "toys"], 25.0, 50.0),
        run("books: not measured", "finetune", ["shards", "books"], 25.0),
    ]
    assert [[str(cell) for cell in row.cells] for row in forgetting_table(runs).rows] == [
        ["pre-training", "20.00", "25.00", "-", "1.250x"],
        ["toys: fine-tuning only", "20.00", "-", "44.00", "2.200x"],
        ["toys: CPRec-style", "20.00", "25.00", "50.00", "2.500x"],
    ]
    assert [str(cell) for cell in forgetting_table(runs[1:2]).rows[0].cells[1:3]] == ["20.00", "-"]
    assert not forgetting_table([FINISHED, BARE][1:]).rows


def test_what_the_log_lacks_is_left_out() -> None:
    assert final_numbers(BARE) == {
        **{"state": "not finished", "parameters": "-", "steps": "4", "tokens": "400", "loss": "2.500"},
        **{"tokens/s": "-", "MFU": "-", "time": "-", "forgetting": "-"},
    }
    page = training_page("bare", [BARE])
    assert re.findall(r"<figcaption>(.*?)</figcaption>", page) == ["Training loss (nats per target token)"]
    assert "MFU" not in page and "Mixture" not in page and "Shaded" not in page
    assert "orgetting" not in page


def test_an_unfinished_run_tells_its_time_from_its_rate() -> None:
    run = TrainingRun("a", [{"step": 1, "tokens": 9_000, "tokens_per_second": 100.0}])
    assert final_numbers(run)["time"] == "1:30"


def test_the_page_has_every_curve_and_stands_alone() -> None:
    page = training_page("shop & co", [FINISHED, BARE])
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    assert [caption.partition(":")[0].partition(" (")[0] for caption in captions] == [
        *("Training loss", "Held-out perplexity", "Forgetting", "Learning rate", "Gradient norm", "Tokens per second"),
        *("MFU", "Mixture", "Training loss"),
    ]
    text = " ".join(Balance(page).text)
    assert "CPRec: training of shop & co" in text and "books <specific>" in text
    for number in ("10.25 M", "46.0%", "1:23", "1.300x", "8,000.00", "Shaded: warm-up, up to 2,000 tokens"):
        assert number in text, number
    assert "annealing, from 4,000." in text and "far above the rest, are not drawn" in text
    assert not re.search(r"(src|href|url|@import|<script)", page), "nothing from elsewhere, nothing that runs"
    assert len(svgs(page)) > len(captions)
    assert "prefers-color-scheme: dark" in page


def test_the_mixture_is_compared_with_the_one_asked_for() -> None:
    text = Balance(training_page("run", [FINISHED])).text
    place = text.index("Mixture of pretrain: shares of all tokens")
    assert text[place + 1 : place + 12] == [
        *("asked", "read", "points more"),
        *("books <specific>", "40.00%", "44.00%", "+4.00", "mixed", "60.00%", "56.00%", "-4.00"),
    ]
    unasked = TrainingRun("run", [record for record in records() if "mixture_asked" not in record])
    assert "points more" not in training_page("run", [unasked])


def test_forgetting_is_drawn_as_a_multiple_of_the_start() -> None:
    page = training_page("run", [FINISHED])
    drawing = page.partition("as a multiple of the start</figcaption>")[2].partition("</svg>")[0]
    ticks = re.findall(r'text-anchor="end">([\d.]+)</text>', drawing)
    assert ticks[0] == "1" and float(ticks[-1]) <= 1.3


def test_numbers_that_are_none_are_neither_drawn_nor_written() -> None:
    broken = records()
    for record, value in zip(broken[1:], (math.nan, math.inf, None, -math.inf, "x"), strict=False):
        for name in ("loss", "grad_norm", "mfu", "tokens_per_second"):
            if name in record:
                record[name] = value
    broken[-1]["heldout"] = {"mixed": math.nan, "books <specific>": 1e304, GENERAL_TEXT: math.inf}
    broken.append({"step": 6, "tokens": 6000, "heldout": None, "mixture": {}})
    page = training_page("broken", [TrainingRun("broken", broken)])
    assert all(math.isfinite(value) for value in numbers_in(page))
    assert not re.search(r"\b(nan|inf|NaN|None)\b", page)
    assert "1e+304" in page, "a perplexity beyond all bounds is still told, shortly"
    assert training_page("empty", [TrainingRun("empty", [{"step": 0, "tokens": 0}])])


@pytest.mark.parametrize(
    ("rates", "names"),
    [
        ([0.1, 0.2, 0.2, 0.2], ["warm-up", "stable"]),
        ([0.2, 0.2, 0.1], ["stable", "annealing"]),
        ([0.1, 0.2, 0.1, 0.05], ["warm-up", "annealing"]),  # a cosine
        ([0.2, 0.1], ["annealing"]),  # a branch
        ([0.2], []),
        ([], []),
        ([0.0, 0.0], []),
    ],
)
def test_phases_are_read_from_the_learning_rate(rates: list[float], names: list[str]) -> None:
    phases = phases_of([(10 * step, rate) for step, rate in enumerate(rates, start=1)])
    assert [name for name, _, _ in phases] == names
    for (_, _, end), (_, start, _) in zip(phases, phases[1:], strict=False):
        assert end == start


def test_the_terminal_has_two_tables() -> None:
    out = io.StringIO()
    print_training([FINISHED, BARE], out)
    lines = [line.split() for line in out.getvalue().splitlines() if line.strip()]
    assert ["pretrain", "finished", "10.25", "M", "6", "6,000", "1.000", "4,006", "46.0%", "1:23", "1.300x"] in lines
    assert ["finetune/books", "not", "finished", "-", "4", "400", "2.500", "-", "-", "-", "-"] in lines
    assert ["pretrain", "general", "text", "20.00", "26.00", "20.00"] in lines


def test_columns_that_nobody_fills_are_not_shown() -> None:
    out = io.StringIO()
    print_training([BARE], out)
    assert out.getvalue().split("\n")[0].split() == ["run", "state", "steps", "tokens", "loss"]
