"""Stage: from two tables to a recommender and a sentence that says which one to use.

It looks at the log and the machine, chooses what fits them and the time, writes the choice as a recipe, and runs that.
At the end the recommender that was tried learns the events that it was tried on, too, and is ready to be served.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from cprec.config import essential, find_config, to_yaml
from cprec.data.dataset import read_split
from cprec.errors import ConfigError
from cprec.evaluate.config import EvaluateConfig
from cprec.files import write_whole
from cprec.fit.answer import answer, compare_saved, served
from cprec.fit.config import FitConfig
from cprec.fit.look import look_at
from cprec.fit.sizes import NETWORKS, REACHED, TRAINING, choose, networks_for, sizes_for
from cprec.item_head import TITLE_TOKENS, seconds_to_train
from cprec.machine import num_cores
from cprec.progress import say
from cprec.provenance import CONFIG_FILE, read_resolved, save_resolved, to_dict
from cprec.rank.config import BlendConfig, RankConfig, RefitConfig
from cprec.recipe import FINETUNED, UNTRAINED, Recipe
from cprec.refit import refit
from cprec.run import run
from cprec.text.config import TINY, PrepareConfig
from cprec.text.prepare import prepare
from cprec.text.shards import read_shard_manifest
from cprec.text.tokenizer import load_tokenizer
from cprec.train.config import FinetuneConfig
from cprec.train.finetune import timed

RECIPE, ANSWER, RECOMMENDER = "recipe.yaml", "answer.txt", "recommender"
"""In the output folder: what was chosen, the sentence at the end, and the model to serve, refitted to all events."""
BASELINES = ("popularity", "titles", "transition graph", "transition graph (titles)", "ItemKNN", "EASE")
"""The simple recommenders to compare with."""
WORDS: Mapping[int, tuple[str, ...]] = {0: (), 1: ("SASRec (titles)",), NETWORKS: ("SASRec (titles x3)",)}
"""The part of the blend that reads titles as mere words, by its number of networks, which is that of the item head if
there is time: what the head adds to it comes from the language model."""
CHOSEN = frozenset(
    ("max_title_tokens", "tiny", "hidden_size", "num_hidden_layers", "num_attention_heads", "learning_rate")
    + ("num_train_epochs", "max_queries", "parts")
)
"""Settings that stand in the recipe's file even where they are the defaults."""
QUERIES = 10_000
"""Customers whose validation events choose the weights, and customers whose test events try the recommenders, at most:
with more, a mean says hardly more."""
LORA_RANK = 16
"""Of adapters, where there is no memory to train all weights of an open model."""


def fit(config: FitConfig) -> str:
    """Make and judge a recommender for one domain, within about `config.minutes`; returns the sentence at the end.

    What was chosen, by what was timed and the time that is left, stands as a recipe in the output folder; where one is
    there already, it is gone on with.

    Raises ConfigError where a column or the time is not enough to decide, or the output folder has other settings, and
    DataError for a log that cannot be read or is too small.
    """
    start = time.monotonic()
    recipe = _earlier(config) or _chosen(config, lambda: start + 60 * config.minutes - time.monotonic())
    assert recipe.finetune is not None
    model = FINETUNED if recipe.finetune.num_train_epochs else UNTRAINED
    folder = recipe.model_folder(config.domain, model)
    report = run(recipe)
    assert report is not None, "a recipe with a domain is evaluated"
    result, what = report.domains[config.domain], served(folder)
    compare = partial(compare_saved, Path(recipe.evaluate.output_dir), result, config.seed)
    sentence = answer(result, model, what, compare)
    write_whole(Path(config.output_dir, ANSWER), sentence + "\n")
    print(f"\n{sentence}\n")
    best = refit(RefitConfig(model=folder, output_dir=f"{config.output_dir}/{RECOMMENDER}"))
    took = f"took {(time.monotonic() - start) / 60:.1f} minutes"
    say(f"{took}. `cprec serve {best}` serves {what}, which has learnt all events by now")
    return sentence


