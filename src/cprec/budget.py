"""Hours of training turned into passes over the data, by a timed micro-batch. They are chosen once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cprec.errors import ConfigError
from cprec.files import write_whole
from cprec.fit.sizes import MOST_PASSES, REACHED
from cprec.progress import say
from cprec.provenance import to_dict
from cprec.recipe import Recipe
from cprec.text.shards import read_shard_manifest
from cprec.train.config import FinetuneConfig
from cprec.train.finetune import timed, tokens_of_pass

CHOSEN = "budget.json"
"""In the folder of a run: what was asked for, and the passes that the hours became."""
PRETRAINING = 0.5
"""Share of the hours that pre-training has, where there is any. All models that are fine-tuned divide the rest."""


def within_hours(recipe: Recipe) -> Recipe:
    """The recipe with as many passes as fit into its hours, at most `MOST_PASSES`, in place of those of its stages; a
    fine-tuned model makes the same number in each domain.

    The data are prepared. What was chosen before in the folder of the run stays: a busier machine goes on with the same
    passes. Raises ConfigError where it was chosen for other hours, data, models or settings, and where the hours are
    too few to learn anything.
    """
    assert recipe.finetune is not None
    path, asked = Path(recipe.evaluate.output_dir, CHOSEN), _asked(recipe, recipe.finetune)
    if not path.is_file():
        chosen = {"asked": asked, **_choose(recipe, recipe.finetune, asked)}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(chosen, indent=1) + "\n")
    chosen = json.loads(path.read_text(encoding="utf-8"))
    before = chosen.get("asked", {})
    if changed := [
        f"{name} was {before.get(name)}, now {now}" for name, now in asked.items() if before.get(name) != now
    ]:
        raise ConfigError(
            f"{path} was chosen for something else ({'; '.join(changed)}): choose another output_dir, or delete the "
            "file, and the models that were trained by it"
        )
    pretraining, finetuning = chosen["pretrain.num_train_epochs"], chosen["finetune.num_train_epochs"]
    pretrain = recipe.pretrain and replace(recipe.pretrain, num_train_epochs=pretraining)
    first = f"{pretraining:.3g} passes of pre-training and " if pretrain else ""
    most = f", {MOST_PASSES:g} at most" if MOST_PASSES in (pretraining, finetuning) else ""
    say(
        f"{path}: {recipe.hours:g} hours at {chosen['tokens_per_second']:,.0f} tokens/s are {first}{finetuning:.3g} "
        f"passes of fine-tuning for each model{most}"
    )
    return replace(recipe, pretrain=pretrain, finetune=replace(recipe.finetune, num_train_epochs=finetuning))


def _asked(recipe: Recipe, finetune: FinetuneConfig) -> dict[str, Any]:
    """What the passes depend on, beside the machine."""
    domains, shards = recipe.prepare.target_domains, Path(finetune.data, "shards", "train")
    settings = {name: value for name, value in to_dict(finetune).items() if name not in ("num_train_epochs", "seed")}
    return {
        "hours": recipe.hours,
        "models of a domain": (2 if recipe.pretrain else 1) * len(recipe.evaluate.seeds),
        "tokens of a pass": {domain: tokens_of_pass(replace(finetune, domain=domain)) for domain in domains},
        "tokens to pre-train on": read_shard_manifest(shards)["num_tokens"] if recipe.pretrain else 0,
        "settings": settings,
    }


def _choose(recipe: Recipe, finetune: FinetuneConfig, asked: Mapping[str, Any]) -> dict[str, float]:
    """The rate and the passes of `budget.json`."""
    pretraining, of_pass = asked["tokens to pre-train on"], asked["tokens of a pass"]
    first = replace(finetune, domain=recipe.prepare.target_domains[0], num_train_epochs=1)
    rate = REACHED * timed(first).tokens_per_second
    tokens, share = rate * recipe.hours * 3600, PRETRAINING if pretraining else 0
    passes = (1 - share) * tokens / (asked["models of a domain"] * sum(of_pass.values()))
    if passes * min(of_pass.values()) < 1:
        raise ConfigError(
            f"hours={recipe.hours:g} are {tokens:,.0f} tokens at {rate:,.0f} a second: too few to train each model, of "
            f"which a pass has {min(of_pass.values()):,} tokens and more; give more hours, or fewer domains"
        )
    return {
        "tokens_per_second": rate,
        "pretrain.num_train_epochs": min(MOST_PASSES, share * tokens / pretraining) if pretraining else 0,
        "finetune.num_train_epochs": min(MOST_PASSES, passes),
    }
