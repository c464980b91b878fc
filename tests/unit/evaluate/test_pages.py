"""Every page escapes what it is given and stands alone; its templates are found where the package is installed."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from importlib.resources import files

import pytest

from cprec.evaluate.comparison import ComparedArm, ComparisonTable, Estimate, comparison_page, print_tables
from cprec.evaluate.comparison import latex_table as comparison_latex
from cprec.evaluate.comparison import markdown_table as comparison_markdown
from cprec.evaluate.grid import Cell, Column, Grid
from cprec.evaluate.pages import Section, render
from cprec.evaluate.report_page import latex_table, markdown_table, print_report, report_page
from cprec.evaluate.results import (
    FULL,
    Arm,
    CertificateSummary,
    Cost,
    DomainResult,
    Example,
    Generated,
    Interval,
    Metric,
    Pool,
    Report,
    Slice,
)
from cprec.evaluate.shortcut_audit import (
    BACKWARD,
    FROM_ANY,
    ONE_STEP,
    SHUFFLED,
    TITLES,
    TWO_STEPS,
    USERS,
    Dependence,
    OutDegree,
    Reach,
    ShortcutAudit,
    Similarity,
    Targets,
)
from cprec.evaluate.shortcut_page import print_shortcuts, shortcut_page
from cprec.evaluate.training_page import TrainingRun, fork_page, print_forks, print_training, training_page

EVIL = "<script>alert('x')</script> & \"q\" {{ 7 * 6 }} </style> a|b*c $x_1^2$ \\input{y}% \x1b[2J\r[red]"
"""Means something to HTML, Jinja, CSS, Markdown, LaTeX, a terminal and rich."""
CELL = Interval(0.3, 0.2, 0.4)


def evaluation() -> tuple[Report, dict[str, TrainingRun], list[Example]]:
    main = Metric("ndcg", 10, FULL)
    metrics = {
        main: CELL,
        Metric("recall", 10, FULL): CELL,
        Metric("ndcg", 5, FULL): CELL,
        Metric("mrr", None, FULL): CELL,
    }
    arm = Arm(
        name=EVIL,
        kind="model",
        metrics=metrics,
        seconds={FULL: 1.0},
        cost=Cost(milliseconds_per_query=1.0),
        slices={"history": {EVIL: Slice(num_queries=3, metrics={main: CELL})}},
        generated=Generated(valid_ratio=0.5, hit_rate_all=0.1, hit_rate_valid=0.2, seconds=1.0),
    )
    result = DomainResult(
        domain=EVIL,
        num_items=3,
        num_queries=3,
        certified=False,
        main=main,
        pools={FULL: Pool(3, 3)},
        arms={EVIL: arm},
        notes=[EVIL],
    )
    certificate = CertificateSummary(clean=True, checked=1, violations=0, uncertified=False)
    report = Report(title=EVIL, protocol={EVIL: EVIL}, certificate=certificate, domains={EVIL: result})
    example = Example(domain=EVIL, user=EVIL, history=[EVIL], target=EVIL, recommendations={EVIL: [(EVIL, 1.0)]})
    return report, {EVIL: training()}, [example]


def training() -> TrainingRun:
    record = {"step": 1, "tokens": 9, "loss": 1.0, "heldout": {EVIL: 2.0}, "mixture": {EVIL: 1.0}}
    return TrainingRun(EVIL, [record, {**record, "tokens": 18, "step": 2}])


def comparison() -> ComparisonTable:
    arms = tuple(
        ComparedArm(
            name=EVIL + name,
            num_seeds=1,
            bound=False,
            estimates={"ndcg@10": Estimate(mean=0.3, low=0.2, high=0.4)},
            against_best=None,
        )
        for name in "ab"
    )
    return ComparisonTable(
        domain=EVIL,
        runs=(EVIL,),
        protocol=EVIL,
        settings={EVIL: EVIL},
        num_queries=3,
        arms=arms,
        comparisons={},
    )


def audit() -> ShortcutAudit:
    share = Interval(0.5, 0.4, 0.6)
    return ShortcutAudit(
        domain=EVIL,
        num_items=3,
        num_train_events=9,
        num_queries=3,
        sample=3,
        seed=0,
        tie_order="source",
        median_history=2.0,
        longer={1: 1.0},
        targets=Targets(cold=0.0, repeated=0.0, repeat_last=0.0, popular_10=0.0, popular_percent=0.0, tied=None),
        immediate_repeats=0.0,
        out_degree=OutDegree(none=0.0, quartiles=(1.0, 1.0, 1.0), effective=1.0, histogram={EVIL: 1.0}),
        reach=dict.fromkeys(
            (ONE_STEP, TWO_STEPS, BACKWARD, FROM_ANY, EVIL), Reach(targets=0.1, catalogue=0.1, popular=0.1)
        ),
        similarity=dict.fromkeys(
            (USERS, TITLES, EVIL), Similarity(mean=50.0, nearest=0.1, unrelated=0.1, histogram=(0.5, 0.5))
        ),
        dependence=(
            Dependence(
                model=EVIL, ndcg=share, shares={"last 1": share, SHUFFLED: share, EVIL: share}, smallest_difference=0.1
            ),
        ),
    )


FORKS = {
    "run": EVIL,
    "start": EVIL,
    "domain": EVIL,
    "rows": {
        EVIL: {"tokens": 1, "total_tokens": 1, "seconds": 1.0, "heldout": {EVIL: 2.0}, "next_item_perplexity": 3.0}
    },
}


LOG = [{"tokens": 1, "loss": 1.0, "heldout": {EVIL: 2.0}}]
PAGES: dict[str, Callable[[], str]] = {
    "report": lambda: report_page(*evaluation()),
    "training": lambda: training_page(EVIL, [training()]),
    "comparison": lambda: comparison_page([comparison()]),
    "shortcuts": lambda: shortcut_page(EVIL, [audit()], {EVIL: EVIL}),
    "forks": lambda: fork_page(FORKS, {EVIL: LOG}, LOG),
}


class Parsed(HTMLParser):
    """Raises AssertionError where a tag is closed that is not the last one open."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.used: set[str] = set()
        self.text = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.used |= {tag, *(name for name, _ in attributes)}
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("name", PAGES)
def test_no_text_becomes_a_part_of_a_page(name: str) -> None:
    page = PAGES[name]()
    parsed = Parsed(page)
    assert "<script>alert('x')</script>" in parsed.text and "{{ 7 * 6 }}" in parsed.text, "told as it is"
    assert not parsed.used & {"script", "link", "img", "iframe", "src", "href", "onclick"}
    assert not re.search(r"https?://|url\(|@import", page)
    assert page.startswith("<!DOCTYPE html>") and page.count("</style>") == 1


