"""The sentence at the end: something is worth having, it is not, or nobody knows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cprec.evaluate.results import FULL, Arm, Cost, DomainResult, Interval, Kind, Metric
from cprec.evaluate.saved import write_saved
from cprec.evaluate.statistics import Comparison, compare_pair
from cprec.fit.answer import answer, compare_saved, validated_by

NDCG, RECALL = Metric("ndcg", 10, FULL), Metric("recall", 10, FULL)


def arm(name: str, kind: Kind, ndcg: float) -> Arm:
    cells = {NDCG: Interval(ndcg, 0, 1), RECALL: Interval(2 * ndcg, 0, 1)}
    return Arm(name=name, kind=kind, metrics=cells, seconds={FULL: 1.0}, cost=Cost(milliseconds_per_query=1.0))


def result(**others: float) -> DomainResult:
    """EASE is the best simple recommender; `others` are the arms with the model, by letters."""
    names = {
        "f": "fine-tuning only",
        "h": "fine-tuning only item head",
        "b": "fine-tuning only blend",
        "w": "blend without the model",
    }
    arms = [arm("popularity", "baseline", 0.04), arm("EASE", "baseline", 0.08), arm("oracle", "bound", 0.9)]
    arms += [arm(names[letter], "baseline" if letter == "w" else "model", mean) for letter, mean in others.items()]
    return DomainResult(
        domain="shop",
        num_items=100,
        num_queries=2000,
        certified=True,
        main=NDCG,
        pools={},
        arms={one.name: one for one in arms},
    )


def said(
    told: DomainResult, low: float, high: float, num_queries: int = 2000, validated: dict[str, float] | None = None
) -> str:
    compared: list[str] = []

    def compare(a: str, b: str) -> Comparison:
        compared[:] = [a, b]
        mean = (low + high) / 2
        return Comparison(
            mean=mean, low=low, high=high, p_value=0.01, p_adjusted=0.01, num_queries=num_queries, detectable=None
        )

    sentence = answer(told, compare, validated or {name: one.metrics[NDCG].mean for name, one in told.arms.items()})
    assert compared[1] == "EASE" and sentence.endswith(".") and "\n" not in sentence
    return sentence


@pytest.mark.parametrize(
    ("arms", "name"),
    [
        ({"f": 0.088}, "the language model"),
        ({"f": 0.07, "h": 0.088}, "the item head of the language model"),
        ({"f": 0.07, "b": 0.088, "w": 0.084}, "the blend of the language model and simple recommenders"),
        ({"f": 0.07, "b": 0.086, "w": 0.088}, "the blend of simple recommenders, without the language model"),
    ],
)
def test_the_best_is_used_where_it_is_surely_better(arms: dict[str, float], name: str) -> None:
    assert said(result(**arms), 0.004, 0.012) == (
        f"Use {name}: its lists of ten are 10% better (95 % interval 5% to 15%) than those of the best simple "
        "recommender, EASE (NDCG@10 0.0880 against 0.0800); what a customer took next is among the ten for 176 of "
        "1,000 customers, against 160."
    )


def test_the_simple_one_is_used_where_nothing_is_shown() -> None:
    same = said(result(f=0.081), -0.002, 0.004)
    assert same.startswith(
        "Use EASE, a simple recommender: it is enough, because no gain by the language model is shown"
    )
    assert "difference +0.0010, 95 % interval -0.0020 to +0.0040), and" in same and "its ten for 160 of 1,000" in same
    assert "it is better than the language model" in said(result(f=0.072), -0.012, -0.004)
    few = said(result(f=0.088), 0.004, 0.012, num_queries=250)
    assert few.startswith("Use EASE: the language model seems to be better") and "250 customers are too few" in few


def test_validation_chooses_and_the_test_queries_judge(tmp_path: Path) -> None:
    told = result(f=0.07, b=0.086, w=0.088)
    validated = {"fine-tuning only": 0.06, "fine-tuning only blend": 0.09, "blend without the model": 0.08}
    assert said(told, 0.002, 0.01, validated=validated).startswith("Use the blend of the language model and simple")
    assert validated_by(tmp_path) == {}


def test_arms_are_compared_query_by_query(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = {name: rng.random(50) for name in ("a", "b")}
    users = [f"u{number // 2}" for number in range(50)]
    parts = [
        {
            "query_id": range(50),
            "user_id": users,
            "arm": [name] * 50,
            "protocol": [pool] * 50,
            "ndcg@10": row + (pool != FULL),
        }
        for name, row in values.items()
        for pool in ("new_items", FULL)
    ]
    (tmp_path / "shop").mkdir()
    write_saved(pa.concat_tables(map(pa.table, parts)), tmp_path / "shop" / "metrics.parquet")
    expected = compare_pair(values["a"], values["b"], groups=users, seed=3)
    assert compare_saved(tmp_path, result(f=0.1), 3, "a", "b") == expected
