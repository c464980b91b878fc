"""What people read: the table of the terminal and the HTML file."""

from __future__ import annotations

import contextlib
import io
import re
from copy import deepcopy
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from cprec.evaluate.report import (
    UNCERTIFIED,
    difference_line,
    html_of,
    latex_table,
    markdown_table,
    print_report,
    write_html,
)

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
    print_report(of, EXAMPLES, file, width=width)
    return file.getvalue()


# ---- terminal --------------------------------------------------------------------------------------------------------


def test_the_table_names_metrics_with_cut_and_pool_and_gives_intervals() -> None:
    text = printed(report())
    for words in ("NDCG@10", "Recall@10", "NDCG@5", "MRR", "full", "catalogue", "Recall@1", "candidates", "95 %"):
        assert words in text
    assert "0.2345 [0.224, 0.255]" in text
    assert text.count("CPRec-style") >= 4 and "kitchen (seen)" in text and "books (unseen)" in text
    assert "kitchen: seen in pre-training, 300 items, 1,234 queries" in text


def test_every_number_stands_in_its_own_column() -> None:
    changed = report()
    arm_of = changed["domains"]["kitchen"]["arms"]["CPRec-style"]
    shown = {"ndcg@10": 0.3111, "recall@10": 0.4222, "ndcg@5": 0.2333, "mrr": 0.1444}
    arm_of.update({name: interval(mean) for name, mean in shown.items()})
    arm_of["candidates20"]["recall@1"] = interval(0.5555)
    row = next(line for line in printed(changed).splitlines() if "CPRec-style" in line)
    means = [word for word in row.split() if re.fullmatch(r"0\.\d{4}", word)]
    assert means == ["0.3111", "0.4222", "0.2333", "0.1444", "0.5555"]


DIFFERENCE = {"a": "new", "b": "old", "metric": "ndcg@10", "num_queries": 1000}


@pytest.mark.parametrize(
    ("mean", "low", "high", "expected"),
    [
        (0.0123, 0.01, 0.0145, "new beats old by 0.0123 NDCG@10 [0.0100, 0.0145] (1,000 queries)"),
        (-0.0123, -0.0145, -0.01, "old beats new by 0.0123 NDCG@10 [0.0100, 0.0145] (1,000 queries)"),
        (0.01, -0.1, 0.12, "new against old: no difference shown, +0.0100 NDCG@10 [-0.1000, +0.1200] (1,000 queries)"),
        (0.01, 0.0, 0.02, "new against old: no difference shown, +0.0100 NDCG@10 [+0.0000, +0.0200] (1,000 queries)"),
        (-0.01, -0.02, 0.0, "new against old: no difference shown, -0.0100 NDCG@10 [-0.0200, +0.0000] (1,000 queries)"),
    ],
)
def test_a_winner_is_claimed_only_if_the_interval_excludes_0(
    mean: float, low: float, high: float, expected: str
) -> None:
    assert difference_line({**DIFFERENCE, "mean": mean, "low": low, "high": high}) == expected


@pytest.mark.parametrize(("mean", "low", "high"), [(0.2, 0.1, 0.3), (-0.2, -0.3, -0.1), (0.0, -0.1, 0.1)])
def test_too_few_queries_support_no_claim(mean: float, low: float, high: float) -> None:
    line = difference_line({**DIFFERENCE, "mean": mean, "low": low, "high": high, "num_queries": 999})
    assert "no claim under 1,000 queries" in line and "(999 queries)" in line
    assert "beats" not in line and "no difference" not in line


def test_titles_are_printed_as_they_are() -> None:
    text = printed(report())
    assert "Mug [red]number 9" in text and "Mug [red]number 1\n" not in text and "(2 earlier left out)" in text
    assert "1. Kettle <script>alert(1)</script> (-1.50)  <- came next" in text
    assert text.count("<- came next") == 1


def test_titles_cannot_steer_the_terminal() -> None:
    file = io.StringIO()
    print_report(report(), [{**EXAMPLES[0], "history": ["Mug\x1b[2J\r\nPan"]}], file, width=100)
    assert "\x1b" not in file.getvalue() and "\r" not in file.getvalue()
    assert "Mug [2J  Pan" in file.getvalue()


@pytest.mark.parametrize("width", [40, 60, 80, 87, 100, 120, 160])
def test_the_table_keeps_to_the_width_of_the_terminal(width: int) -> None:
    lines = printed(report(), width).splitlines()
    assert all(len(line) <= width for line in lines)
    rows = [line for line in lines if line.startswith("  CPRec-style  ")]
    assert len(rows) == 2  # one for each domain, none broken in two
    intervals = {40: 1, 60: 1, 80: 2, 87: 2, 100: 2, 120: 3, 160: 3}
    assert all(row.count("0.2345 [0.224, 0.255]") == intervals[width] for row in rows)


def test_elsewhere_than_on_a_terminal_there_are_100_columns_and_no_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    file, standard = io.StringIO(), io.StringIO()
    print_report(report(), EXAMPLES, file)
    with contextlib.redirect_stdout(standard):
        print_report(report(), EXAMPLES)
    assert file.getvalue() == standard.getvalue() == printed(report(), 100)
    assert "\x1b" not in file.getvalue()
    assert not set("│┃║|") & set(file.getvalue())


def test_an_uncertified_table_says_so() -> None:
    assert "UNCERTIFIED" in printed(uncertified())
    assert "UNCERTIFIED" not in printed(report())
    assert "clean (5,000 checks, 0 violations) and covers" in printed(report()).replace("\n", " ")