def test_no_text_steers_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    report, runs, examples = evaluation()
    print_report(report, examples)
    print_training(list(runs.values()))
    print_tables([comparison()])
    print_shortcuts([audit()])
    print_forks(FORKS)
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "\r" not in printed
    assert printed.count("[red]") >= 5, "no markup of rich"


@pytest.mark.parametrize(
    "table", [latex_table(evaluation()[0], EVIL), comparison_latex(comparison())], ids=["report", "comparison"]
)
def test_no_text_is_a_command_of_latex(table: str) -> None:
    lines = [line for line in table.splitlines() if not line.startswith("% ")]
    printed = "\n".join(lines)
    assert "\\input" not in printed and r"\textbackslash{}input\{y\}\%" in printed
    assert not re.search(r"(?<!\\)[_%#]", printed)
    assert not re.search(r"(?<!\n)\r(?!\n)", table), "no line break that ends a comment"


@pytest.mark.parametrize(
    "table", [markdown_table(evaluation()[0], EVIL), comparison_markdown(comparison())], ids=["report", "comparison"]
)
def test_no_text_breaks_a_markdown_table(table: str) -> None:
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1
    assert r"a\|b\*c" in rows[2]


def test_an_empty_table_is_not_shown() -> None:
    grid = Grid((Column("head", note="small"),), ())
    assert "<table" not in render("title", [Section(tables=[grid])])
    filled = Grid.of(["", Column("head", note="small")], [["row", Cell("1", "of 2")]])
    assert "<th>head<small>small</small></th>" in render("title", [Section(tables=[filled])])


def test_templates_are_part_of_the_package() -> None:
    names = {path.name for path in files("cprec.evaluate").joinpath("templates").iterdir()}
    assert names == {"page.html", "charts.html", "style.css"}


def test_a_section_says_only_what_it_has() -> None:
    page = render("title", [Section(title="part")])
    assert not re.search(r"<(p|ul|dl|figure|table|details)\b", page)


def test_nothing_that_a_template_lacks_is_printed_as_empty() -> None:
    from jinja2 import UndefinedError

    from cprec.evaluate.pages import TEMPLATES

    with pytest.raises(UndefinedError):
        TEMPLATES.from_string("{{ nothing }}").render()
