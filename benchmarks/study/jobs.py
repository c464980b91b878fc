"""The jobs of the study in their order, what each costs, and how it is done: every stage is the package's own.

A job is one arm after one regime of fine-tuning, on one domain with one seed. What jobs share (data, a pre-training) is
made by the first that needs it and reused by the others, also after an interruption.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from benchmarks.study.arms import ALL, ARMS, REFERENCE, ZERO, Arm
from benchmarks.study.worlds import World
from cprec.blend import blend
from cprec.data.dataset import read_split
from cprec.data.splits import Split
from cprec.entrants import baseline_entrants, model_entrants
from cprec.evaluate.evaluate import evaluate
from cprec.evaluate.rankings import slug
from cprec.finetune import finetune
from cprec.rank.config import RankConfig
from cprec.recipe import Recipe
from cprec.recipes.arms import with_arm
from cprec.text.documents import WHOLE
from cprec.text.prepare import prepare
from cprec.text.shards import read_shard_manifest
from cprec.train.config import FinetuneConfig, PretrainConfig
from cprec.train.pretrain import fork, pretrain

ANNEALING = 0.2
"""The share of a pre-training's tokens in which its learning rate falls."""
BY_NAME = {arm.name: arm for arm in ARMS}
ANOTHER_ORDER = 1000
"""Added to the seed of a run that goes on from a stable checkpoint: it reads the documents in another order."""


@dataclass(frozen=True)
class Job:
    """An arm after a regime of fine-tuning, on a domain, with a seed."""

    arm: Arm
    regime: str
    domain: str
    seed: int

    def __str__(self) -> str:
        return ", ".join(part for part in (self.arm.name, self.regime, self.domain, f"seed {self.seed}") if part)


def jobs_of(world: World, arms: Sequence[Arm], seeds: Sequence[int]) -> list[Job]:
    """All jobs, so ordered that a study which is stopped early has answered something.

    First come the arms of the first questions in the unseen domains with every seed (few-shot and random ones in part),
    then the rest with the first seed, then the rest of all.
    Rivals have the seed 0 alone.
    """

    def urgency(job: Job) -> tuple[bool, bool, int]:
        repeated = job.seed != seeds[0]
        known = job.arm.way == "random" and job.regime == ZERO  # at the level of chance, whatever the seed
        further = job.domain not in world.main and job.regime not in (ZERO, ALL)
        late = not job.arm.first or job.domain in world.left_out or (repeated and (known or further))
        return late and repeated, late, seeds.index(job.seed)

    jobs = [
        Job(arm, regime, domain, seed)
        for seed in seeds
        for arm in arms
        if not (arm.way == "rivals" and seed)
        for regime in arm.regimes
        for domain in (world.targets if arm.everywhere else world.main)
    ]
    return sorted(jobs, key=urgency)


# ---- recipes of jobs -------------------------------------------------------------------------------------------------


def recipe_of(world: World, job: Job) -> Recipe:
    """The recipe of a job: its data, what its arm changes, and folders of its own."""
    recipe = _changed(world, job)
    root = world.recipe_for(job.domain).evaluate.output_dir
    model = f"{root}/models/{slug(job.arm.models_of or job.arm.name)}/seed{job.seed}"
    tuned = f"{model}/{job.domain}-{slug(job.regime)}"
    return replace(
        recipe,
        pretrain=replace(recipe.pretrain, output_dir=f"{model}/pretrain", seed=job.seed),
        finetune=replace(_few(world, job, recipe.finetune), output_dir=tuned, domain=job.domain, seed=job.seed),
        evaluate=replace(
            recipe.evaluate,
            output_dir=f"{root}/results/{slug(job.arm.name)}/{slug(job.regime) or 'as-it-is'}/seed{job.seed}",
            baselines=job.arm.baselines,
            seeds=(job.seed,),
            rank=RankConfig(mode="beam", beam_width=20) if job.arm.beam else recipe.evaluate.rank,
        ),
    )


def _changed(world: World, job: Job) -> Recipe:
    """The recipe of a job's domain with what its arm changes in data and mixture."""
    recipe = world.recipe_for(job.domain)
    if job.arm.recipe_arm:
        return with_arm(recipe, job.arm.recipe_arm)
    if not job.arm.domains:
        return recipe
    kept = world.subsets[job.arm.domains]
    weights = {name: 0.0 for name in recipe.prepare.pretrain_domains if name not in kept}
    alone = replace(recipe.pretrain.mixture, mixed_share=0.0, domain_weights=weights)
    return replace(recipe, pretrain=replace(recipe.pretrain, mixture=alone))


