"""Evaluation folders side by side: what is refused, what the tables say, in the terminal and for papers."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cprec.errors import ConfigError, DataError
from cprec.evaluate.compare import compare, protocol_differences
from cprec.evaluate.comparison import (
    ComparisonTable,
    comparison_page,
    latex_table,
    markdown_table,
    notes,
    plot,
    print_tables,
    title_of,
)
from cprec.ranks import ndcg, recall, reciprocal_rank

SETTINGS = {
    "domain": "Books",
    "data_sha256": "0" * 64,
    "split": "name leave-one-out",
    "tie_order": "source",
    "part": "test",
    "num_queries": 1200,
    "queries_sha256": "1" * 64,
    "num_candidates": 20,
    "seen": "left out",
    "catalogue_sha256": "2" * 64,
    "num_items": 12345,
    "k": 10,
    "certificate": "clean",
}


def write(folder: Path, ranks: Mapping[str, np.ndarray], *, users: int = 0, **settings: Any) -> Path:
    """An evaluation of a domain: the target's place of each query by arm; 10 and beyond are misses at K = 10."""
    settings = {**SETTINGS, **settings}
    inside = folder / settings["domain"]
    inside.mkdir(parents=True)
    (inside / "protocol.json").write_text(json.dumps(settings))
    tables = []
    for arm, better in ranks.items():
        size, tied, k = len(better), np.ones_like(better), settings["k"]
        for protocol, less in (("full", 0), ("full_with_seen", 1)):
            places = np.maximum(better, less)
            columns = {
                "query_id": [f"q{number:05}" for number in range(size)],
                "user_id": [f"u{number % (users or size)}" for number in range(size)],
                "domain": [settings["domain"]] * size,
                "arm": [arm] * size,
                "protocol": [protocol] * size,
                "num_better": places,
                f"recall@{k}": recall(places, tied, k),
                "ndcg@5": ndcg(places, tied, 5),
                f"ndcg@{k}": ndcg(places, tied, k),
                "mrr": reciprocal_rank(places, tied),
                "kind": ["bound" if arm == "oracle" else "model"] * size,
                "stochastic": [arm not in ("oracle", "popularity", "EASE")] * size,
            }
            order = np.random.default_rng(len(tables)).permutation(size)  # rows may stand in any order
            tables.append(pa.table(columns).take(order))
    pq.write_table(pa.concat_tables(tables), inside / "metrics.parquet")
    return folder


def first_in(share: float, size: int = 1200, shift: int = 0) -> np.ndarray:
    """The target first in this share of the queries, and missed in the others."""
    return np.roll(np.where(np.arange(size) < round(share * size), 0, 50), shift)


def run(*folders: Path, **options: Any) -> tuple[list[ComparisonTable], str]:
    printed = io.StringIO()
    output = options.pop("output", folders[0].parent / "compare.html")
    tables = compare(folders, output=output, file=printed, **options)
    return tables, printed.getvalue()


