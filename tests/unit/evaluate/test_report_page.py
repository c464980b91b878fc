"""What people read: the table of the terminal and the HTML file."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest

from cprec.evaluate.report_page import (
    UNCERTIFIED,
    answer_line,
    difference_line,
    latex_table,
    markdown_table,
    print_report,
    report_page,
)
from cprec.evaluate.results import (
    CANDIDATES_POPULARITY,
    CANDIDATES_UNIFORM,
    FULL,
    FULL_WITH_SEEN,
    Arm,
    CertificateSummary,
    Cost,
    Difference,
    DomainResult,
    Example,
    Interval,
    Kind,
    Metric,
    Pool,
    Report,
)
from cprec.evaluate.statistics import Comparison
from cprec.evaluate.training_page import TrainingRun

EXAMPLES = [
    Example(
        domain="kitchen",
        user="u<1>",
        history=[f"Mug [red]number {number}" for number in range(10)],
        target="Kettle <script>alert(1)</script>",
        recommendations={
            "CPRec-style": [("Kettle <script>alert(1)</script>", -1.5), ("Pan", -2.0)],
            "fine-tuning only": [("Tray", -1.0)],
        },
    )
]
PRETRAINING = [
    {"step": 0, "tokens": 0, "heldout": {"kitchen (specific)": 300.0, "mixed": 310.0}},
    {"step": 1, "tokens": 10, "loss": 5.0, "learning_rate": 0.001, "tokens_per_second": 9.0},
    {"step": 20, "tokens": 200, "loss": 4.0, "learning_rate": 0.0001, "tokens_per_second": 9.0},
    {"step": 20, "tokens": 200, "heldout": {"kitchen (specific)": 30.0, "mixed": 31.0}},
]


def runs_of(**logs: list[dict[str, Any]]) -> dict[str, TrainingRun]:
    return {name: TrainingRun(name, records) for name, records in logs.items()}


RUNS = {
    "pre-training": TrainingRun("pre-training", PRETRAINING, {"num_parameters": 2_900_000, "seconds": 10.0}),
    **runs_of(
        **{
            "kitchen: CPRec-style": [{"step": 1, "tokens": 9, "loss": 2.0, "learning_rate": 0.002}],
            "kitchen: fine-tuning only": [{"step": 1, "tokens": 9, "loss": 3.0, "learning_rate": 0.002}],
        }
    ),
}
MAIN = Metric("ndcg", 10, FULL)
MEASURED = [("recall", 1), ("recall", 5), ("recall", 10), ("ndcg", 5), ("ndcg", 10), ("mrr", None)]


def interval(mean: float) -> Interval:
    return Interval(mean, mean - 0.01, mean + 0.02)


def arm(name: str, kind: Kind, mean: float, **others: Any) -> Arm:
    metrics = {Metric(m, k, pool): interval(mean) for pool in (FULL, CANDIDATES_UNIFORM) for m, k in MEASURED}
    seconds = {FULL: 2.0, CANDIDATES_UNIFORM: 1.0}
    return Arm(name=name, kind=kind, metrics=metrics, seconds=seconds, cost=Cost(milliseconds_per_query=1.5), **others)


def changed(result: Arm, cells: Mapping[Metric, float], **others: Any) -> Arm:
    """The arm with other means."""
    return replace(result, metrics={**result.metrics, **{m: interval(mean) for m, mean in cells.items()}}, **others)


RANDOM, FINETUNED = arm("random", "baseline", 0.05), arm("fine-tuning only", "model", 0.1234)
CPREC, ORACLE = arm("CPRec-style", "model", 0.2345), arm("oracle", "bound", 0.5)


def difference(mean: float, low: float, high: float, num_queries: int = 1234, p: float = 0.001) -> Difference:
    test = Comparison(mean=mean, low=low, high=high, p_value=p, p_adjusted=p, num_queries=num_queries, detectable=None)
    return Difference(a="CPRec-style", b="fine-tuning only", metric=MAIN, test=test)


def domain(name: str, line: Difference, *arms: Arm, **others: Any) -> DomainResult:
    of_domain = {"num_items": 300, "num_queries": 1234, "certified": True, "main": MAIN, **others}
    pools = {CANDIDATES_UNIFORM: Pool(1234, 20)}
    shown = {arm.name: arm for arm in arms or (RANDOM, FINETUNED, CPREC, ORACLE)}
    return DomainResult(domain=name, pools=pools, arms=shown, differences=[line], **of_domain)


def report(*kitchen: Arm, certified: bool = True) -> Report:
    """Two domains, `kitchen` with these arms."""
    return Report(
        title="demo",
        protocol={"split": "method leave-one-out", "statistics": "95 % bootstrap intervals over queries"},
        certificate=CertificateSummary(clean=True, checked=5000, violations=0, uncertified=not certified),
        domains={
            "kitchen": domain("kitchen", difference(0.1111, 0.1, 0.12), *kitchen, unseen=False),
            "books": domain("books", difference(0.01, -0.1, 0.12), unseen=True, certified=certified),
        },
    )


def printed(of: Report, width: int = 100) -> str:
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
    shown = {"ndcg": 0.3111, "recall": 0.4222}
    cells = {Metric(name, 10, FULL): mean for name, mean in shown.items()}
    cells |= {Metric("ndcg", 5, FULL): 0.2333, Metric("mrr", None, FULL): 0.1444}
    cells[Metric("recall", 1, CANDIDATES_UNIFORM)] = 0.5555
    row = next(line for line in printed(report(changed(CPREC, cells))).splitlines() if "CPRec-style" in line)
    means = [word for word in row.split() if re.fullmatch(r"0\.\d{4}", word)]
    assert means == ["0.3111", "0.4222", "0.2333", "0.1444", "0.5555"]


A, B = "CPRec-style", "fine-tuning only"


@pytest.mark.parametrize(
    ("mean", "low", "high", "p", "expected"),
    [
        (0.0123, 0.01, 0.0145, 0.0, f"{A} beats {B} by 0.0123 NDCG@10 [0.0100, 0.0145]"),
        (-0.0123, -0.0145, -0.01, 0.0, f"{B} beats {A} by 0.0123 NDCG@10 [0.0100, 0.0145]"),
        (0.01, -0.1, 0.12, 0.0, f"{A} against {B}: no difference shown, +0.0100 NDCG@10 [-0.1000, +0.1200]"),
        (0.01, 0.0, 0.02, 0.0, f"{A} against {B}: no difference shown, +0.0100 NDCG@10 [+0.0000, +0.0200]"),
        (-0.01, -0.02, 0.0, 0.0, f"{A} against {B}: no difference shown, -0.0100 NDCG@10 [-0.0200, +0.0000]"),
        (0.01, 0.005, 0.02, 0.06, f"{A} against {B}: no difference shown, +0.0100 NDCG@10 [+0.0050, +0.0200]"),
    ],
)
def test_a_winner_is_claimed_only_if_the_interval_excludes_0_and_p_is_small(
    mean: float, low: float, high: float, p: float, expected: str
) -> None:
    assert difference_line(difference(mean, low, high, 1000, p)) == f"{expected} (1,000 queries, p {p:.4f})"


@pytest.mark.parametrize(("mean", "low", "high"), [(0.2, 0.1, 0.3), (-0.2, -0.3, -0.1), (0.0, -0.1, 0.1)])
def test_too_few_queries_support_no_claim(mean: float, low: float, high: float) -> None:
    line = difference_line(difference(mean, low, high, 999))
    assert "no claim under 1,000 queries" in line and "(999 queries, " in line
    assert "beats" not in line and "no difference" not in line


def test_titles_are_printed_as_they_are() -> None:
    text = printed(report())
    assert "Mug [red]number 9" in text and "Mug [red]number 1\n" not in text and "(2 earlier left out)" in text
    assert "1. Kettle <script>alert(1)</script> (-1.50)  <- came next" in text
    assert text.count("<- came next") == 1


def test_titles_cannot_steer_the_terminal() -> None:
    file = io.StringIO()
    print_report(report(), [replace(EXAMPLES[0], history=["Mug\x1b[2J\r\nPan"])], file, width=100)
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
    assert "UNCERTIFIED" in printed(report(certified=False))
    assert "UNCERTIFIED" not in printed(report())
    assert "clean (5,000 checks, 0 violations) and covers" in printed(report()).replace("\n", " ")


def test_the_bound_is_explained_where_there_is_one() -> None:
    whole = report(RANDOM, CPREC)
    without = replace(whole, domains={"kitchen": whole.domains["kitchen"]})
    assert "true chances" in printed(report()) and "true chances" not in printed(without)


# ---- Markdown --------------------------------------------------------------------------------------------------------


def test_the_markdown_table_is_as_given() -> None:
    a, b, c = "0.0500 [0.0400, 0.0700]", "**0.2345 [0.2245, 0.2545]**", "0.5000 [0.4900, 0.5200]"
    assert markdown_table(report(replace(RANDOM, name="a|b"), CPREC, ORACLE), "kitchen") == (
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
    cells = {Metric("ndcg", 10, FULL_WITH_SEEN): 0.01, Metric("recall", 10, FULL_WITH_SEEN): 0.02}
    cells[Metric("recall", 1, CANDIDATES_POPULARITY)] = 0.03
    cost = Cost(milliseconds_per_query=1.0, train_seconds=1234.5)
    given = report(changed(RANDOM, cells, lists={"coverage": 0.987}, cost=cost), FINETUNED, CPREC, ORACLE)
    kitchen = given.domains["kitchen"]
    pools = {**kitchen.pools, CANDIDATES_POPULARITY: Pool(1234, 20)}
    given = replace(given, domains={"kitchen": replace(kitchen, pools=pools)})
    head, _, first, second, *_ = markdown_table(given, "kitchen").splitlines()
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
    assert UNCERTIFIED in markdown_table(report(certified=False), "books")
    assert UNCERTIFIED not in markdown_table(report(certified=False), "kitchen")


def test_the_latex_table_of_an_uncertified_domain_says_so_in_print() -> None:
    def printed_lines(domain: str) -> list[str]:
        return [line for line in latex_table(report(certified=False), domain).splitlines() if not line.startswith("%")]

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
    html = report_page(report(), RUNS, EXAMPLES)
    page = Page(html)
    used = {name for _, attributes in page.tags for name in attributes}
    assert not used & {"src", "href"} and "url(" not in html and "@import" not in html and "http" not in html
    assert html.startswith("<!DOCTYPE html>")
    assert not any(tag in {"script", "link", "iframe"} for tag, _ in page.tags)
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    assert "prefers-color-scheme: dark" in html


def test_every_colour_that_is_used_is_defined_for_light_and_dark() -> None:
    html = report_page(report(), RUNS, EXAMPLES)
    light, dark = re.findall(r":root \{(.*?)\}", html, re.DOTALL)
    for name in set(re.findall(r"var\((--[a-z0-9-]+)\)", html)):
        assert f"{name}:" in light, name
        assert f"{name}:" in dark, name


def test_the_answer_comes_first_and_the_protocol_after_the_domains() -> None:
    text = Page(report_page(report(), RUNS, EXAMPLES)).text
    answer = "kitchen: CPRec-style has the highest NDCG@10, 0.2345; the best baseline is random"
    assert text.index(answer) < text.index("kitchen: seen in") < text.index("method leave-one-out")
    assert text.index("5,000 checks") < text.index("What users are recommended")


def test_the_answer_says_whether_a_model_beats_the_best_baseline() -> None:
    told = replace(difference(0.1, 0.05, 0.15), b="random")
    assert answer_line(domain("kitchen", told)).endswith(
        "; CPRec-style beats random by 0.1000 NDCG@10 [0.0500, 0.1500] (1,234 queries, p 0.0010)"
    )
    assert answer_line(domain("kitchen", told, FINETUNED, arm("EASE", "baseline", 0.2))) == (
        "EASE has the highest NDCG@10, 0.2000"
    )


def test_the_answer_takes_the_seeds_of_a_model_together() -> None:
    told = replace(difference(0.1, 0.05, 0.15), a="x (2 seeds)", b="EASE")
    seeds = [arm(f"x (seed {seed})", "model", value) for seed, value in ((0, 0.19), (1, 0.23))]
    line = answer_line(domain("kitchen", told, *seeds, arm("EASE", "baseline", 0.2)))
    assert line.startswith("x (2 seeds) has the highest NDCG@10, 0.2100; x (2 seeds) beats EASE by 0.1000")


def test_the_page_has_metrics_differences_curves_and_examples() -> None:
    page = Page(report_page(report(), RUNS, EXAMPLES))
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
    assert sum(tag == "polyline" for tag, _ in page.tags) == 2 + 2 + 5


def test_a_start_far_above_the_rest_is_told_but_not_drawn() -> None:
    def records(*perplexities: float) -> list[dict[str, Any]]:
        return [{"step": n, "tokens": 1000 * n, "heldout": {"mixed": value}} for n, value in enumerate(perplexities)]

    far = Page(report_page(report(), runs_of(run=records(8000.0, 30.0, 20.0, 25.0)), []))
    near = Page(report_page(report(), runs_of(run=records(80.0, 30.0, 20.0, 25.0)), []))
    for page, points in ((far, 3), (near, 4)):
        (line,) = (attributes["points"] for tag, attributes in page.tags if tag == "polyline")
        assert line is not None and len(line.split()) == points
        assert "mixed" in page.text and "tokens" in page.text
    assert "are not drawn" in far.text and "are not drawn" not in near.text
    assert "8,000.0025.0020.00" in far.text  # start, end, lowest


def test_the_table_of_perplexities_has_single_values_where_the_curve_has_means() -> None:
    values = [40.0, *[30.0, 20.0] * 300, 10.0, 25.0]
    log = [{"step": n, "tokens": n, "heldout": {"mixed": value}} for n, value in enumerate(values)]
    assert "40.0025.0010.00" in Page(report_page(report(), runs_of(run=log), [])).text


def test_nothing_is_folded_away_from_paper() -> None:
    page = Page(report_page(report(), RUNS, EXAMPLES))
    assert all("open" in attributes for tag, attributes in page.tags if tag == "details")


def test_the_file_is_small() -> None:
    heldout = {f"domain {n} (specific)": 20.0 + n for n in range(9)}
    long = [{"step": n, "tokens": n, "loss": 2.0, "learning_rate": 0.1, "heldout": heldout} for n in range(2000)]
    page = report_page(report(), runs_of(**{f"run {n}": long for n in range(5)}), EXAMPLES * 9)
    assert len(page.encode()) < 1_000_000


def test_every_section_without_a_certificate_says_so() -> None:
    assert (
        Page(report_page(report(certified=False), RUNS, EXAMPLES)).text.count(UNCERTIFIED) == 3
    )  # the banner, its row, books
    assert UNCERTIFIED not in report_page(report(), RUNS, EXAMPLES)


def test_without_runs_models_and_examples_the_page_is_shorter() -> None:
    text = Page(report_page(report(), {"a model that is gone": TrainingRun("gone", [])}, [])).text
    assert "0.2345" in text and "Training" not in text and "users" not in text and "trained" not in text
