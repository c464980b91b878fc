"""What people read: the table of the terminal and the HTML file."""

from __future__ import annotations

import io
import re
from copy import deepcopy
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cprec.evaluate.report import UNCERTIFIED, html_of, print_report, write_html

EXAMPLES: list[dict[str, Any]] = [
    {
        "domain": "kitchen",
        "user": "u<1>",
        "history": [f"Mug [red]number {number}" for number in range(10)],
        "target": "Kettle <script>alert(1)</script>",
        "recommendations": {
            "CPRec-style": [("Kettle <script>alert(1)</script>", -1.5), ("Pan", -2.0)],
            "fine-tuning only": [("Tray", -1.0)],
        },
    }
]
RUNS = {
    "pre-training": [
        {"step": 0, "tokens": 0, "heldout": {"kitchen (specific)": 300.0, "mixed": 310.0}},
        {"step": 1, "tokens": 10, "loss": 5.0, "learning_rate": 0.001, "tokens_per_second": 9.0},
        {"step": 20, "tokens": 200, "loss": 4.0, "learning_rate": 0.0001, "tokens_per_second": 9.0},
        {"step": 20, "tokens": 200, "heldout": {"kitchen (specific)": 30.0, "mixed": 31.0}},
    ],
    "kitchen: CPRec-style": [{"step": 1, "tokens": 9, "loss": 2.0, "learning_rate": 0.002}],
    "kitchen: fine-tuning only": [{"step": 1, "tokens": 9, "loss": 3.0, "learning_rate": 0.002}],
}


def interval(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - 0.01, "high": mean + 0.02}


def arm(kind: str, mean: float) -> dict[str, Any]:
    metrics = {name: interval(mean) for name in ("recall@1", "recall@5", "recall@10", "ndcg@5", "ndcg@10", "mrr")}
    return {"kind": kind, "num_queries": 1234, **metrics, "seconds": 2.0, "candidates20": {**metrics, "seconds": 1.0}}


def report() -> dict[str, Any]:
    arms = {
        "random": arm("baseline", 0.05),
        "fine-tuning only": arm("model", 0.1234),
        "CPRec-style": arm("model", 0.2345),
        "oracle": arm("bound", 0.5),
    }
    difference = {"a": "CPRec-style", "b": "fine-tuning only", "metric": "ndcg@10", "num_queries": 1234}
    domain = {"num_items": 300, "num_queries": 1234, "certified": True, "arms": arms}
    return {
        "title": "demo",
        "protocol": {"split": "method leave-one-out", "statistics": "95 % bootstrap intervals over queries"},
        "certificate": {"clean": True, "checked": 5000, "violations": 0, "uncertified": False},
        "domains": {
            "kitchen": {
                "unseen": False,
                **domain,
                "differences": [{**difference, "mean": 0.1111, "low": 0.1, "high": 0.12}],
            },
            "books": {
                "unseen": True,
                **domain,
                "differences": [{**difference, "mean": 0.01, "low": -0.1, "high": 0.12}],
            },
        },
        "models": {"pre-training": {"num_parameters": 2_900_000, "tokens": 3000, "seconds": 10.0}},
    }


def uncertified() -> dict[str, Any]:
    changed = deepcopy(report())
    changed["certificate"]["uncertified"] = True
    changed["domains"]["books"]["certified"] = False
    return changed


def printed(of: dict[str, Any], width: int = 100) -> str:
    file = io.StringIO()
    print_report(of, EXAMPLES, console=Console(file=file, width=width))
    return file.getvalue()


# ---- terminal --------------------------------------------------------------------------------------------------------


def test_the_table_names_metrics_with_cut_and_pool_and_gives_intervals() -> None:
    text = printed(report())
    for words in ("NDCG@10", "Recall@10", "full catalogue", "Recall@1", "20 candidates", "95 %"):
        assert words in text
    assert "0.2345 (0.224-0.255)" in text
    assert text.count("CPRec-style") >= 4 and "kitchen (seen)" in text and "books (unseen)" in text
    assert "kitchen: seen in pre-training, 300 items, 1,234 queries" in text


