"""Arms: any recipe with one thing changed, to learn what that thing gives. `cprec run demo arm=no_mixed`.

An arm has an output folder of its own inside the recipe's; data are shared unless the arm changes them. All arms train
on as many tokens as the recipe, but for those that say otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from cprec.errors import ConfigError
from cprec.recipe import Recipe


def _stage(recipe: Recipe, name: str) -> Any:
    """A training stage of the recipe. Raises ConfigError where it has none, so that no arm can change it."""
    stage = getattr(recipe, name)
    if stage is None:
        raise ConfigError(f"the recipe {recipe.name} has no stage {name}, so it has no arms")
    return stage


def _pretrain(**changes: Any) -> Callable[[Recipe], Recipe]:
    return lambda recipe: replace(recipe, pretrain=replace(_stage(recipe, "pretrain"), **changes))


def _mixture(**changes: Any) -> Callable[[Recipe], Recipe]:
    return lambda recipe: _pretrain(mixture=replace(_stage(recipe, "pretrain").mixture, **changes))(recipe)


def _annealing(**changes: Any) -> Callable[[Recipe], Recipe]:
    return lambda recipe: _pretrain(anneal_mixture=replace(_stage(recipe, "pretrain").mixture, **changes))(recipe)


def _tokens(share: float) -> Callable[[Recipe], Recipe]:
    return lambda recipe: _pretrain(num_train_epochs=share * _stage(recipe, "pretrain").num_train_epochs)(recipe)


def _prepare(**changes: Any) -> Callable[[Recipe], Recipe]:
    return lambda recipe: replace(recipe, prepare=replace(recipe.prepare, **changes))


ARMS: dict[str, tuple[str, Callable[[Recipe], Recipe]]] = {
    "no_mixed": ("domain-specific sequences only", _mixture(mixed_share=0.0)),
    "no_specific": ("all-domain mixed sequences only", _mixture(mixed_share=1.0)),
    "no_annealing": ("warm-up and stable to the end", _pretrain(lr_scheduler_type="constant_with_warmup")),
    "no_warmup": ("the peak from the first step", _pretrain(warmup_steps=0)),
    "cosine": ("a cosine from the end of the warm-up", _pretrain(lr_scheduler_type="cosine")),
    "linear": ("annealing in a straight line", _pretrain(anneal_shape="linear")),
    "items_only": ("loss on titles, without the template", _pretrain(loss="items_only")),
    "mixed_late": (
        "mixed sequences a fifth of the stable phase, four fifths of annealing",
        lambda recipe: _mixture(mixed_share=0.2)(_annealing(mixed_share=0.8)(recipe)),
    ),
    "sft_late": ("a tenth of annealing from fine-tuning examples", _annealing(examples_share=0.1)),
    "tokens_10": ("a tenth of the tokens", _tokens(0.1)),
    "tokens_30": ("three tenths of the tokens", _tokens(0.3)),
    "interleaved": ("mixed sequences interleaved, not by time", _prepare(mixed_order="interleave")),
    "title_brand_category": (
        "items as title, brand and categories",
        _prepare(item_fields=("title", "brand", "categories")),
    ),
    "shuffled": ("events of a document in any order", _prepare(document_order="shuffled")),
}
"""Name -> what it is in a few words, and the change."""


def with_arm(recipe: Recipe, name: str) -> Recipe:
    """The recipe with the change of an arm, and folders of its own.

    Raises ConfigError where the recipe has hours: they would choose other passes for each arm.
    """
    if recipe.hours:
        raise ConfigError(
            f"arm={name} and hours={recipe.hours:g}: arms are compared after equal passes, which hours choose for each "
            "folder anew. Leave one of them out; passes are pretrain.num_train_epochs and finetune.num_train_epochs"
        )
    changed = ARMS[name][1](recipe)
    root = PurePosixPath(recipe.evaluate.output_dir) / "arms" / name
    data = recipe.prepare.output_dir if changed.prepare == recipe.prepare else str(root / "data")
    return replace(
        changed,
        name=f"{recipe.name}, {name}",
        description=f"{recipe.description} Arm {name}: {ARMS[name][0]}.",
        prepare=replace(changed.prepare, output_dir=data),
        pretrain=replace(_stage(changed, "pretrain"), data=data, output_dir=str(root / "pretrain")),
        finetune=replace(_stage(changed, "finetune"), data=data, output_dir=str(root / "finetune")),
        evaluate=replace(changed.evaluate, data=data, output_dir=str(root)),
    )
