"""Hours of training turned into passes over the data, by a timed micro-batch. They are chosen once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from cprec.errors import ConfigError
from cprec.files import write_whole
from cprec.fit.sizes import REACHED
from cprec.progress import say
from cprec.recipe import Recipe
from cprec.text.shards import read_shard_manifest
from cprec.train.config import FinetuneConfig
from cprec.train.finetune import timed, tokens_of_pass

CHOSEN = "budget.json"
"""In the folder of a run: the hours that were asked for, and the passes that they became."""
PRETRAINING = 0.5
"""Share of the hours that pre-training has, where there is any. All models that are fine-tuned divide the rest."""


def within_hours(recipe: Recipe) -> Recipe:
    """The recipe with as many passes as fit into its hours; a fine-tuned model makes the same number in each domain.

    The data are prepared. What was chosen before in the folder of the run stays: a busier machine goes on with the same
    passes. Raises ConfigError where it was chosen for other hours.
    """
    assert recipe.finetune is not None
    path = Path(recipe.evaluate.output_dir, CHOSEN)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(_choose(recipe, recipe.finetune), indent=1) + "\n")
    chosen = json.loads(path.read_text(encoding="utf-8"))
    if chosen["hours"] != recipe.hours:
        raise ConfigError(
            f"hours={recipe.hours:g}, but {path} has what was chosen for hours={chosen['hours']:g}: go on with those, "
            "or give another output_dir"
        )
    pretraining, finetuning = chosen["pretrain.num_train_epochs"], chosen["finetune.num_train_epochs"]
    pretrain = recipe.pretrain and replace(recipe.pretrain, num_train_epochs=pretraining)
    before = f"{pretraining:.3g} passes of pre-training and " if pretrain else ""
    say(
        f"{path}: {recipe.hours:g} hours at {chosen['tokens_per_second']:,.0f} tokens/s are {before}{finetuning:.3g} "
        "passes of fine-tuning for each model"
    )
    return replace(recipe, pretrain=pretrain, finetune=replace(recipe.finetune, num_train_epochs=finetuning))


def _choose(recipe: Recipe, finetune: FinetuneConfig) -> dict[str, float]:
    """What `budget.json` holds."""
    each = [replace(finetune, domain=domain, num_train_epochs=1) for domain in recipe.prepare.target_domains]
    models = len(recipe.evaluate.seeds) * (2 if recipe.pretrain else 1)
    finetuning = models * sum(map(tokens_of_pass, each))
    pretraining = read_shard_manifest(Path(finetune.data, "shards", "train"))["num_tokens"] if recipe.pretrain else 0
    rate = REACHED * timed(each[0]).tokens_per_second
    tokens, share = rate * recipe.hours * 3600, PRETRAINING if pretraining else 0
    return {
        "hours": recipe.hours,
        "tokens_per_second": rate,
        "pretrain.num_train_epochs": share * tokens / pretraining if pretraining else 0,
        "finetune.num_train_epochs": (1 - share) * tokens / finetuning,
    }