def _few(world: World, job: Job, tuning: FinetuneConfig) -> FinetuneConfig:
    """The fine-tuning of a recipe on as few examples as the regime says, or none."""
    if job.regime == ZERO:
        return replace(tuning, num_train_epochs=0)
    if job.regime in (ALL, ""):
        return tuning
    number = int(job.regime)
    return replace(
        tuning, documents="examples", max_documents=number, num_train_epochs=world.few[number], train_batch_size=4
    )


def tuning_of(world: World, job: Job) -> FinetuneConfig:
    """The fine-tuning of a job, with as many passes over all events as it may read."""
    tuning = recipe_of(world, job).finetune
    if job.regime != ALL:
        return tuning
    most = world.tuning_tokens / num_tokens(examples_of(world, job.domain) / WHOLE)
    return replace(tuning, num_train_epochs=min(tuning.num_train_epochs, most))


def examples_of(world: World, domain: str) -> Path:
    """The fine-tuning examples of a domain, which are the same in the data of every arm."""
    return Path(world.recipe_for(domain).prepare.output_dir, "examples", domain)


@dataclass(frozen=True)
class Pretraining:
    """A pre-training, and the run from whose stable checkpoint it starts."""

    config: PretrainConfig
    way: str
    planned: int
    """Tokens of its plan; a branch reads only those of its annealing itself."""
    base: str = ""

    @property
    def tokens(self) -> int:
        """Tokens that it reads itself."""
        return round(ANNEALING * self.planned) if self.way == "branch" else self.planned

    def run(self) -> str:
        """Pre-train, or reuse or resume; returns the model folder."""
        data = Path(self.config.data, "shards", "train")
        config = replace(self.config, num_train_epochs=self.planned / num_tokens(data))
        if self.way == "branch":
            return str(fork(replace(config, branch_length=ANNEALING), stable_of(self.base)))
        if self.way == "longer":
            config = replace(config, continue_from=str(stable_of(self.base)))
        return str(pretrain(config))


def pretrainings(world: World, job: Job) -> list[Pretraining]:
    """What must be pre-trained for a job, in order; the last is the model that it starts from."""
    arm, recipe = job.arm, recipe_of(world, job)
    if arm.way in ("random", "rivals"):
        return []
    if job.domain in world.left_out:
        return [Pretraining(recipe.pretrain, "run", world.left_out_tokens)]
    tokens = round(arm.share * world.tokens)
    if arm.way == "run":
        return [Pretraining(recipe.pretrain, "run", tokens)]
    base = pretrainings(world, replace(job, arm=BY_NAME[REFERENCE]))[-1]
    shared = base.config.output_dir
    if arm.way == "branch":  # the reference, but for an annealing that stays at the peak
        return [base, Pretraining(replace(recipe.pretrain, min_lr_ratio=1.0), "branch", tokens, shared)]
    rest = tokens - round((1 - ANNEALING) * base.tokens)
    longer = replace(recipe.pretrain, seed=job.seed + ANOTHER_ORDER, anneal_steps=ANNEALING * tokens / rest)
    return [base, Pretraining(longer, "longer", rest, shared)]


def stable_of(run: str) -> Path:
    """The checkpoint at the end of the stable phase of a run."""
    return next(Path(run).glob("stable-*"))


@cache
def num_tokens(shards: Path) -> int:
    """Tokens in a shard folder."""
    return int(read_shard_manifest(shards)["num_tokens"])


@cache
def num_documents(shards: Path) -> int:
    """Documents in a shard folder."""
    return int(read_shard_manifest(shards)["num_documents"])


# ---- doing -----------------------------------------------------------------------------------------------------------


@cache
def split_of(data: str) -> Split:
    """The split of a data folder; reading it takes seconds, and jobs share it."""
    return read_split(data)


def do(world: World, job: Job) -> None:
    """Everything that a job needs, and its evaluation."""
    recipe = recipe_of(world, job)
    prepare(recipe.prepare)
    config, split = recipe.evaluate, split_of(recipe.evaluate.data)
    if job.arm.way == "rivals":
        evaluate(config, split, job.domain, baseline_entrants(config, split, job.domain))
        return
    start = [each.run() for each in pretrainings(world, job)]
    model = start[-1] if start else recipe.finetune.model_name_or_path
    if job.regime != ZERO or not start:
        model = str(finetune(replace(tuning_of(world, job), model_name_or_path=model)))
    if job.arm.blend:
        blend(replace(recipe.blend, model=model))
    name = job.arm.models_of if job.arm.blend else job.arm.name
    evaluate(config, split, job.domain, model_entrants(config, job.domain, {name: model}))


def is_done(world: World, job: Job) -> bool:
    """Whether a job has its numbers."""
    return Path(recipe_of(world, job).evaluate.output_dir, job.domain, "protocol.json").is_file()
