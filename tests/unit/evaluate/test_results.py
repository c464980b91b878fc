"""Results as records, and the file that keeps them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cprec.errors import DataError
from cprec.evaluate.results import (
    CANDIDATES_POPULARITY,
    CANDIDATES_UNIFORM,
    FULL,
    FULL_WITH_SEEN,
    NEW_ITEMS,
    Arm,
    CertificateSummary,
    Cost,
    Difference,
    DomainResult,
    FoundOfExact,
    Generated,
    Interval,
    Metric,
    Pool,
    Proofs,
    Report,
    Slice,
    TrainedModel,
    read_report,
    write_report,
)
from cprec.evaluate.statistics import Comparison


def interval(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}


METRICS = {"recall@1": interval(0.1), "ndcg@5": interval(0.2), "ndcg@10": interval(0.3), "mrr": interval(0.4)}
ARM = {
    "kind": "model",
    "num_queries": 9,
    **METRICS,
    "seconds": 2.5,
    "cost": {"num_parameters": 30, "train_seconds": 4.0, "milliseconds_per_query": 277.7},
    "proven": 0.5,
    "mean_gap": 0.25,
    "expanded": 7.0,
    "seen_kept": {"ndcg@10": interval(0.25)},
    "lists": {"coverage": 0.5},
    "slices": {"repeat": {"new to the user": {"num_queries": 9, "ndcg@10": interval(0.3)}}},
    "found_of_exact": {"share": 0.75, "num_queries": 4},
    "candidates20": {"recall@1": interval(0.5), "seconds": 1.5},
    "candidates20_popularity": {"recall@1": interval(0.6), "seconds": 1.25},
    "new_items": {"recall@1": interval(0.7), "num_queries": 2, "num_items": 3},
    "generate": {"valid_ratio": 0.9, "hr@1-all": 0.2, "hr@1-valid": 0.25, "seconds": 3.5},
}
TEST = {
    **{"mean": 0.1, "low": 0.05, "high": 0.15, "p_value": 0.01, "p_adjusted": 0.03, "num_queries": 2000},
    "detectable": None,
}
WITHOUT_VERSION: dict[str, Any] = {
    "title": "shop",
    "protocol": {"split": "leave-one-out"},
    "certificate": {"clean": True, "checked": 5, "violations": 0, "uncertified": False},
    "domains": {
        "books": {
            "unseen": True,
            "num_items": 12,
            "num_queries": 9,
            "certified": True,
            "notes": ["few"],
            "arms": {"new": ARM},
            "differences": [{"a": "new", "b": "old", "metric": "ndcg@10", **TEST, "claim": True}],
        }
    },
    "models": {"new": {"num_parameters": 30, "tokens": 100, "seconds": 4.0}},
}
"""As it was written before files had a version."""


def cells(pool: str, **means: float) -> dict[Metric, Interval]:
    return {
        Metric.of(name.replace("_", "@"), pool): Interval(mean, mean - 0.1, mean + 0.1) for name, mean in means.items()
    }


RECORD = Report(
    title="shop",
    protocol={"split": "leave-one-out"},
    certificate=CertificateSummary(clean=True, checked=5, violations=0, uncertified=False),
    domains={
        "books": DomainResult(
            domain="books",
            unseen=True,
            num_items=12,
            num_queries=9,
            certified=True,
            notes=["few"],
            main=Metric("ndcg", 10, FULL),
            pools={CANDIDATES_UNIFORM: Pool(9, 20), CANDIDATES_POPULARITY: Pool(9, 20), NEW_ITEMS: Pool(2, 3)},
            arms={
                "new": Arm(
                    name="new",
                    kind="model",
                    metrics={
                        **cells(FULL, recall_1=0.1, ndcg_5=0.2, ndcg_10=0.3, mrr=0.4),
                        **cells(FULL_WITH_SEEN, ndcg_10=0.25),
                        **cells(CANDIDATES_UNIFORM, recall_1=0.5),
                        **cells(CANDIDATES_POPULARITY, recall_1=0.6),
                        **cells(NEW_ITEMS, recall_1=0.7),
                    },
                    seconds={FULL: 2.5, CANDIDATES_UNIFORM: 1.5, CANDIDATES_POPULARITY: 1.25},
                    cost=Cost(milliseconds_per_query=277.7, num_parameters=30, train_seconds=4.0),
                    lists={"coverage": 0.5},
                    slices={"repeat": {"new to the user": Slice(num_queries=9, metrics=cells(FULL, ndcg_10=0.3))}},
                    proofs=Proofs(proven=0.5, mean_gap=0.25, expanded=7.0),
                    found_of_exact=FoundOfExact(share=0.75, num_queries=4),
                    generated=Generated(valid_ratio=0.9, hit_rate_all=0.2, hit_rate_valid=0.25, seconds=3.5),
                )
            },
            differences=[Difference(a="new", b="old", metric=Metric("ndcg", 10, FULL), test=Comparison(**TEST))],
        )
    },
    models={"new": TrainedModel(num_parameters=30, tokens=100, seconds=4.0)},
)


def saved(folder: Path, content: object) -> Path:
    path = folder / "report.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_report_is_written_and_read_back(tmp_path: Path) -> None:
    write_report(tmp_path / "report.json", RECORD)
    assert json.loads((tmp_path / "report.json").read_text()) == {"schema_version": 1, **WITHOUT_VERSION}
    assert read_report(tmp_path / "report.json") == RECORD


def test_a_report_without_a_version_is_read(tmp_path: Path) -> None:
    assert read_report(saved(tmp_path, WITHOUT_VERSION)) == RECORD


def test_where_seen_items_may_be_recommended_the_other_pool_leaves_them_out(tmp_path: Path) -> None:
    arm = {**ARM, "seen_left_out": ARM["seen_kept"]}
    del arm["seen_kept"]
    books = {**WITHOUT_VERSION["domains"]["books"], "arms": {"new": arm}}
    content = {**WITHOUT_VERSION, "domains": {"books": books}}
    report = read_report(saved(tmp_path, content))
    assert report.main == Metric("ndcg", 10, FULL_WITH_SEEN)
    assert report.domains["books"].arms["new"].metrics[report.main].mean == 0.3
    write_report(tmp_path / "report.json", report)
    assert json.loads((tmp_path / "report.json").read_text()) == {"schema_version": 1, **content}


def test_a_report_of_another_version_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has schema_version 9; this CPRec reads 1: run `cprec evaluate` again"):
        read_report(saved(tmp_path, {**WITHOUT_VERSION, "schema_version": 9}))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"title": "shop"}'])
def test_a_file_that_is_no_report_is_named(tmp_path: Path, content: str) -> None:
    with pytest.raises(DataError, match=r"report.json is not a report of CPRec.*run `cprec evaluate` again"):
        read_report(saved(tmp_path, content))


def test_the_best_arm_is_no_bound() -> None:
    (result,) = RECORD.domains.values()
    arm = result.arms["new"]
    higher = {result.main: Interval(0.9, 0.8, 1.0)}
    arms = {"new": arm, "oracle": replace(arm, name="oracle", kind="bound", metrics=higher)}
    assert replace(result, arms=arms).best() == arm
    assert replace(result, arms={"oracle": arms["oracle"]}).best() is None
