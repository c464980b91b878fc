"""Hours of training turned into passes over the data, by a timed micro-batch. They are chosen once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from cprec.errors import ConfigError
from cprec.files import write_whole
from cprec.fit.sizes import REACHED
from cprec.progress import say
from cprec.recipe import Recipe
from cprec.text.shards import read_shard_manifest
from cprec.train.config import FinetuneConfig
from cprec.train.finetune import timed, tokens_of_pass

CHOSEN = "budget.json"
"""In the folder of a run: what was asked for, and the passes that the hours became."""
PRETRAINING = 0.5
"""Share of the hours that pre-training has, where there is any. All models that are fine-tuned divide the rest."""


def within_hours(recipe: Recipe) -> Recipe:
    """The recipe with as many passes as fit into its hours; a fine-tuned model makes the same number in each domain.

    The data are prepared. What was chosen before in the folder of the run stays: a busier machine goes on with the same
    passes. Raises ConfigError where it was chosen for other hours, domains or models.
    """
    assert recipe.finetune is not None
    path, asked = Path(recipe.evaluate.output_dir, CHOSEN), _asked(recipe)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"asked": asked, **_choose(recipe, recipe.finetune)}, indent=1) + "\n")
    chosen = json.loads(path.read_text(encoding="utf-8"))
    if changed := [
        f"{name} was {was}, now {asked[name]}" for name, was in chosen["asked"].items() if was != asked[name]
    ]:
        raise ConfigError(f"{path} was chosen for other settings ({'; '.join(changed)}): choose another output_dir")
    pretraining, finetuning = chosen["pretrain.num_train_epochs"], chosen["finetune.num_train_epochs"]
    pretrain = recipe.pretrain and replace(recipe.pretrain, num_train_epochs=pretraining)
    before = f"{pretraining:.3g} passes of pre-training and " if pretrain else ""
    say(
        f"{path}: {recipe.hours:g} hours at {chosen['tokens_per_second']:,.0f} tokens/s are {before}{finetuning:.3g} "
        "passes of fine-tuning for each model"
    )
    return replace(recipe, pretrain=pretrain, finetune=replace(recipe.finetune, num_train_epochs=finetuning))


def _asked(recipe: Recipe) -> dict[str, Any]:
    """What the passes depend on, beside the data and the machine."""
    models = 2 if recipe.pretrain else 1
    domains = list(recipe.prepare.target_domains)
    return {"hours": recipe.hours, "domains": domains, "models of a domain": models * len(recipe.evaluate.seeds)}


def _choose(recipe: Recipe, finetune: FinetuneConfig) -> dict[str, float]:
    """The rate and the passes of `budget.json`."""
    each = [replace(finetune, domain=domain, num_train_epochs=1) for domain in recipe.prepare.target_domains]
    finetuning = _asked(recipe)["models of a domain"] * sum(map(tokens_of_pass, each))
    pretraining = read_shard_manifest(Path(finetune.data, "shards", "train"))["num_tokens"] if recipe.pretrain else 0
    rate = REACHED * timed(each[0]).tokens_per_second
    tokens, share = rate * recipe.hours * 3600, PRETRAINING if pretraining else 0
    return {
        "tokens_per_second": rate,
        "pretrain.num_train_epochs": share * tokens / pretraining if pretraining else 0,
        "finetune.num_train_epochs": (1 - share) * tokens / finetuning,
    }
