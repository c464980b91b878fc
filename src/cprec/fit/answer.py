"""The end of `cprec fit`: one sentence that says which recommender to use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from cprec.entrants import WITHOUT_MODEL
from cprec.evaluate.results import BLENDED, BY_HEAD, Arm, DomainResult
from cprec.evaluate.saved import read_saved
from cprec.evaluate.statistics import MIN_QUERIES, Comparison, compare_pair
from cprec.rank.blend_file import BLEND, read_about
from cprec.recipe import FINETUNED

NAMES = {
    WITHOUT_MODEL: "the blend of simple recommenders, without the language model",
    FINETUNED: "the language model",
    FINETUNED + BY_HEAD: "the item head of the language model",
    FINETUNED + BLENDED: "the blend of the language model and simple recommenders",
}
"""What arms are called in the sentence, the simplest first, which is taken where two are equal; others are simple
recommenders, by the names that they have in tables."""

Compare = Callable[[str, str], Comparison]
"""Two arms on the same queries: the first less the second."""


def answer(result: DomainResult, compare: Compare, validated: Mapping[str, float]) -> str:
    """Which recommender to use, and how much better than the best simple one it is for the same customers.

    Of the model, its item head, its blend and the blend without it, the one is judged that `validated`, NDCG on
    validation queries by the names of arms, puts first: the best of them on the test queries would be flattered.
    """
    arms = {name: arm for name, arm in result.arms.items() if arm.kind != "bound"}
    best = arms[max((name for name in NAMES if name in arms), key=lambda name: validated.get(name, -1.0))]
    simple = max((arm for name, arm in arms.items() if name not in NAMES), key=lambda arm: _mean(result, arm))
    test, name = compare(best.name, simple.name), NAMES[best.name]
    means = f"NDCG@10 {_mean(result, best):.4f} against {_mean(result, simple):.4f}"
    if test.low > 0 and test.num_queries >= MIN_QUERIES:
        return (
            f"Use {name}: its lists of ten are {_gain(test, _mean(result, simple))} than those of the best simple "
            f"recommender, {simple.name} ({means}); what a customer took next is among the ten for "
            f"{_found(result, best)} of 1,000 customers, against {_found(result, simple)}."
        )
    difference = f"{means}; difference {test.mean:+.4f}, 95 % interval {test.low:+.4f} to {test.high:+.4f}"
    if test.low > 0:
        return (
            f"Use {simple.name}: {name} seems to be better ({difference}), but {test.num_queries:,} customers are too "
            f"few to be sure, so try again with more than {MIN_QUERIES:,}."
        )
    why = f"it is better than {name}" if test.high < 0 else f"it is enough, because no gain by {name} is shown"
    return (
        f"Use {simple.name}, a simple recommender: {why} ({difference}), and what a customer took next is among its "
        f"ten for {_found(result, simple)} of 1,000 customers."
    )


def validated_by(model: Path) -> dict[str, float]:
    """What the arms of a model reached on the validation queries that its blend was chosen on; nothing without one."""
    if not (model / BLEND).is_file():
        return {}
    about = read_about(model)
    settings = {
        FINETUNED: "model_alone",
        FINETUNED + BY_HEAD: "head_alone",
        FINETUNED + BLENDED: "blend",
        WITHOUT_MODEL: "without_model",
    }
    return {name: about[setting]["ndcg@10"] for name, setting in settings.items() if setting in about}


def compare_saved(folder: Path, result: DomainResult, seed: int, a: str, b: str) -> Comparison:
    """Two arms of an evaluation in the main metric, from the metrics of each query that it saved in `folder`."""
    rows = read_saved(folder / result.domain / "metrics.parquet", "run `cprec fit` again")
    rows = rows.filter(pc.equal(rows["protocol"], result.main.pool))
    of_arm = [rows.filter(pc.equal(rows["arm"], arm)) for arm in (a, b)]
    users, values = of_arm[0]["user_id"].to_pylist(), [np.asarray(one[str(result.main)]) for one in of_arm]
    assert of_arm[0]["query_id"] == of_arm[1]["query_id"], "both arms answer the same queries in the same order"
    return compare_pair(values[0], values[1], groups=users, seed=seed)


def _mean(result: DomainResult, arm: Arm) -> float:
    return arm.metrics[result.main].mean


def _found(result: DomainResult, arm: Arm) -> int:
    """Of 1,000 customers, those whose next item is in the list."""
    return round(1000 * arm.metrics[replace(result.main, name="recall")].mean)


def _gain(test: Comparison, simple: float) -> str:
    """A difference as a share of what the simple recommender reaches, where it reaches something."""
    numbers = (test.mean, test.low, test.high)
    mean, low, high = (f"{number / simple:.0%}" if simple else f"{number:.4f}" for number in numbers)
    return f"{mean} better (95 % interval {low} to {high})"
