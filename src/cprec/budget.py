"""Hours of training turned into passes over the data, by a timed micro-batch, less what item heads take. They are
chosen once."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cprec.data.dataset import read_split
from cprec.errors import ConfigError, Unsuitable
from cprec.files import write_whole
from cprec.fit.sizes import MOST_PASSES, REACHED
from cprec.item_head import seconds_to_train
from cprec.pretrain import seconds_of_head
from cprec.progress import say
from cprec.provenance import to_dict
from cprec.recipe import Recipe
from cprec.text.shards import read_shard_manifest
from cprec.train.config import FinetuneConfig
from cprec.train.finetune import timed, tokens_of_pass

CHOSEN = "budget.json"
"""In the folder of a run: what was asked for, and the passes that the hours became."""
PRETRAINING = 0.5
"""Share of the hours, less those of item heads, that pre-training has, where there is any. All models that are
fine-tuned divide the rest."""


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
    heads = chosen["seconds of item heads"] / 60
    say(
        f"{path}: {recipe.hours:g} hours at {chosen['tokens_per_second']:,.0f} tokens/s are {first}{finetuning:.3g} "
        f"passes of fine-tuning for each model{most}"
        + (f"; item heads take about {heads:.1f} minutes" if heads else "")
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
        "trainings of a head": 2 if recipe.evaluate.refit else 1,
        "item head of pre-training": bool(recipe.pretrain and recipe.pretrain.item_head),
        "settings": settings,
    }


def _choose(recipe: Recipe, finetune: FinetuneConfig, asked: Mapping[str, Any]) -> dict[str, float]:
    """The rate and the passes of `budget.json`."""
    pretraining, of_pass = asked["tokens to pre-train on"], asked["tokens of a pass"]
    first = replace(finetune, domain=recipe.prepare.target_domains[0], num_train_epochs=1)
    rate = REACHED * timed(first).tokens_per_second
    heads = _seconds_of_heads(recipe, finetune, asked["models of a domain"] * asked["trainings of a head"]) / REACHED
    tokens, share = rate * max(0, recipe.hours * 3600 - heads), PRETRAINING if pretraining else 0
    passes = (1 - share) * tokens / (asked["models of a domain"] * sum(of_pass.values()))
    if passes * min(of_pass.values()) < 1:
        raise ConfigError(
            f"hours={recipe.hours:g}, less {heads / 3600:.2g} of item heads, are {tokens:,.0f} tokens at {rate:,.0f} a "
            f"second: too few to train each model, of which a pass has {min(of_pass.values()):,} tokens and more; give "
            "more hours, or fewer domains"
        )
    return {
        "tokens_per_second": rate,
        "seconds of item heads": heads,
        "pretrain.num_train_epochs": min(MOST_PASSES, share * tokens / pretraining) if pretraining else 0,
        "finetune.num_train_epochs": min(MOST_PASSES, passes),
    }


def _seconds_of_heads(recipe: Recipe, finetune: FinetuneConfig, heads: int) -> float:
    """About how long the item heads take to train, so many of each domain and that of pre-training."""
    seconds = 0.0
    if finetune.item_head:
        split = read_split(finetune.data)
        of_domains = [_or_none(seconds_to_train, split, name, finetune.seed) for name in recipe.prepare.target_domains]
        seconds += heads * finetune.head_networks * sum(of_domains)
    if recipe.pretrain and recipe.pretrain.item_head:
        seconds += _or_none(seconds_of_head, recipe.pretrain)
    return seconds


def _or_none(seconds: Callable[..., float], *of: Any) -> float:
    """The seconds, or 0 where there is nothing for a head to learn from, so that training makes none."""
    try:
        return seconds(*of)
    except Unsuitable:
        return 0.0