def test_two_runs_in_one_table_worked_by_hand(tmp_path: Path) -> None:
    popularity = first_in(0.05)
    a = write(tmp_path / "a", {"popularity": popularity, "CPRec": first_in(0.3)})
    b = write(tmp_path / "b", {"popularity": popularity, "CPRec": first_in(0.2), "oracle": first_in(0.9)})
    (table,), printed = run(a, b)
    assert table.metric == "ndcg@10" and table.protocol == "full" and table.runs == ("a", "b")
    # an arm with the same numbers in both runs stands once, the others have their run in front; best first
    assert [row.name for row in table.arms] == ["oracle", "a: CPRec", "b: CPRec", "popularity"]
    assert [row.estimates["ndcg@10"].mean for row in table.arms] == pytest.approx([0.9, 0.3, 0.2, 0.05])
    assert table.best is table.arms[1] and table.best.against_best is None
    assert table.arms[0].bound and table.arms[0].against_best is None
    less = table.arms[2].against_best
    assert less is not None and less.mean == pytest.approx(-0.1)
    assert less.low < -0.1 < less.high < 0 and less.claim and less.num_queries == 1200
    # 120 queries differ by 1: variance 0.1 * 0.9 * 1200 / 1199
    assert less.detectable == pytest.approx(2.8016 * (0.09 / 1199) ** 0.5, rel=1e-3)
    assert less.p_value == pytest.approx(1e-4) and less.p_adjusted == pytest.approx(3e-4)  # three pairs
    assert set(table.comparisons) == {("a: CPRec", "b: CPRec"), ("a: CPRec", "popularity"), ("b: CPRec", "popularity")}
    assert "Books: full catalogue, seen items left out, 1,200 queries" in printed
    row = next(line for line in printed.splitlines() if line.startswith("b: CPRec"))
    assert re.search(r"0\.2000 \[0\.1\d+, 0\.2\d+\] +-0\.1000 \[-0\.1\d+, -0\.0\d+\] +<0\.001\*", row)
    assert "all 3 pairs" in printed and "No claim" not in printed and "number of items: 12,345" in printed
    assert max(map(len, printed.splitlines())) <= 100 or "\n\n" in printed


def test_the_other_protocol_and_metric_may_be_asked_for(tmp_path: Path) -> None:
    a = write(tmp_path / "a", {"x": first_in(0.3), "y": first_in(0.2)})
    (table,), _ = run(a, metric="mrr", protocol="full_with_seen")
    assert table.metric == "mrr" and [row.name for row in table.arms] == ["x", "y"]
    assert table.arms[0].estimates["mrr"].mean == pytest.approx(0.3 / 2 + 0.7 / 51)
    seen = write(tmp_path / "seen", {"x": first_in(0.3)}, seen="may be recommended")
    (table,), printed = run(seen)
    assert table.protocol == "full_with_seen" and "seen items too" in printed  # that run's main table
    assert table.comparisons == {} and table.arms[0].against_best is None and "Holm" not in printed


def test_runs_that_were_asked_differently_are_refused_with_each_difference(tmp_path: Path) -> None:
    a = write(tmp_path / "a", {"x": first_in(0.3)})
    b = write(tmp_path / "b", {"x": first_in(0.3)}, k=20, seen="may be recommended", catalogue_sha256="3" * 64)
    c = write(tmp_path / "c", {"x": first_in(0.3)})
    with pytest.raises(ConfigError) as refused:
        run(a, b, c)
    lines = str(refused.value).splitlines()
    assert "  Books: K is 10 in a and c, 20 in b" in lines
    assert "  Books: seen items is left out in a and c, may be recommended in b" in lines
    assert "  Books: catalogue is of SHA-256 222222222222 in a and c, of SHA-256 333333333333 in b" in lines
    assert len(lines) == 5 and "--force" in lines[-1]
    assert not (tmp_path / "compare.html").exists()

    tables, printed = run(a, b, c, force=True)
    assert [(table.runs, table.metric) for table in tables] == [(("a", "c"), "ndcg@10"), (("b",), "ndcg@20")]
    assert "K: 10" in printed and "K: 20" in printed


@pytest.mark.parametrize("key", [key for key in SETTINGS if key not in ("domain", "k")])
def test_any_difference_refuses(key: str, tmp_path: Path) -> None:
    a = write(tmp_path / "a", {"x": first_in(0.3)})
    b = write(tmp_path / "b", {"x": first_in(0.3)}, **{key: "other"})
    with pytest.raises(ConfigError, match="other in b"):
        run(a, b)


def test_differences_are_told_by_value_and_missing_ones_are_not_stated() -> None:
    settings = {"a": {"x": 1, "rules": {"b": 2}}, "b": {"x": "1"}}
    assert protocol_differences(settings) == ["x is 1 in a, 1 in b", 'rules is {"b": 2} in a, not stated in b']
    assert protocol_differences({"a": {"k": 10}, "b": {"k": 10}}) == []


