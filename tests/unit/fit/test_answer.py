"""The sentence at the end: something is worth having, it is not, or nobody knows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cprec.evaluate.results import FULL, Arm, Cost, DomainResult, Interval, Kind, Metric
from cprec.evaluate.saved import write_saved
from cprec.evaluate.statistics import Comparison, compare_pair
from cprec.fit.answer import BLEND_OF_ALL, BLEND_OF_SIMPLE, HEAD, answer, compare_saved, served
from cprec.rank.blend_file import BLEND

NDCG, RECALL = Metric("ndcg", 10, FULL), Metric("recall", 10, FULL)


def arm(name: str, kind: Kind, ndcg: float) -> Arm:
    cells = {NDCG: Interval(ndcg, 0, 1), RECALL: Interval(2 * ndcg, 0, 1)}
    return Arm(name=name, kind=kind, metrics=cells, seconds={FULL: 1.0}, cost=Cost(milliseconds_per_query=1.0))


def result(blend: float, without: float = 0.08) -> DomainResult:
    """EASE is the best simple recommender; the head and the blend without the model are none."""
    arms = [arm("popularity", "baseline", 0.04), arm("EASE", "baseline", 0.08), arm("oracle", "bound", 0.9)]
    arms += [arm("fine-tuning only", "model", 0.09), arm("fine-tuning only blend", "model", blend)]
    arms.append(arm("blend without the model", "baseline", without))
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
    told: DomainResult,
    interval: tuple[float, float],
    num_queries: int = 2000,
    *,
    what: str = BLEND_OF_ALL,
    added: tuple[float, float] = (0.002, 0.006),
) -> str:
    def compare(a: str, b: str) -> Comparison:
        low, high = {"EASE": interval, "blend without the model": added}[b]
        assert a == "fine-tuning only blend"
        return Comparison(
            mean=(low + high) / 2,
            low=low,
            high=high,
            p_value=0.01,
            p_adjusted=0.01,
            num_queries=num_queries,
            detectable=None,
        )

    sentence = answer(told, "fine-tuning only", what, compare)
    assert sentence.endswith(".") and "\n" not in sentence
    return sentence


BETTER = (
    "its lists of ten are 10% better (95 % interval 5% to 15%) than those of the best simple recommender, EASE "
    "(NDCG@10 0.0880 against 0.0800); what a customer took next is among the ten for 17.6% of the customers, against "
    "16.0%"
)


def test_what_is_served_is_used_where_it_is_surely_better() -> None:
    assert said(result(0.088), (0.004, 0.012)) == (
        f"Use the blend with the language model: {BETTER}; the language model makes it better "
        "than the best blend without one (difference +0.0040, 95 % interval +0.0020 to +0.0060)."
    )
    same = said(result(0.088), (0.004, 0.012), added=(-0.001, 0.003))
    assert "; that the language model makes it better than the best blend without one is not shown (diff" in same
    simple = said(result(0.088), (0.004, 0.012), what=BLEND_OF_SIMPLE)
    assert simple == f"Use the blend without the language model: {BETTER}."


def test_the_simple_one_is_used_where_nothing_is_shown() -> None:
    same = said(result(0.081, without=0.2), (-0.002, 0.004))
    assert same.startswith(
        "Use EASE, a simple recommender: it is enough, because no gain by the blend with the language model"
    )
    assert "difference +0.0010, 95 % interval -0.0020 to +0.0040), and" in same and "its ten for 16.0% of the" in same
    assert "too few" not in same
    assert said(result(0.081), (-0.002, 0.004), num_queries=250).endswith(
        "of the 250 customers who were tried, too few to show more than a large difference. The folder serves "
        "the blend with the language model, which is not shown to be worse."
    )
    worse = said(result(0.072), (-0.012, -0.004), what=HEAD)
    assert "it is better than the item head of" in worse
    assert worse.endswith("The folder serves the item head of the language model, all the same.")
    few = said(result(0.088), (0.004, 0.012), num_queries=250)
    assert few.startswith("Use EASE: the blend with the language model seems") and "250 customers are too few" in few
    assert few.endswith("The folder serves the blend with the language model.")


@pytest.mark.parametrize(
    ("head", "ease", "what"), [(1.0, 0.5, BLEND_OF_ALL), (1.0, 0.0, HEAD), (0.0, 1.0, BLEND_OF_SIMPLE)]
)
def test_weights_say_what_is_served(tmp_path: Path, head: float, ease: float, what: str) -> None:
    parts = {"EASE": {"weight": ease, "floor": 0.1}}
    setting = {"model": 0.0, "item_head": head, "parts": parts, "ndcg@10": 0.1}
    empty = dict.fromkeys(("catalogue", "model", "files", "asked", "without_model"))
    about = {"schema_version": 2, "domain": "shop", "blend": setting} | empty
    (tmp_path / BLEND).write_text(json.dumps(about))
    assert served(str(tmp_path)) == what


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
    assert compare_saved(tmp_path, result(0.1), 3, "a", "b") == expected
