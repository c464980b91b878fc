"""Stage: from two tables to a recommender and a sentence that says which one to use.

It looks at the log and the machine, chooses what fits them and the time, writes the choice as a recipe, and runs that.
"""

from __future__ import annotations

import time
from dataclasses import MISSING, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from cprec.config import find_config, to_yaml
from cprec.data.config import TableSource
from cprec.errors import ConfigError
from cprec.evaluate.config import EvaluateConfig
from cprec.evaluate.statistics import MIN_QUERIES
from cprec.files import write_whole
from cprec.fit.answer import answer, compare_saved, validated_by
from cprec.fit.config import FitConfig
from cprec.fit.look import Look, look_at
from cprec.fit.sizes import RANKING, TRAINING, Choice, choose, num_queries, sizes_for
from cprec.machine import num_cores
from cprec.progress import say
from cprec.provenance import CONFIG_FILE, read_resolved, save_resolved, to_dict
from cprec.rank.config import BlendConfig, RankConfig
from cprec.recipe import FINETUNED, Recipe
from cprec.run import run
from cprec.text.config import TINY, PrepareConfig
from cprec.text.prepare import prepare
from cprec.text.shards import read_shard_manifest
from cprec.train.config import FinetuneConfig
from cprec.train.finetune import timed

RECIPE, ANSWER = "recipe.yaml", "answer.txt"
"""Files in the output folder: what was chosen, and the sentence at the end."""
BASELINES = ("popularity", "titles", "transition graph", "transition graph (titles)", "ItemKNN", "EASE")
"""The simple recommenders to compare with."""
CHOSEN = frozenset(
    ("max_title_tokens", "tiny", "hidden_size", "num_hidden_layers", "num_attention_heads", "learning_rate")
    + ("num_train_epochs", "max_queries", "parts")
)
"""Settings that stand in the recipe's file even where they are the defaults."""
LORA_RANK = 16
"""Of adapters, where there is no memory to train all weights of an open model."""


def fit(config: FitConfig) -> str:
    """Make and judge a recommender for one domain, within about `config.minutes`; returns the sentence at the end.

    The recipe in the output folder says all that was chosen; where it is there already, it is gone on with.

    Raises ConfigError where a column or the time is not enough to decide, or the output folder has other settings, and
    DataError for a log that cannot be read or is too small.
    """
    start = time.monotonic()
    recipe = _earlier(config) or _chosen(config, start)
    report = run(recipe)
    saved = partial(compare_saved, Path(recipe.evaluate.output_dir), report.domains[config.domain], config.seed)
    folder = recipe.model_folder(config.domain, FINETUNED)
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
    old, new = read_resolved(folder)["config"], to_dict(config)
    if changed := sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name)):
        raise ConfigError(
            f"{folder} was made with other settings of {', '.join(changed)} (as {changed[0]}={old.get(changed[0])}): "
            f"choose another output folder, or delete it"
        )
    path = folder / RECIPE
    if not path.is_file():
        return None  # stopped before anything was chosen
    say(f"{path} is there: going on with what it says")
    recipe: Recipe = find_config(str(path))
    return recipe


def _chosen(config: FitConfig, start: float) -> Recipe:
    """Look, choose, and write the recipe."""
    source, look = look_at(config)
    is_tiny = config.base == TINY
    save_resolved(config.output_dir, config)
    say(str(look))
    prepared = _prepare_config(config, source, look)
    prepare(prepared)
    left = 60 * config.minutes - (time.monotonic() - start)
    tokens = int(read_shard_manifest(Path(prepared.output_dir, "examples", config.domain, "train"))["num_tokens"])
    finetune, choice = _training(config, tokens, TRAINING * left)
    queries, blended = num_queries(choice.tokens_per_second, RANKING * left)
    recipe = Recipe(
        name="fit",
        description=f"a recommender for {config.domain} in {config.minutes:g} minutes",
        prepare=prepared,
        finetune=finetune,
        blend=BlendConfig(max_queries=blended, seed=config.seed),
        evaluate=EvaluateConfig(
            data=prepared.output_dir,
            output_dir=f"{config.output_dir}/report",
            baselines=BASELINES,
            max_queries=queries,
            rank=RankConfig() if is_tiny else RankConfig(mode="beam"),
            seed=config.seed,
        ),
    )
    path = Path(config.output_dir, RECIPE)
    head = f"# What `cprec fit` chose. Edit it, and run it again: cprec run {path}"
    write_whole(path, f"{head}\n{to_yaml(essential(recipe))}")
    size = f"a model of width {choice.size.hidden_size} and {choice.size.num_hidden_layers} blocks"
    say(
        f"{left / 60:.1f} minutes are left on {num_cores()} cores. Chosen: {size if is_tiny else config.base}; "
        f"{choice.passes:g} passes over {tokens:,} tokens at {choice.tokens_per_second:,.0f} a second, about "
        f"{choice.seconds / 60:.1f} minutes; then up to {queries:,} customers to try it on, about "
        f"{RANKING * left / 60:.1f} minutes. All of it stands in {path}"
    )
    if queries < min(MIN_QUERIES, look.num_teaching):
        say(f"note: fewer than {MIN_QUERIES:,} customers prove nothing; more of them need more minutes")
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


def _training(config: FitConfig, tokens: int, seconds: float) -> tuple[FinetuneConfig, Choice]:
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
        eval_steps=200,
        seed=config.seed,
    )
    sizes = sizes_for(tokens) if is_tiny else [plan.tiny]
    told = [timed(replace(plan, tiny=size)) for size in sizes]
    if not is_tiny and told[0].memory_bytes > told[0].free_memory:
        plan = replace(plan, lora_rank=LORA_RANK)
        told = [timed(plan)]
    choice = choose([(size, one.tokens_per_second) for size, one in zip(sizes, told, strict=True)], tokens, seconds)
    return replace(plan, tiny=choice.size, num_train_epochs=choice.passes), choice