def test_the_bound_is_explained_where_there_is_one() -> None:
    without = report()
    for domain in without["domains"].values():
        domain["arms"] = {name: cells for name, cells in domain["arms"].items() if name != "oracle"}
    assert "true chances" in printed(report()) and "true chances" not in printed(without)


# ---- Markdown --------------------------------------------------------------------------------------------------------


def test_the_markdown_table_is_as_given() -> None:
    changed = report()
    arms = changed["domains"]["kitchen"]["arms"]
    changed["domains"]["kitchen"]["arms"] = {"a|b": arms["random"], "CPRec-style": arms["CPRec-style"]}
    changed["domains"]["kitchen"]["arms"]["oracle"] = arms["oracle"]
    a, b, c = "0.0500 [0.0400, 0.0700]", "**0.2345 [0.2245, 0.2545]**", "0.5000 [0.4900, 0.5200]"
    assert markdown_table(changed, "kitchen") == (
        "| | NDCG@10 | Recall@10 | Recall@1 of 20, uniform |\n"
        "| --- | ---: | ---: | ---: |\n"
        f"| a\\|b | {a} | {a} | 0.050 |\n"
        f"| **CPRec-style** | {b} | {b} | **0.234** |\n"
        f"| oracle | {c} | {c} | 0.500 |\n"
        "\n"
        "kitchen: seen in pre-training, 300 items, 1,234 queries; full catalogue unless another pool is named, "
        "95 % intervals in brackets.\n"
    )


def test_the_markdown_table_has_what_arms_have() -> None:
    changed = report()
    arms = changed["domains"]["kitchen"]["arms"]
    arms["random"] |= {
        "seen_kept": {"ndcg@10": interval(0.01), "recall@10": interval(0.02)},
        "candidates20_popularity": {"recall@1": interval(0.03)},
        "lists": {"coverage": 0.987},
        "cost": {"train_seconds": 1234.5},
    }
    head, _, first, second, *_ = markdown_table(changed, "kitchen").splitlines()
    assert head.split(" | ")[-6:] == [
        "NDCG@10, seen kept",
        "Recall@10, seen kept",
        "Recall@1 of 20, uniform",
        "of 20, popular",
        "coverage",
        "seconds of training |",
    ]
    assert first.endswith("| 0.0100 | 0.0200 | 0.050 | 0.030 | 0.99 | 1,234 |")
    assert second.endswith("| | | 0.123 | | | |")


def test_the_markdown_table_of_an_uncertified_domain_says_so() -> None:
    assert UNCERTIFIED in markdown_table(uncertified(), "books")
    assert UNCERTIFIED not in markdown_table(uncertified(), "kitchen")


def test_the_latex_table_of_an_uncertified_domain_says_so_in_print() -> None:
    def printed_lines(domain: str) -> list[str]:
        return [line for line in latex_table(uncertified(), domain).splitlines() if not line.startswith("%")]

    assert any(UNCERTIFIED in line for line in printed_lines("books"))
    assert not any(UNCERTIFIED in line for line in printed_lines("kitchen"))
    assert r"\textbf{CPRec-style} & 0.2345 {\scriptsize [0.2245, 0.2545]}" in "\n".join(printed_lines("kitchen"))


def test_a_domain_that_is_not_in_the_report_is_named() -> None:
    with pytest.raises(ValueError, match="'toys' is not in this report: it has kitchen, books"):
        markdown_table(report(), "toys")


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
        "0.2245 to 0.2545",
    ):
        assert words in page.text
    assert page.text.count("Training: ") == 2  # pre-training; both arms of kitchen in one group
    assert sum(tag == "polyline" for tag, _ in page.tags) == 2 + 2 + 4


def test_a_start_far_above_the_rest_is_told_but_not_drawn() -> None:
    def records(*perplexities: float) -> list[dict[str, Any]]:
        return [{"step": n, "tokens": 1000 * n, "heldout": {"mixed": value}} for n, value in enumerate(perplexities)]

    far = Page(html_of(report(), {"pre-training": records(8000.0, 30.0, 20.0, 25.0)}, []))
    near = Page(html_of(report(), {"pre-training": records(80.0, 30.0, 20.0, 25.0)}, []))
    for page, points in ((far, 3), (near, 4)):
        (line,) = (attributes["points"] for tag, attributes in page.tags if tag == "polyline")
        assert line is not None and len(line.split()) == points
        assert "mixed" in page.text and "tokens" in page.text
    assert "is not drawn" in far.text and "is not drawn" not in near.text
    assert "8,000.0025.0020.00" in far.text  # start, end, lowest


def test_the_table_of_perplexities_has_single_values_where_the_curve_has_means() -> None:
    values = [40.0, *[30.0, 20.0] * 300, 10.0, 25.0]
    log = [{"step": n, "tokens": n, "heldout": {"mixed": value}} for n, value in enumerate(values)]
    assert "40.0025.0010.00" in Page(html_of(report(), {"pre-training": log}, [])).text


def test_nothing_is_folded_away_from_paper() -> None:
    page = Page(html_of(report(), RUNS, EXAMPLES))
    assert all("open" in attributes for tag, attributes in page.tags if tag == "details")


def test_the_file_is_small(tmp_path: Path) -> None:
    heldout = {f"domain {n} (specific)": 20.0 + n for n in range(9)}
    long = [{"step": n, "tokens": n, "loss": 2.0, "learning_rate": 0.1, "heldout": heldout} for n in range(5000)]
    write_html(tmp_path / "report.html", report(), {f"run {n}": long for n in range(5)}, EXAMPLES * 9)
    assert (tmp_path / "report.html").stat().st_size < 1_000_000


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
