"""The router of weak users: six users worked by hand, what no query may decide about itself, and what is refused."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cprec import cli
from cprec.errors import ConfigError, DataError
from cprec.evaluate.rankings import SavedRankings, rankings_path, write_rankings
from cprec.evaluate.routing import Answered, Bounds, Routed, choose, judge, quality_of_users, quality_on_others, route


def answered(part: str, rows: Sequence[tuple[str, int, float, float]]) -> Answered:
    """Queries of a user with so many events, answered so well by the first arm and by the second."""
    user, events, first, second = zip(*rows, strict=True)
    return Answered(
        query_id=[f"{part}{number:04}" for number in range(len(rows))],
        user_Q=np.array(user, dtype=object),
        events_Q=np.array(events),
        first_Q=np.array(first, dtype=float),
        second_Q=np.array(second, dtype=float),
    )


# Six users with two validation queries each. By the other query of a user, those with the first arm at 0 are both of
# a (the second arm gains 1 and 1), both of c (1, 0), both of d (0, 0), and the one of e that the first arm found (-1).
VALIDATION = [
    *[("a", 2, 0, 1), ("a", 2, 0, 1)],
    *[("b", 2, 1, 0), ("b", 2, 1, 0)],
    *[("c", 3, 0, 1), ("c", 3, 0, 0)],
    *[("d", 9, 0, 0), ("d", 9, 0, 0)],
    *[("e", 9, 0, 0), ("e", 9, 1, 0)],
    *[("f", 9, 1, 0), ("f", 9, 1, 1)],
]
TEST = [("a", 2, 0, 1), ("b", 2, 1, 0), ("c", 3, 0.5, 1), ("d", 9, 0, 1), ("e", 9, 1, 0), ("g", 1, 0, 1)]


def test_six_users_by_hand() -> None:
    validation, test = answered("v", VALIDATION), answered("t", TEST)
    assert quality_on_others(validation).tolist() == [0, 0, 1, 1, 0, 0, 0, 0, 1, 0, 1, 1]
    bounds = choose(validation)  # a and c gain 3; with d and e it is 2, without c 2, and with b as well 1
    assert bounds == Bounds(3, 0.0)
    assert quality_of_users(validation, test.user_Q).tolist() == pytest.approx([0, 1, 0, 0, 0.5, math.nan], nan_ok=True)
    weak, others, everybody = judge(validation, test, bounds)
    assert [group.num_queries for group in (weak, others, everybody)] == [2, 4, 6]  # g has no validation query
    assert [mean for mean, *_ in weak.means] == [0.25, 1, 1]
    assert [mean for mean, *_ in others.means] == [0.5, 0.5, 0.5]
    assert [mean for mean, *_ in everybody.means] == pytest.approx([2.5 / 6, 4 / 6, 4 / 6])
    assert weak.less[0] is not None and weak.less[0].mean == 0.75 and weak.less[1] is None
    assert others.less[0] is None and others.less[1] is not None and others.less[1].mean == 0
    assert [test.mean for test in everybody.less if test] == pytest.approx([1.5 / 6, 0])


def test_a_second_arm_that_never_helps_gets_nobody() -> None:
    worse = answered("v", [(user, events, first, 0.0) for user, events, first, _ in VALIDATION])
    bounds = choose(worse)
    assert bounds == Bounds(-1, math.inf) and str(bounds) == "nobody is weak"
    weak, _, everybody = judge(worse, answered("t", TEST), bounds)
    assert weak.num_queries == 0 and weak.means == () and weak.less == (None, None)
    assert everybody.less[0] is None  # the router is that arm
    assert everybody.less[1] is not None and everybody.less[1].mean == pytest.approx(-1.5 / 6)


def test_where_everybody_is_weak_the_router_is_the_second_arm() -> None:
    weak, others, everybody = judge(answered("v", VALIDATION), answered("t", TEST), Bounds(9, math.inf))
    assert others.less == (None, None) and weak.less[1] is None and everybody.less[1] is None
    # One test that is in two groups: Holm takes it twice.
    assert weak.less[0] is not None and everybody.less[0] is not None
    assert weak.less[0].mean == everybody.less[0].mean == pytest.approx(1.5 / 6)


def test_one_validation_query_a_user_does_not_decide_about_itself() -> None:
    # Where the first arm missed, a second arm by chance gains, so quality on the query itself would speak for it.
    rng = np.random.default_rng(0)
    hits = rng.random((400, 2)) < (0.3, 0.2)
    rows = [(f"u{n}", n % 5 + 1, float(first), float(second)) for n, (first, second) in enumerate(hits)]
    alone = answered("v", rows)
    assert np.isnan(quality_on_others(alone)).all()
    assert choose(alone).quality == math.inf
    # With the query itself the same numbers would send away all that the first arm missed.
    assert choose(answered("v", [row for row in rows for _ in range(2)])).quality == 0


def test_the_test_decides_nothing_about_who_is_weak() -> None:
    validation, test = answered("v", VALIDATION), answered("t", TEST)
    turned = replace(test, first_Q=1 - test.first_Q, second_Q=1 - test.second_Q)
    bounds = choose(validation)
    for one, other in zip(judge(validation, test, bounds), judge(validation, turned, bounds), strict=True):
        assert (one.num_queries, one.num_users) == (other.num_queries, other.num_users)


# ---- the stage -------------------------------------------------------------------------------------------------------

SETTINGS = {"domain": "Books", "split": "last-n", "seen": "left out", "k": 10, "certificate": "clean"}


def write(folder: Path, part: str, rows: Answered, *, kinds: Mapping[str, str] | None = None, **settings: Any) -> Path:
    inside = folder / "Books"
    inside.mkdir(parents=True)
    (inside / "protocol.json").write_text(json.dumps({**SETTINGS, "part": part, "queries_sha256": part, **settings}))
    size = len(rows.query_id)
    ids = {"query_id": rows.query_id, "user_id": rows.user_Q.tolist()}
    tables = [
        pa.table(
            {
                **ids,
                "arm": [arm] * size,
                "protocol": ["full"] * size,
                "ndcg@10": values_Q,
                "kind": [(kinds or {}).get(arm, "model")] * size,
                "stochastic": [False] * size,
            }
        )
        for arm, values_Q in (("EASE", rows.first_Q), ("LLM", rows.second_Q))
    ]
    pq.write_table(pa.concat_tables(tables), inside / "metrics.parquet")
    pq.write_table(
        pa.table({**ids, "user events": rows.events_Q}).take(list(range(size))[::-1]), inside / "queries.parquet"
    )
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """1,200 users like the six; f stands in the test for g."""
    many = [
        [(f"{user}{copy}", events, first, second) for copy in range(200) for user, events, first, second in rows]
        for rows in (VALIDATION, [*TEST[:5], ("f", 9, 1, 0)])
    ]
    return [
        write(tmp_path / part, part, answered(part, rows))
        for part, rows in zip(("validation", "test"), many, strict=True)
    ]


def routed(folders: Sequence[Path], arms: str = "EASE, LLM", **options: Any) -> tuple[Routed, str]:
    printed = io.StringIO()
    output = options.pop("output", folders[0].parent / "route.html")
    (found,) = route(folders, arms, output=output, file=printed, **options)
    return found, " ".join(printed.getvalue().split())


def test_a_router_that_beats_both(folders: list[Path], tmp_path: Path) -> None:
    found, printed = routed(folders[::-1])  # in any order
    assert found.bounds == Bounds(3, 0.0) and found.beats_both
    assert found.on_validation == pytest.approx((5 / 12, 4 / 12, 8 / 12))
    weak, others, everybody = found.groups
    assert (weak.num_users, others.num_users, everybody.num_queries) == (400, 800, 1200)
    assert [mean for mean, *_ in everybody.means] == pytest.approx([3.5 / 6, 3 / 6, 5 / 6])
    assert everybody.less[1] is not None and everybody.less[1].low > 0.2
    assert "Weak: at most 3 training events, and at most 0.0000 on validation queries (400 of 1,200 users" in printed
    assert "The router beats both arms." in printed
    assert "<h2" in (tmp_path / "route.html").read_text()


def test_another_model_for_the_test_is_named(folders: list[Path]) -> None:
    def save(folder: Path, arm: str, model: str) -> None:
        ranked = SavedRankings(
            table=pa.table({"query_id": ["t"]}), answers={"identity": {"model": model}, "k": 10}, seconds=1.0
        )
        write_rankings(rankings_path(folder, "Books", arm, "full"), ranked)

    for folder in folders:
        for arm in ("EASE", "LLM"):
            save(folder, arm, "first")
    assert routed(folders)[0].changed == ()
    save(folders[1], "LLM", "second")
    found, printed = routed(folders)
    assert found.changed == ("LLM",)
    assert "LLM: another model, other settings or other code answered the test than the validation queries" in printed


def test_six_users_are_no_evidence(tmp_path: Path) -> None:
    few = [
        write(tmp_path / part, part, answered(part, rows))
        for part, rows in (("validation", VALIDATION), ("test", TEST))
    ]
    found, printed = routed(few, output=tmp_path / "r.md")
    assert not found.beats_both and "The router is not shown to beat both arms." in printed
    assert "No claim under 1,000 queries: there are 6." in printed
    text = (tmp_path / "r.md").read_text()
    assert text.startswith("| | ndcg@10 | router less this | p |") and "No claim under" in text
    assert "| weak: 2 users, 2 queries | | | |" in text and "| LLM | 1.0000 [1.0000, 1.0000] | | |" in text
    routed(few, output=tmp_path / "r.tex")
    assert r"\begin{tabular}" in (tmp_path / "r.tex").read_text()
    single = [write(tmp_path / f"one {part}", part, answered(part, TEST)) for part in ("validation", "test")]
    assert "events alone decide" in routed(single)[1]


def test_what_is_refused(folders: list[Path], tmp_path: Path) -> None:
    validation, test = answered("v", VALIDATION), answered("t", TEST)
    for arms in ("EASE", "EASE,", "EASE,EASE", "a,b,c"):
        with pytest.raises(ConfigError, match="name two arms"):
            routed(folders, arms)
    with pytest.raises(ConfigError, match="no arm 'BERT'; it has EASE, LLM"):
        routed(folders, "EASE, BERT")
    with pytest.raises(ConfigError, match="1 folders to route"):
        routed(folders[:1])
    other = write(tmp_path / "other", "test", test)
    with pytest.raises(ConfigError, match="test has part=test, other has part=test; give one folder evaluated with"):
        routed([folders[1], other])
    longer = write(tmp_path / "longer", "test", test, k=20)
    with pytest.raises(ConfigError, match="not asked the same: K is 10 in validation, 20 in longer"):
        routed([folders[0], longer])
    oracle = write(tmp_path / "oracle", "validation", validation, kinds={"LLM": "bound"})
    with pytest.raises(ConfigError, match="LLM knows what no recommender can know"):
        routed([oracle, other])
    same = write(tmp_path / "same", "validation", test)
    with pytest.raises(DataError, match="query 't0000' is in validation and in test"):
        routed([same, other])
    queries = pq.read_table(other / "Books" / "queries.parquet")
    pq.write_table(queries.drop_columns("user events"), other / "Books" / "queries.parquet")
    with pytest.raises(DataError, match="without the users' events: run `cprec evaluate` anew"):
        routed([folders[0], other])


def test_the_command_line(folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["compare", *map(str, folders), "--route", "EASE, LLM"]
    assert cli.main(command) == 0 and (tmp_path / "route.html").is_file()
    assert cli.main([*command, "--force"]) != 0
