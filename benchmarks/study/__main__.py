"""Run the study of CPRec's claims, or a part of it, and write its page.

    python -m benchmarks.study DATA [--arms A,B] [--seeds 0,1,2] [--budget-hours 6.5] [--dry-run]
    python -m benchmarks.study --small

`DATA` holds a folder for each domain (`worlds.py`). Jobs are done in an order in which a study that is stopped at any
moment has answered something, and finished ones are reused: the same command goes on. At the end the results of all
jobs are gathered into Parquet files, and the page is written from these alone; `--budget-hours 0` does only that.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from benchmarks.study.arms import ARMS, Arm
from benchmarks.study.costs import Cost, costs_of
from benchmarks.study.jobs import Job, do, is_done, jobs_of
from benchmarks.study.page import write_page
from benchmarks.study.results import MEANS, gather
from benchmarks.study.worlds import World, small, tiny
from cprec.progress import say
from cprec.text.prepare import prepare

SEEDS = (0, 1, 2)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    asked = parser.parse_args(arguments)
    if asked.small == bool(asked.data):
        parser.error("give the folder DATA, or --small")
    output = asked.output or ("runs/study-small" if asked.small else "runs/study")
    docs = asked.docs or Path(output, "docs")
    world = small(output) if asked.small else tiny(asked.data, output)
    seeds = [int(seed) for seed in asked.seeds.split(",")]
    jobs = jobs_of(world, _arms(parser, asked.arms), seeds)
    folders = {recipe.prepare.output_dir: recipe.prepare for recipe in map(world.recipe_for, world.targets)}
    for config in folders.values():
        prepare(config)
    costs = list(costs_of(world, jobs))
    tell_costs(jobs, costs, asked.tokens_per_second, asked.budget_hours)
    if asked.dry_run:
        return
    if (docs / "study" / MEANS).is_file() and not any(is_done(world, job) for job in jobs_of(world, ARMS, SEEDS)):
        parser.error(
            f"{docs / 'study'} holds results, and none of them is from {output}: give the --output that they are from, "
            "or another --docs"
        )
    try:
        run(world, jobs, costs, asked.budget_hours, asked.tokens_per_second)
    finally:  # an interrupted study has its page, too
        gather(world, docs / "study", sorted({*SEEDS, *seeds}))
        write_page(docs)
        say(f"wrote {docs / 'study.md'}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = "; ".join(arm.name for arm in ARMS).replace("%", "%%")
    parser.add_argument("data", nargs="?", type=Path, metavar="DATA")
    parser.add_argument("--small", action="store_true", help="on a generated world, in minutes; no DATA")
    parser.add_argument("--output", default="", help="models and rankings; runs/study, or runs/study-small")
    parser.add_argument("--docs", type=Path, help="study.md and study/; OUTPUT/docs (docs: the published ones)")
    parser.add_argument("--arms", default="", help=f"names, with commas; all unless given: {names}")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--budget-hours", type=float, default=6.5)
    parser.add_argument("--tokens-per-second", type=float, default=8000.0, help="of training, to count hours")
    parser.add_argument("--dry-run", action="store_true", help="say what everything costs; train nothing")
    return parser


def _arms(parser: argparse.ArgumentParser, names: str) -> list[Arm]:
    """The arms of these names, in their order; all where none is named."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if unknown := [name for name in wanted if name not in {arm.name for arm in ARMS}]:
        parser.error(f"--arms: there is no {unknown[0]!r}; there are {'; '.join(arm.name for arm in ARMS)}")
    return [arm for arm in ARMS if arm.name in wanted or not wanted]


def tell_costs(jobs: Sequence[Job], costs: Sequence[Cost], rate: float, budget: float) -> None:
    """Print what each arm costs with each seed, in the order of the jobs, and where the budget ends."""
    spent = 0.0
    print(f"{'arm':26}{'seed':>5}{'jobs':>5}{'pre-training':>14}{'fine-tuning':>13}{'hours':>8}{'in all':>8}")
    together = groupby(zip(jobs, costs, strict=True), key=lambda pair: (pair[0].arm.name, pair[0].seed))
    for (name, seed), pairs in together:
        own = [cost for _, cost in pairs]
        hours = sum(cost.hours(rate) for cost in own)
        spent += hours
        tokens = [sum(getattr(cost, field) for cost in own) for field in ("pretraining", "finetuning")]
        over = "  over the budget" if spent > budget else ""
        print(f"{name:26}{seed:5}{len(own):5}{tokens[0]:14,}{tokens[1]:13,}{hours:8.2f}{spent:8.2f}{over}")
    print(f"at {rate:,.0f} tokens/s of training; the budget is {budget:g} hours")


def run(world: World, jobs: Sequence[Job], costs: Sequence[Cost], budget: float, rate: float) -> None:
    """Do the jobs one after the other, as long as the next fits into the budget."""
    start = time.monotonic()
    for number, (job, cost) in enumerate(zip(jobs, costs, strict=True), start=1):
        if is_done(world, job):
            continue
        if (time.monotonic() - start) / 3600 + cost.hours(rate) > budget:
            say(f"the budget of {budget:g} hours is used up before {job}: the same command goes on")
            break
        say(f"[{number}/{len(jobs)}] {job}")
        do(world, job)


if __name__ == "__main__":
    main()