def test_a_winner_is_claimed_only_if_the_interval_excludes_0() -> None:
    text = printed(report())
    assert "kitchen: CPRec-style beats fine-tuning only: +0.1111 NDCG@10 (+0.1000 to +0.1200)" in text
    assert "books: CPRec-style and fine-tuning only cannot be told apart: +0.0100" in text


def test_titles_are_printed_as_they_are() -> None:
    text = printed(report())
    assert "Mug [red]number 9" in text and "Mug [red]number 1;" not in text and "(2 earlier)" in text
    assert "1. Kettle <script>alert(1)</script> (-1.50)  <- came next" in text


@pytest.mark.parametrize("width", [60, 80, 87, 120])
def test_the_table_keeps_to_the_width_of_the_terminal(width: int) -> None:
    lines = printed(report(), width).splitlines()
    assert all(len(line) <= width for line in lines)
    if width >= 80:
        assert sum("0.2345 (0.224-0.255) " in line for line in lines) == 2  # a row for each domain, none broken in two


def test_an_uncertified_table_says_so() -> None:
    assert "UNCERTIFIED" in printed(uncertified())
    assert "UNCERTIFIED" not in printed(report())
    assert "clean (5,000 checks, 0 violations) and covers" in printed(report()).replace("\n", " ")


def test_the_bound_is_explained_where_there_is_one() -> None:
    without = report()
    for domain in without["domains"].values():
        domain["arms"] = {name: cells for name, cells in domain["arms"].items() if name != "oracle"}
    assert "true chances" in printed(report()) and "true chances" not in printed(without)


# ---- HTML ------------------------------------------------------------------------------------------------------------

VOID = {"meta", "br", "link", "img", "hr"}


class Page(HTMLParser):
    """Checks that tags close in order, and collects attributes and text outside style."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def test_the_page_is_well_formed_and_needs_nothing_else() -> None:
    html = html_of(report(), RUNS, EXAMPLES)
    page = Page(html)
    used = {name for _, attributes in page.tags for name in attributes}
    assert not used & {"src", "href"} and "url(" not in html and "@import" not in html and "http" not in html
    assert not any(tag in {"script", "link", "iframe"} for tag, _ in page.tags)
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    assert "prefers-color-scheme: dark" in html


def test_every_colour_that_is_used_is_defined_for_light_and_dark() -> None:
    html = html_of(report(), RUNS, EXAMPLES)
    light, dark = re.findall(r":root \{(.*?)\}", html, re.DOTALL)
    for name in set(re.findall(r"var\((--[a-z0-9-]+)\)", html)):
        assert f"{name}:" in light, name
        assert f"{name}:" in dark, name


def test_the_protocol_comes_before_any_number() -> None:
    text = Page(html_of(report(), RUNS, EXAMPLES)).text
    assert text.index("method leave-one-out") < text.index("0.2345")
    assert text.index("5,000 checks") < text.index("0.2345")


def test_the_page_has_metrics_differences_curves_and_examples() -> None:
    page = Page(html_of(report(), RUNS, EXAMPLES))
    for words in (
        "NDCG@10, full catalogue",
        "Recall@1, 20 candidates",
        "CPRec-style beats fine-tuning only",
        "Learning rate",
        "Training loss",
        "Held-out perplexity",
        "mixed",
        "Kettle <script>alert(1)</script>",
        "2.90 M",
    ):
        assert words in page.text
    assert page.text.count("Training: ") == 2  # pre-training; both arms of kitchen in one group
    assert sum(tag == "polyline" for tag, _ in page.tags) == 2 + 2 + 4


def test_every_section_without_a_certificate_says_so() -> None:
    assert Page(html_of(uncertified(), RUNS, EXAMPLES)).text.count(UNCERTIFIED) == 3  # the banner, its row, books
    assert UNCERTIFIED not in html_of(report(), RUNS, EXAMPLES)


def test_without_runs_models_and_examples_the_page_is_shorter() -> None:
    bare = {name: value for name, value in report().items() if name != "models"}
    text = Page(html_of(bare, {}, [])).text
    assert "0.2345" in text and "Training" not in text and "users" not in text and "trained" not in text


def test_the_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_html(path, report(), RUNS, EXAMPLES)
    write_html(path, report(), RUNS, EXAMPLES)
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