def test_small_test_sets_and_missing_certificates_are_told_everywhere(tmp_path: Path) -> None:
    a = write(tmp_path / "a", {"x": first_in(0.5, 900), "y": first_in(0.1, 900)}, certificate="uncertified")
    (table,), printed = run(a)
    against = table.arms[1].against_best
    assert against is not None and against.p_adjusted < 0.001 and not against.claim
    page = (tmp_path / "compare.html").read_text()
    for text in (printed, page, markdown_table(table), latex_table(table)):
        flat = " ".join(text.split())
        assert "No claim under 1,000 queries: there are 900." in flat and "UNCERTIFIED" in flat
        assert "0.001*" not in flat


def test_arms_of_several_seeds_become_one_with_both_errors(tmp_path: Path) -> None:
    shares = {"SASRec (seed 1)": first_in(0.30), "SASRec (seed 2)": first_in(0.34), "SASRec (seed 3)": first_in(0.26)}
    a = write(tmp_path / "a", {**shares, "popularity": first_in(0.28), "GRU (seed 7)": first_in(0.01)})
    (table,), printed = run(a)
    assert [(row.name, row.num_seeds) for row in table.arms] == [
        ("SASRec (3 seeds)", 3),
        ("popularity", 1),
        ("GRU (seed 7)", 1),
    ]
    main = table.arms[0].estimates["ndcg@10"]
    assert main.mean == pytest.approx(0.30)
    # seed means 0.30, 0.34, 0.26: variance 0.0016; a third of it, less what users explain
    assert main.error_seeds == pytest.approx((0.0016 / 3) ** 0.5, rel=0.05)
    assert main.error_users is not None and 0.01 < main.error_users < 0.015
    assert "0.0127 from users" in printed and "from seeds" in printed
    assert table.arms[1].against_best is not None and not table.arms[1].against_best.claim  # within the luck of seeds
    assert table.arms[2].against_best is not None and table.arms[2].against_best.claim


def test_seeds_of_one_model_in_several_runs_are_one_arm(tmp_path: Path) -> None:
    a = write(tmp_path / "a", {"EASE": first_in(0.3), "SASRec (seed 0)": first_in(0.2)})
    b = write(tmp_path / "b", {"EASE": first_in(0.3), "SASRec (seed 1)": first_in(0.24)})
    (table,), _ = run(a, b)
    assert [(row.name, row.num_seeds) for row in table.arms] == [("EASE", 1), ("SASRec (2 seeds)", 2)]
    c = write(tmp_path / "c", {"SASRec (seed 0)": first_in(0.1), "SASRec (seed 1)": first_in(0.12)})
    (table,), _ = run(a, c)  # another SASRec, which has other numbers with seed 0
    assert [row.name for row in table.arms] == ["EASE", "a: SASRec (seed 0)", "c: SASRec (2 seeds)"]


def test_only_an_arm_whose_training_draws_is_given_the_luck_of_others(tmp_path: Path) -> None:
    seeds = {"SASRec (seed 0)": first_in(0.2), "SASRec (seed 1)": first_in(0.26)}
    found = []
    for name in ("EASE", "GRU4Rec"):
        (table,), _ = run(write(tmp_path / name, {**seeds, name: first_in(0.3)}))
        assert table.arms[1].against_best is not None
        found.append(table.arms[1].against_best.detectable)
    assert found[0] is not None and found[1] is not None and found[1] > 1.3 * found[0]


def test_damaged_metrics_are_named(tmp_path: Path) -> None:
    a = write(tmp_path / "a", {"x": first_in(0.3)})
    path = a / "Books" / "metrics.parquet"
    whole = pq.read_table(path)
    broken = whole["ndcg@10"].to_numpy().copy()
    broken[7] = np.nan
    pq.write_table(whole.set_column(whole.column_names.index("ndcg@10"), "ndcg@10", [broken]), path)
    with pytest.raises(DataError, match=r"metrics\.parquet: ndcg@10 of x is not a number everywhere"):
        run(a)
    pq.write_table(whole, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"metrics\.parquet cannot be read .*run `cprec evaluate` anew"):
        run(a)


