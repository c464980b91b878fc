"""Stage: from two tables to a recommender and a sentence that says which one to use.

It looks at the log and the machine, chooses what fits them and the time, writes the choice as a recipe, and runs that.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from cprec.blend import blend
from cprec.config import find_config, to_yaml
from cprec.data.config import TableSource
from cprec.errors import ConfigError
from cprec.evaluate.config import EvaluateConfig
from cprec.evaluate.statistics import MIN_QUERIES
from cprec.files import write_whole
from cprec.fit.answer import answer, compare_saved, validated_by
from cprec.fit.config import FitConfig
from cprec.fit.look import Look, look_at
from cprec.fit.sizes import (
    BLEND_QUERIES,
    BLENDING,
    EFFORTS,
    ENOUGH,
    QUERIES,
    REACHED,
    TRAINING,
    TRYING,
    Choice,
    choose,
    num_queries,
    sizes_for,
)
from cprec.fit.timing import seconds_to_blend, seconds_to_try
from cprec.machine import num_cores
from cprec.progress import say
from cprec.provenance import CONFIG_FILE, read_resolved, save_resolved, to_dict
from cprec.rank.blend_file import BLEND
from cprec.rank.config import BlendConfig, RankConfig
from cprec.recipe import FINETUNED, Recipe
from cprec.run import run
from cprec.text.config import TINY, PrepareConfig
from cprec.text.prepare import prepare
from cprec.text.shards import read_shard_manifest
from cprec.train.config import FinetuneConfig
from cprec.train.finetune import finetune, timed

RECIPE, ANSWER = "recipe.yaml", "answer.txt"
"""Files in the output folder: what was chosen, and the sentence at the end."""
BASELINES = ("popularity", "titles", "transition graph", "transition graph (titles)", "ItemKNN", "EASE")
"""The simple recommenders to compare with."""
CHOSEN = frozenset(
    ("max_title_tokens", "tiny", "hidden_size", "num_hidden_layers", "num_attention_heads", "learning_rate")
    + ("num_train_epochs", "max_queries", "max_nodes", "parts")
)
"""Settings that stand in the recipe's file even where they are the defaults."""
LORA_RANK = 16
"""Of adapters, where there is no memory to train all weights of an open model."""


def fit(config: FitConfig) -> str:
    """Make and judge a recommender for one domain, within about `config.minutes`; returns the sentence at the end.

    Every choice is made when its turn comes, from what was timed and the time that is left, and stands in the recipe in
    the output folder; where that is there already, it is gone on with.

    Raises ConfigError where a column or the time is not enough to decide, or the output folder has other settings, and
    DataError for a log that cannot be read or is too small.
    """
    start = time.monotonic()

    def left() -> float:
        return start + 60 * config.minutes - time.monotonic()

    recipe = _earlier(config) or _chosen(config, left)
    folder = recipe.model_folder(config.domain, FINETUNED)
    assert recipe.finetune is not None and recipe.blend is not None
    finetune(replace(recipe.finetune, output_dir=folder))
    if not Path(folder, BLEND).is_file():
        recipe = _with_blend(config, recipe, folder, BLENDING * left())
    blend(replace(recipe.blend, model=folder))
    if not Path(recipe.evaluate.output_dir).exists():
        recipe = _with_queries(config, recipe, folder, TRYING * left())
    report = run(recipe)
    saved = partial(compare_saved, Path(recipe.evaluate.output_dir), report.domains[config.domain], config.seed)
    sentence = answer(report.domains[config.domain], saved, validated_by(Path(folder)))
    write_whole(Path(config.output_dir, ANSWER), sentence + "\n")
    print(f"\n{sentence}\n")
    say(f"took {(time.monotonic() - start) / 60:.1f} minutes. To try the model: cprec serve {folder}")
    return sentence


def _earlier(config: FitConfig) -> Recipe | None:
    """The recipe that the same settings have chosen before. Raises ConfigError where the folder has others."""
    folder = Path(config.output_dir)
    if not folder.exists() or not any(folder.iterdir()):
        return None
    if not (folder / CONFIG_FILE).is_file() or read_resolved(folder)["stage"] != FitConfig.__name__:
        raise ConfigError(f"{folder} exists and is not of `cprec fit`: choose another output folder or delete it")
    path = folder / RECIPE
    if not path.is_file():
        return None  # stopped before anything was chosen
    old, new = read_resolved(folder)["config"], to_dict(config)
    if changed := sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name)):
        raise ConfigError(
            f"{folder} was made with other settings of {', '.join(changed)} (as {changed[0]}={old.get(changed[0])}): "
            f"choose another output folder, or delete it"
        )
    say(f"{path} is there: going on with what it says")
    recipe: Recipe = find_config(str(path))
    return recipe


