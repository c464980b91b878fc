"""What the jobs of the study cost, counted before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.study.arms import ALL, SASREC, ZERO
from benchmarks.study.jobs import (
    Job,
    examples_of,
    is_done,
    num_documents,
    num_tokens,
    pretrainings,
    recipe_of,
    tuning_of,
)
from benchmarks.study.worlds import World
from cprec.text.documents import WHOLE
from cprec.train.folder import read_done

SECONDS_PER_QUERY = 0.06
"""Exact lists of the full catalogue and two sets of candidates, by the tiny decoder on one core."""
UNLEARNT_IS_SLOWER = 2
"""A model that has learnt nearly nothing reads so many times more prefixes of titles."""
SECONDS_PER_EVENT = {"rivals": 2e-4, SASREC: 0.011}
"""Training and ranking of rivals, for each training event of the domain."""
SECONDS_PER_BLEND = 240
"""Choosing the weights of a blend on validation queries, and ranking with it."""
SECONDS_PER_DATA = 120
"""Preparing data that are an arm's own."""
SECONDS_PER_JOB = 5
"""Reading and writing."""


@dataclass(frozen=True)
class Cost:
    """What a job adds to what the jobs before it have made."""

    pretraining: int
    """Tokens."""
    finetuning: int
    """Tokens."""
    other_seconds: float
    """Ranking, and rivals."""

    def hours(self, tokens_per_second: float) -> float:
        """Hours of one core."""
        return ((self.pretraining + self.finetuning) / tokens_per_second + self.other_seconds) / 3600


def costs_of(world: World, jobs: Sequence[Job], *, fresh: bool = False) -> Iterator[Cost]:
    """The cost of each job in turn; what an earlier one makes costs nothing, nor does what is finished, unless the
    costs are those of a `fresh` start. The data of the world must be there, those of arms need not."""
    made: set[str] = set()

    def there(folder: str) -> bool:
        return folder in made or not (fresh or read_done(folder) is None)

    for job in jobs:
        if not fresh and is_done(world, job):
            yield Cost(0, 0, 0)
            continue
        recipe = recipe_of(world, job)
        needed = [each for each in pretrainings(world, job) if not there(each.config.output_dir)]
        tuned = 0 if job.regime in (ZERO, "") or there(recipe.finetune.output_dir) else tuning_tokens(world, job)
        other = _other_seconds(world, job)
        if not (there(recipe.prepare.output_dir) or Path(recipe.prepare.output_dir).is_dir()):
            other += SECONDS_PER_DATA
        made |= {each.config.output_dir for each in needed} | {recipe.finetune.output_dir, recipe.prepare.output_dir}
        yield Cost(sum(each.tokens for each in needed), tuned, other)


def tuning_tokens(world: World, job: Job) -> int:
    """Tokens that fine-tuning reads: passes over the users' documents, or over some examples of mean length."""
    tuning, folder = tuning_of(world, job), examples_of(world, job.domain)
    if job.regime == ALL:
        return round(tuning.num_train_epochs * num_tokens(folder / WHOLE))
    number = num_documents(folder / "train")
    mean = num_tokens(folder / "train") / max(1, number)
    return round(tuning.num_train_epochs * min(tuning.max_documents, number) * mean)


def _other_seconds(world: World, job: Job) -> float:
    if job.arm.way == "rivals":
        events = num_documents(examples_of(world, job.domain) / "train")
        return SECONDS_PER_JOB + SECONDS_PER_EVENT[job.arm.name] * events
    slower = UNLEARNT_IS_SLOWER if job.arm.way == "random" and job.regime != ALL else 1
    blending = SECONDS_PER_BLEND if job.arm.blend else 0
    return SECONDS_PER_JOB + blending + slower * SECONDS_PER_QUERY * world.recipe.evaluate.max_queries
