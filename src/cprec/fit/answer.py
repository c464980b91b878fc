"""The end of `cprec fit`: one sentence that says which recommender to use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from cprec.entrants import WITHOUT_MODEL
from cprec.evaluate.results import BLENDED, BY_HEAD, Arm, DomainResult
from cprec.evaluate.saved import read_saved
from cprec.evaluate.statistics import MIN_QUERIES, Comparison, compare_pair
from cprec.rank.blend_file import Setting, read_about

BLEND_OF_ALL = "the blend with the language model"
BLEND_OF_SIMPLE = "the blend without the language model"
HEAD = "the item head of the language model"
"""What a folder may serve, as its weights say."""


def served(model: str) -> str:
    """What the blend beside a model is, by its weights. Raises as `read_about` does."""
    setting = Setting.from_json(read_about(model)["blend"])
    if not (setting.model or setting.item_head):
        return BLEND_OF_SIMPLE
    return BLEND_OF_ALL if any(weight for weight, _ in setting.parts.values()) else HEAD


def answer(result: DomainResult, model: str, what: str, compare: Callable[[str, str], Comparison]) -> str:
    """Whether to use `what` the folder of the arm `model` serves, or the best simple recommender, and how much better
    it is for the same customers; and what the language model adds, where it has a weight. Where the simple one is
    enough, the folder serves `what` all the same, and the end says so.

    Nothing is chosen by the test queries but the simple recommender, which is flattered by it.
    """

    def mean(arm: Arm) -> float:
        return arm.metrics[result.main].mean

    def found(arm: Arm) -> str:  # the customers whose next item is in the list
        return f"{arm.metrics[replace(result.main, name='recall')].mean:.1%}"

    best = result.arms[model + BLENDED]
    own = (model, model + BY_HEAD, best.name, WITHOUT_MODEL)
    others = (arm for name, arm in result.arms.items() if arm.kind != "bound" and name not in own)
    simple = max(others, key=mean)
    test, reached = compare(best.name, simple.name), mean(simple)
    means = f"NDCG@10 {mean(best):.4f} against {reached:.4f}"
    if test.low > 0 and test.num_queries >= MIN_QUERIES:
        added = "" if what == BLEND_OF_SIMPLE else f"; {_added(compare(best.name, WITHOUT_MODEL))}"
        return (
            f"Use {what}: its lists of ten are {_gain(test, reached)} than those of the best simple recommender, "
            f"{simple.name} ({means}); what a customer took next is among the ten for {found(best)} of the "
            f"customers, against {found(simple)}{added}."
        )
    difference = f"{means}; {_difference(test)}"
    if test.low > 0:
        return (
            f"Use {simple.name}: {what} seems to be better ({difference}), but {test.num_queries:,} customers are too "
            f"few to be sure, so try again with more than {MIN_QUERIES:,}. The folder serves {what}."
        )
    why = f"it is better than {what}" if test.high < 0 else f"it is enough, because no gain by {what} is shown"
    few = "" if test.num_queries >= MIN_QUERIES else ", too few to show more than a large difference"
    return (
        f"Use {simple.name}, a simple recommender: {why} ({difference}), and what a customer took next is among its "
        f"ten for {found(simple)} of the {test.num_queries:,} customers who were tried{few}. The "
        f"folder serves {what}{', all the same' if test.high < 0 else ', which is not shown to be worse'}."
    )


def _added(test: Comparison) -> str:
    """What the language model adds to the best blend without it."""
    added, shown = "the language model makes it better than the best blend without one", test.low > 0
    return f"{added if shown else f'that {added} is not shown'} ({_difference(test)})"


def _difference(test: Comparison) -> str:
    return f"difference {test.mean:+.4f}, 95 % interval {test.low:+.4f} to {test.high:+.4f}"


def compare_saved(folder: Path, result: DomainResult, seed: int, a: str, b: str) -> Comparison:
    """Two arms of an evaluation in the main metric, from the metrics of each query that it saved in `folder`."""
    rows = read_saved(folder / result.domain / "metrics.parquet", "run `cprec fit` again")
    rows = rows.filter(pc.equal(rows["protocol"], result.main.pool))
    of_arm = [rows.filter(pc.equal(rows["arm"], arm)) for arm in (a, b)]
    users, values = of_arm[0]["user_id"].to_pylist(), [np.asarray(one[str(result.main)]) for one in of_arm]
    assert of_arm[0]["query_id"] == of_arm[1]["query_id"], "both arms answer the same queries in the same order"
    return compare_pair(values[0], values[1], groups=users, seed=seed)


def _gain(test: Comparison, simple: float) -> str:
    """A difference as a share of what the simple recommender reaches, where it reaches something."""
    numbers = (test.mean, test.low, test.high)
    mean, low, high = (f"{number / simple:.0%}" if simple else f"{number:.4f}" for number in numbers)
    return f"{mean} better (95 % interval {low} to {high})"