def test_queries_of_one_user_count_together(tmp_path: Path) -> None:
    arms = {"x": first_in(0.5), "y": first_in(0.2)}
    (alone,), _ = run(write(tmp_path / "a", arms))
    (together,), _ = run(write(tmp_path / "b", arms, users=10))
    wide, narrow = (table.arms[0].estimates["ndcg@10"] for table in (alone, together))
    assert narrow.high - narrow.low != pytest.approx(wide.high - wide.low, rel=0.2)  # all ten users are much alike
    assert narrow.mean == wide.mean


def test_what_is_not_there_is_named_with_what_is(tmp_path: Path) -> None:
    a = write(tmp_path / "a", {"x": first_in(0.3)})
    other = write(tmp_path / "other", {"x": first_in(0.3)}, domain="Toys")
    cases = [
        ((), {}, "no folder to compare"),
        ((tmp_path / "nowhere",), {}, "nowhere is not a folder"),
        ((a, a), {}, "named twice"),
        ((a, tmp_path / "a" / ".." / "a"), {}, "named twice"),
        ((tmp_path,), {}, "holds no evaluation"),
        ((a, other), {}, "share no domain: a has Books; other has Toys"),
        ((a,), {"domains": ["Toys"]}, "domain='Toys' is not in .*a, which has Books"),
        ((a,), {"metric": "ndcg@7"}, "metric=ndcg@7 is not in .*which has recall@10, ndcg@5, ndcg@10, mrr"),
        ((a,), {"protocol": "half"}, "protocol=half is not in .*which has full, full_with_seen"),
    ]
    for folders, options, message in cases:
        with pytest.raises(ConfigError, match=message):
            compare(folders, output=tmp_path / "compare.html", file=io.StringIO(), **options)


def test_domains_that_all_runs_share_are_compared(tmp_path: Path) -> None:
    a = write(tmp_path / "a", {"x": first_in(0.3)})
    for folder in ("a", "b"):
        write(tmp_path / folder, {"x": first_in(0.2)}, domain="Toys")
    tables, _ = run(a, tmp_path / "b")
    assert [table.domain for table in tables] == ["Toys"]
    tables, _ = run(a)
    assert [table.domain for table in tables] == ["Books", "Toys"]
    tables, _ = run(a, domains=["Toys"])
    assert [table.domain for table in tables] == ["Toys"]


def test_folders_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    a = write(tmp_path / "one" / "evaluation", {"x": first_in(0.3)})
    b = write(tmp_path / "two" / "evaluation", {"x": first_in(0.2)})
    (table,), _ = run(a, b)
    assert [row.name for row in table.arms] == [f"{a}: x", f"{b}: x"]


def test_files_that_are_no_evaluation_are_refused(tmp_path: Path) -> None:
    a = write(tmp_path / "a", {"x": first_in(0.3)})
    b = write(tmp_path / "b", {"x": first_in(0.3, 1100), "y": first_in(0.3, 1100)})
    with pytest.raises(DataError, match="a: x and b: x answered different queries"):
        run(a, b)
    pq.write_table(pa.table({"query_id": ["q"], "mrr": [1.0]}), a / "Books" / "metrics.parquet")
    with pytest.raises(DataError, match="has no column 'arm'"):
        run(a)
    for text in ("{", "[]", "{}"):
        (a / "Books" / "protocol.json").write_text(text)
        with pytest.raises(DataError, match=r"protocol\.json is not the protocol"):
            run(a)
    c = write(tmp_path / "c", {"x (seed 1)": first_in(0.3), "x (seed 2)": first_in(0.3, 1100)})
    with pytest.raises(DataError, match=r"c: x \(seed 1\) and c: x \(seed 2\) answered different queries"):
        run(c)