def _chosen(config: FitConfig, left: Callable[[], float]) -> Recipe:
    """Look at the log, prepare it, and choose the model and its passes."""
    source, look = look_at(config)
    save_resolved(config.output_dir, config)
    say(str(look))
    prepared = _prepare_config(config, source, look)
    prepare(prepared)
    tokens = int(read_shard_manifest(Path(prepared.output_dir, "examples", config.domain, "train"))["num_tokens"])
    plan, choice = _training(config, tokens, left)
    size = f"a model of width {choice.size.hidden_size} and {choice.size.num_hidden_layers} blocks"
    say(
        f"{left() / 60:.1f} minutes are left on {num_cores()} cores. Chosen: "
        f"{size if config.base == TINY else config.base}; {choice.passes:g} passes over {tokens:,} tokens at "
        f"{choice.tokens_per_second:,.0f} a second, about {choice.seconds / 60:.1f} minutes"
    )
    recipe = Recipe(
        name="fit",
        description=f"a recommender for {config.domain} in {config.minutes:g} minutes",
        prepare=prepared,
        finetune=plan,
        blend=BlendConfig(seed=config.seed),
        evaluate=EvaluateConfig(
            data=prepared.output_dir,
            output_dir=f"{config.output_dir}/report",
            baselines=BASELINES,
            seed=config.seed,
        ),
    )
    return _written(config, recipe)


def _with_blend(config: FitConfig, recipe: Recipe, folder: str, seconds: float) -> Recipe:
    """The recipe with the queries that the blend is chosen on, and with less effort where they would be few."""
    for max_nodes, pool in EFFORTS:
        plan = BlendConfig(model=folder, pool=pool, max_nodes=max_nodes, seed=config.seed)
        each = seconds_to_blend(plan, recipe.evaluate.data, config.domain, seconds)
        if seconds >= ENOUGH * each:
            break
    queries = num_queries(BLEND_QUERIES, seconds, each)
    say(f"the blend is chosen on up to {queries:,} customers, {each:.3g} seconds each")
    return _written(
        config,
        replace(
            recipe,
            blend=replace(plan, model="", max_queries=queries),
            evaluate=replace(recipe.evaluate, rank=RankConfig(max_nodes=max_nodes)),
        ),
    )


def _with_queries(config: FitConfig, recipe: Recipe, folder: str, seconds: float) -> Recipe:
    """The recipe with the number of queries to try the recommenders on."""
    each = seconds_to_try(recipe.evaluate, folder, config.domain, seconds)
    queries = num_queries(QUERIES, seconds, each)
    say(f"the recommenders are tried on up to {queries:,} customers, {each:.3g} seconds each")
    if queries < MIN_QUERIES:
        say(f"note: fewer than {MIN_QUERIES:,} customers prove nothing; more of them need more minutes")
    return _written(config, replace(recipe, evaluate=replace(recipe.evaluate, max_queries=queries)))


def _written(config: FitConfig, recipe: Recipe) -> Recipe:
    """The recipe, which stands in its file now."""
    path = Path(config.output_dir, RECIPE)
    head = f"# What `cprec fit` chose. Edit it, and run it again: cprec run {path}"
    write_whole(path, f"{head}\n{to_yaml(essential(recipe))}")
    return recipe


def essential(config: Any) -> Any:
    """What the file of a recipe says, as a mapping: the settings that are not the defaults, and those chosen here."""
    if isinstance(config, tuple):
        return [essential(entry) for entry in config]
    if not is_dataclass(config):
        return to_dict(config)
    told = {}
    for field in fields(config):
        value = getattr(config, field.name)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if value != default or field.name in CHOSEN:
            told[field.name] = essential(value)
    return told


# ---- the recipe ------------------------------------------------------------------------------------------------------


def _prepare_config(config: FitConfig, source: TableSource, look: Look) -> PrepareConfig:
    """Every item and event counts, and a history of one event is asked for too."""
    return PrepareConfig(
        output_dir=f"{config.output_dir}/data",
        tables=(source,),
        target_domains=(config.domain,),
        tokenizer=config.base,
        max_title_tokens=look.title_tokens,
        k_core=0,
        min_events=2,
        min_history=1,
        seed=config.seed,
    )


def _training(config: FitConfig, tokens: int, left: Callable[[], float]) -> tuple[FinetuneConfig, Choice]:
    """The model that fits the log and the time, by timing the sizes there are; an open model has one size."""
    is_tiny = config.base == TINY
    plan = FinetuneConfig(
        data=f"{config.output_dir}/data",
        output_dir=f"{config.output_dir}/models",
        domain=config.domain,
        model_name_or_path=config.base,
        learning_rate=2e-3 if is_tiny else 1e-4,
        max_length=256 if is_tiny else 512,
        train_batch_size=16,
        micro_batch_size=0 if is_tiny else 2,
        eval_steps=200,
        eval_tokens=50_000 if is_tiny else 5_000,
        general_text="none",
        seed=config.seed,
    )
    sizes = sizes_for(tokens) if is_tiny else [plan.tiny]
    told = [timed(replace(plan, tiny=size)) for size in sizes]
    if not is_tiny and told[0].memory_bytes > told[0].free_memory:
        plan = replace(plan, lora_rank=LORA_RANK)
        told = [timed(plan)]
    rates = [(size, REACHED * one.tokens_per_second) for size, one in zip(sizes, told, strict=True)]
    choice = choose(rates, tokens, TRAINING * left())
    return replace(plan, tiny=choice.size, num_train_epochs=choice.passes), choice