def _earlier(config: FitConfig) -> Recipe | None:
    """The recipe that the same settings have chosen before. Raises ConfigError where the folder has others."""
    folder, path = Path(config.output_dir), Path(config.output_dir, RECIPE)
    if not folder.exists() or not any(folder.iterdir()):
        return None
    if not (folder / CONFIG_FILE).is_file() or read_resolved(folder)["stage"] != FitConfig.__name__:
        raise ConfigError(f"{folder} exists and is not of `cprec fit`: choose another output folder or delete it")
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
    prepared = PrepareConfig(
        output_dir=f"{config.output_dir}/data",
        tables=(source,),
        target_domains=(config.domain,),
        tokenizer=config.base,
        max_title_tokens=look.title_tokens,
        k_core=0,  # every item and event counts, and a history of one event is asked for, too
        min_events=2,
        min_history=1,
        seed=config.seed,
    )
    prepare(prepared)
    finetune, networks_over_words = _training(config, left)
    recipe = Recipe(
        name="fit",
        description=f"a recommender for {config.domain} in {config.minutes:g} minutes",
        prepare=prepared,
        finetune=finetune,
        blend=BlendConfig(
            parts=(*BlendConfig.parts, *WORDS[networks_over_words]),
            log_p=False,
            max_queries=QUERIES,
            seed=config.seed,
        ),
        evaluate=EvaluateConfig(
            data=prepared.output_dir,
            output_dir=f"{config.output_dir}/report",
            baselines=BASELINES,
            rank=RankConfig(mode="vectors"),
            max_queries=QUERIES,
            seed=config.seed,
        ),
    )
    path = Path(config.output_dir, RECIPE)
    head = f"# What `cprec fit` chose. Edit it, and run it again: cprec run {path}"
    write_whole(path, f"{head}\n{to_yaml(essential(recipe, CHOSEN))}")
    return recipe


def _training(config: FitConfig, left: Callable[[], float]) -> tuple[FinetuneConfig, int]:
    """Training of the model that fits the log and the time, by timing the sizes there are; an open model has one. And
    the number of networks over words that there is time for."""
    is_tiny = config.base == TINY
    plan = FinetuneConfig(
        data=f"{config.output_dir}/data",
        output_dir=f"{config.output_dir}/models",
        domain=config.domain,
        model_name_or_path=config.base,
        item_head=True,
        learning_rate=2e-3 if is_tiny else 1e-4,
        max_length=256 if is_tiny else 512,
        train_batch_size=16,
        micro_batch_size=0 if is_tiny else 2,
        eval_steps=200,
        eval_tokens=50_000 if is_tiny else 5_000,
        general_text="none",
        seed=config.seed,
    )
    tokens, titles, network_seconds = _amounts(plan)
    network_seconds *= 2  # it is trained to be tried, and again to be served
    over_words = networks_for(2 * network_seconds, left())
    plan = replace(plan, head_networks=over_words or 1)
    head_seconds = (plan.head_networks + over_words) * network_seconds
    sizes = sizes_for(tokens) if is_tiny else [plan.tiny]
    told = [timed(replace(plan, tiny=size)) for size in sizes]
    if not is_tiny and told[0].memory_bytes > told[0].free_memory:
        plan = replace(plan, lora_rank=LORA_RANK)
        told = [timed(plan)]
    rates = [(size, REACHED * one.tokens_per_second) for size, one in zip(sizes, told, strict=True)]
    choice = choose(rates, tokens, TRAINING * (left() - head_seconds), titles=titles, may_stay=not is_tiny)
    size = f"a model of width {choice.size.hidden_size} and {choice.size.num_hidden_layers} blocks"
    passes = f"{choice.passes:g} passes over the log" if choice.passes else "as it is, without training"
    say(
        f"{left() / 60:.1f} minutes are left on {num_cores()} cores. Chosen: {size if is_tiny else config.base}, "
        f"{passes}: about {choice.seconds / 60:.1f} minutes at {choice.tokens_per_second:,.0f} tokens a second, the "
        f"reading of titles included; then an item head of {plan.head_networks} network"
        f"{'s' * (plan.head_networks > 1)} and {over_words or 'none'} over words, about {head_seconds / 60:.1f} minutes"
    )
    lora_rank = plan.lora_rank if choice.passes else 0
    return replace(plan, tiny=choice.size, num_train_epochs=choice.passes, lora_rank=lora_rank), over_words


def _amounts(plan: FinetuneConfig) -> tuple[int, int, float]:
    """Tokens of a pass and of the titles that an item head reads, and the seconds that each of its networks trains."""
    manifest = read_shard_manifest(Path(plan.data, "examples", plan.domain, "train"))
    split, tokenizer = read_split(plan.data), load_tokenizer(f"{plan.data}/tokenizer")
    titles = split.catalogue.titles_of(plan.domain)
    of_titles = sum(min(len(ids), TITLE_TOKENS) for ids in tokenizer(titles, add_special_tokens=False)["input_ids"])
    return int(manifest["num_tokens"]), of_titles, seconds_to_train(split, plan.domain, plan.seed) / REACHED