@pytest.fixture
def table(tmp_path: Path) -> ComparisonTable:
    arms = {"A & B_1 | <b>": first_in(0.3), "y": first_in(0.2), "z": first_in(0.29, shift=100), "oracle": first_in(0.9)}
    (made,), _ = run(write(tmp_path / "a", arms))
    return made


def test_the_page_is_one_safe_file_with_a_plot(table: ComparisonTable, tmp_path: Path) -> None:
    page = (tmp_path / "compare.html").read_text()
    assert page == comparison_page([table])
    assert "<b>" not in page and "A &amp; B_1 | &lt;b&gt;" in page
    assert not re.search(r"<script|https?://|src=|href=", page)
    assert list(tmp_path.glob("*.incomplete")) == []
    assert page.count("<circle") == 4 and page.count("stroke-dasharray") == 4  # a dot an arm, a line at the best
    drawing = plot(table)
    assert drawing.count('fill="var(--page)"') == 1  # z alone is not told from the best
    assert drawing.index("oracle") < drawing.index("A &amp; B_1") < drawing.index(">z<") < drawing.index(">y<")


def test_the_plot_shows_long_names_and_draws_a_single_value(tmp_path: Path) -> None:
    (made,), _ = run(write(tmp_path / "a", {"n" * 80: np.zeros(1200, int)}))
    drawing = plot(made)
    assert f">{'n' * 80}<" in drawing
    assert "nan" not in drawing and "inf" not in drawing


def test_a_terminal_gets_the_columns_that_fit(table: ComparisonTable) -> None:
    for width, columns in ((60, 2), (150, 6)):
        printed = io.StringIO()
        print_tables([table], printed, width=width)
        text = printed.getvalue()
        assert max(map(len, text.splitlines())) <= width
        assert ("detectable " in text.splitlines()[2]) == (columns == 6)
        assert ("|o|" in text or "-o-" in text) == (columns == 6)
    assert "\x1b" not in text


@pytest.mark.parametrize(("name", "form"), [("t.md", markdown_table), ("t.tex", latex_table)])
def test_the_tables_alone_are_written_by_the_name_of_the_file(name: str, form: Any, tmp_path: Path) -> None:
    tables, _ = run(write(tmp_path / "a", {"x": first_in(0.3), "y": first_in(0.2)}), output=tmp_path / name)
    assert (tmp_path / name).read_text() == form(tables[0])


def test_tables_for_papers(table: ComparisonTable) -> None:
    lines = markdown_table(table).splitlines()
    assert lines[0] == "| | NDCG@10 | Recall@10 | NDCG@5 | MRR | less the best | p |"
    assert lines[1] == "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    assert lines[2].startswith("| oracle | 0.9000 [") and lines[3].startswith("| **A & B_1 \\| <b>** | **0.3000 [")
    assert lines[2].endswith("] | | |")
    assert lines[5].startswith("| y | 0.2000 [") and lines[5].endswith("| <0.001\\* |")
    assert lines[-1] == f"{title_of(table)}. {' '.join(notes(table))}"
    latex = latex_table(table).splitlines()
    assert latex[0] == f"% {title_of(table)}" and latex[3] == r"\begin{tabular}{lrrrrrr}"
    assert latex[5] == r" & NDCG@10 & Recall@10 & NDCG@5 & MRR & less the best & p \\"
    assert latex[8].startswith(r"\textbf{A \& B\_1 | $<$b$>$} & \textbf{0.3000 [")
    assert latex[10].endswith(r"& $<$0.001$^{*}$ \\") and "$-$0.1000 [$-$0." in latex[10]
    assert latex[-1] == r"\end{tabular}"


def test_warnings_are_printed_in_latex_too(tmp_path: Path) -> None:
    few = write(tmp_path / "a", {"x": first_in(0.3, 900), "y": first_in(0.2, 900)}, certificate="uncertified")
    (table,), _ = run(few)
    latex = [line for line in latex_table(table).splitlines() if not line.startswith("%")]
    assert any("UNCERTIFIED" in line for line in latex)
    assert any("No claim under 1,000 queries" in line for line in latex)
