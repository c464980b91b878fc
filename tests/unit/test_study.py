"""The study's frame: its jobs and what they cost, and the page that is made of the tables alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.study import results
from benchmarks.study.arms import ALL, ARMS, CPREC, RANDOM, REFERENCE, ZERO
from benchmarks.study.jobs import Job, jobs_of, pretrainings, recipe_of
from benchmarks.study.page import _loss_parts, write_page
from benchmarks.study.plot import forest
from benchmarks.study.questions import QUESTIONS
from benchmarks.study.worlds import tiny
from cprec.entrants import WITHOUT_MODEL
from cprec.recipes.arms import ARMS as RECIPE_ARMS

WORLD = tiny(Path("DATA"), "OUT")
BY_NAME = {arm.name: arm for arm in ARMS}


def job(name: str, domain: str = "scientific", seed: int = 0) -> Job:
    return Job(BY_NAME[name], ZERO, domain, seed)


def test_the_first_questions_come_first_with_every_seed() -> None:
    jobs = jobs_of(WORLD, ARMS, (0, 1, 2))
    assert len(set(jobs)) == len(jobs)
    assert {job.domain for job in jobs} == {"scientific", "retail", "steam", "toys", "lastfm"}
    first = {RANDOM, REFERENCE, CPREC, "no mixed", "no annealing", "shuffled"}
    places = {seed: [n for n, j in enumerate(jobs) if j.arm.name in first and j.seed == seed] for seed in (0, 1, 2)}
    early = [n for n, j in enumerate(jobs) if j.arm.name in first and j.regime == ALL and j.domain == "scientific"]
    assert max(early) < min(n for n, j in enumerate(jobs) if not j.arm.first), "three seeds before any other arm"
    assert all(min(places[seed]) < min(places[seed + 1]) for seed in (0, 1))
    assert {j.seed for j in jobs if j.arm.way == "rivals"} == {0}


def test_arms_are_compared_at_equal_tokens_and_share_the_stable_phase() -> None:
    reference = pretrainings(WORLD, job(REFERENCE))
    for name in ("no mixed", "shuffled", "cosine", "5 domains", "items only"):
        assert [run.planned for run in pretrainings(WORLD, job(name))] == [reference[0].planned]
    base, flat = pretrainings(WORLD, job("no annealing"))
    assert (base, flat.planned) == (reference[0], base.planned) and flat.tokens == pytest.approx(0.2 * base.planned)
    base, longer = pretrainings(WORLD, job(CPREC))
    assert base == reference[0] and 0.8 * base.planned + longer.tokens == pytest.approx(WORLD.tokens)
    assert longer.config.anneal_steps * longer.planned == pytest.approx(0.2 * WORLD.tokens)
    assert longer.config.seed != base.config.seed, "documents come in another order the second time"


def test_a_domain_that_is_left_out_has_data_and_a_pretraining_of_its_own() -> None:
    (run,) = pretrainings(WORLD, job(CPREC, "toys"))
    recipe = recipe_of(WORLD, job(CPREC, "toys"))
    assert run.planned == WORLD.left_out_tokens and run.config.data == recipe.prepare.output_dir
    assert recipe.prepare.target_domains == ("toys",) and "toys" not in recipe.prepare.pretrain_domains
    assert {table.domain for table in recipe.prepare.tables} == {*recipe.prepare.pretrain_domains, "toys"}


def test_no_two_jobs_share_a_folder_of_results_and_every_name_is_known() -> None:
    jobs = jobs_of(WORLD, ARMS, (0, 1))
    folders = [(recipe_of(WORLD, each).evaluate.output_dir, each.domain) for each in jobs]
    assert len(set(folders)) == len(folders)
    assert {arm.recipe_arm for arm in ARMS} - {""} <= set(RECIPE_ARMS)
    named = {claim.a for q in QUESTIONS for claim in q.claims} | {claim.b for q in QUESTIONS for claim in q.claims}
    assert named <= set(BY_NAME) | {
        name for arm in ARMS for name in (*arm.baselines, WITHOUT_MODEL, f"{arm.models_of} blend")
    }


# ---- results and page ------------------------------------------------------------------------------------------------


def difference(**changes: Any) -> dict[str, Any]:
    line = {"question": 1, "thing": "pre-training", "a": CPREC, "b": RANDOM, "regime": ALL, "domain": "steam"}
    line |= {"group": results.EVERY, "mean": 0.01, "low": 0.005, "high": 0.015, "p_value": 0.001, "p_adjusted": 0.002}
    return line | {"num_queries": 1000, "detectable": 0.004, "claim": True, "seeds_a": 3, "seeds_b": 3} | changes


def mean(arm: str, domain: str, value: float) -> dict[str, Any]:
    line = {"arm": arm, "regime": ALL, "domain": domain, "protocol": "full", "metric": "ndcg@10", "num_queries": 1000}
    return line | {"seed": 0, "num_seeds": 1, "mean": value, "low": value - 0.01, "high": value + 0.01}


def page(folder: Path, differences: list[dict[str, Any]], done: bool = True) -> str:
    names = {line[side] for line in differences for side in ("a", "b")}
    means = [mean(name, line["domain"], 0.05) for name in sorted(names) for line in differences]
    plan = {"arm": REFERENCE, "regime": ALL, "domain": "steam", "seed": 0, "done": done}
    costs = {"pretraining": 28_800_000, "finetuning": 0, "other_seconds": 3600.0}
    (folder / "study").mkdir()
    for name, lines in ((results.DIFFERENCES, differences), (results.MEANS, means), (results.PLAN, [plan | costs])):
        if lines:
            pq.write_table(pa.Table.from_pylist(lines), folder / "study" / name)
    write_page(folder)
    return (folder / "study.md").read_text()


def test_the_page_says_what_is_shown_and_what_is_not(tmp_path: Path) -> None:
    text = page(
        tmp_path,
        [
            difference(),
            difference(domain="retail", mean=-0.02, low=-0.03, high=-0.01),
            difference(domain="toys", mean=0.003, low=-0.001, high=0.007, claim=False, p_adjusted=0.2),
        ],
    )
    assert "**Pre-training helps** in 1 of 3 comparisons: steam, all events +0.0100 (+0.0050 to +0.0150)." in text
    assert "**Pre-training hurts** in 1 of 3 comparisons: retail, all events -0.0200" in text
    assert "In the others nothing is shown: toys, all events +0.0030 (-0.0010 to +0.0070)." in text
    svg = ElementTree.parse(tmp_path / "study" / "question-1.svg").getroot()
    assert len(svg.findall("{*}circle")) == 3


def test_a_claim_without_support_is_called_so(tmp_path: Path) -> None:
    text = page(tmp_path, [difference(claim=False, low=-0.001, seeds_a=1)])
    assert "**That pre-training helps is not shown**" in text and "the rest cannot be claimed" in text
    assert "find differences of 0.0040 four times in five" in text
    assert "with one seed do not cover the luck of training" in text


def test_what_is_not_run_has_its_cost(tmp_path: Path) -> None:
    text = page(tmp_path, [], done=False)
    assert "0 of 1 jobs are done" in text
    second = text.partition("## 2.")[2].partition("## 3.")[0]
    # 28.8 M tokens at 8,000 a second are an hour, and there is an hour of ranking.
    assert "Not run yet. It would cost 28,800,000 tokens, 2.0 hours of one core with ranking." in second


def test_differences_are_paired_on_equal_queries() -> None:
    a, b = (
        results.Row(query_id=["1", "2", "3"], user_id=["x", "y", "z"], stochastic=True, values={0: np.array(values)})
        for values in ([1.0, 0.5, 0.0], [0.5, 0.0, 0.0])
    )
    rows = {(name, ALL, "steam", *results.MAIN): row for name, row in ((CPREC, a), (RANDOM, b))}
    (line,) = results._differences(QUESTIONS[0], rows, WORLD, [])
    assert line["mean"] == pytest.approx(1 / 3) and line["num_queries"] == 3 and not line["claim"]
    b.query_id = ["1", "2", "4"]
    with pytest.raises(results.DataError, match="steam: .* answered other queries"):
        results._differences(QUESTIONS[0], rows, WORLD, [])


def test_a_forest_stands_on_its_axis_and_escapes_names() -> None:
    svg = ElementTree.fromstring(forest({"a < b": (1.0, 0.5, 2.0), "c": (-1.0, -2.0, 0.0)}, "difference"))
    at = [float(dot.attrib["cx"]) for dot in svg.findall("{*}circle")]
    zero = next(line for line in svg.findall("{*}line") if "stroke-dasharray" in line.attrib).attrib["x1"]
    assert float(zero) == sum(at) / 2, "as far from the one as from the other"
    wide = ElementTree.fromstring(forest({"few seeds": (0.1, -1.0, 1.0), "many": (0.2, 0.1, 0.3)}, "difference"))
    ends = [float(line.attrib["x2"]) for line in wide.findall("{*}line")]
    assert max(ends) <= float(wide.attrib["width"]), "cut at the end of the axis"
    assert "a < b" in [text.text for text in svg.findall("{*}text")]


def test_four_sizes_have_a_law(tmp_path: Path) -> None:
    def told(sizes: list[float]) -> str:
        own = [{"arm": CPREC, "seed": 0, "annealed": True, "group": "steam", "tokens": size} for size in sizes]
        return "\n".join(_loss_parts([line | {"loss": 1 + 50 * line["tokens"] ** -0.3} for line in own], tmp_path))

    assert "no fit is given" in told([1e6, 2e6, 4e6])
    assert "`L(D) = E + B D^-b` through these: E = 1 [1, 1], B = 50 [50, 50], b = 0.3 [0.3, 0.3]." in told(
        [1e6, 2e6, 4e6, 8e6]
    )
