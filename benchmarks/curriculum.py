"""What walks bring a tiny model on a synthetic world, how near it comes to their entropy, and power laws of the loss.

    python benchmarks/curriculum.py [--folder FOLDER] [--users 1500] [--items 100] [--tokens 1_600_000] [--budgets 5]

1. Two models read the same number of tokens: histories alone, or histories and walks in equal parts. Both are measured
   on real histories of users whom training does not know.
2. The second one's loss on walks that it has not read stands beside their exact entropy, below which no model gets.
3. `L(D) = E + B D^-b` through the ends of runs, each annealed from one stable run, and through checkpoints of one
   cosine run that reads as much as the last of them: these mix the data that were read with the learning rate.

It takes minutes. A folder that is given keeps what was made, and the same command goes on there.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow.parquet as pq

from cprec.data.config import SyntheticConfig, TableSource
from cprec.data.sources.synthetic import SyntheticWorld
from cprec.models import load_model
from cprec.scaling import fit_power_law
from cprec.text.config import Curriculum, Mixture, PrepareConfig
from cprec.text.corpus import Corpus
from cprec.text.prepare import prepare
from cprec.text.shards import read_shard_manifest
from cprec.text.stream import TokenStream, one_phase
from cprec.train.checkpoint import read_state
from cprec.train.config import PretrainConfig, TinyModel
from cprec.train.folder import LOG, read_log
from cprec.train.loop import perplexity
from cprec.train.loss import PackedLoss
from cprec.train.pretrain import curriculum_writer, pretrain

DOMAIN = "kitchen"
WALKS = Mixture(walks_share=0.5)
ANNEALING = 0.2
Point = tuple[int, float]
"""Tokens and loss."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="where data and models go; a temporary folder by default")
    for name, default, what in (
        ("users", 1500, "users of the world"),
        ("items", 100, "items of each of its domains"),
        ("tokens", 1_600_000, "tokens that a model reads"),
        ("budgets", 5, "points of a power law, the last with all tokens and each with twice as many as the one before"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=what)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        compare(options.folder or Path(temporary), options.users, options.items, options.tokens, options.budgets)


def compare(folder: Path, users: int, items: int, tokens: int, budgets: int) -> None:
    """Make what is missing in the folder, and print the three comparisons."""
    base = config_of(folder, users, items)
    alone, mixed = (
        pretrain(replace(reading(base, tokens), output_dir=str(folder / name), mixture=mixture))
        for name, mixture in (("histories", Mixture()), ("walks", WALKS))
    )
    print(f"\nloss a token on real histories of unknown users, after {tokens:,} tokens")
    for name, run in (("histories alone", alone), ("histories and walks", mixed)):
        print(f"  {name:<20} {curve(run)[-1][1]:.4f}")
    exact, found = walk_losses(base, mixed)
    print(f"loss a walk of {base.curriculum.walk_length} items, in nats an item")
    print(f"  {'exact entropy':<20} {exact:.4f}\n  {'histories and walks':<20} {found:.4f}")
    print("L(D) = E + B D^-b, with 95 % intervals")
    sizes = [tokens >> halvings for halvings in reversed(range(budgets))]
    for name, points in (("annealed ends", annealed(base, sizes)), ("one cosine run", checkpoints(base, sizes))):
        print(f"  {name:<20} {', '.join(f'{loss:.4f} at {size:,}' for size, loss in points)}")
        print(f"  {'':<20} {fit_power_law(*zip(*points, strict=True))}")


def config_of(folder: Path, users: int, items: int) -> PretrainConfig:
    """Data of one domain, a share of whose users are held out; and the settings that all runs have."""
    paths = [str(folder / f"{name}.parquet") for name in ("items", "interactions")]
    if not all(map(os.path.exists, paths)):
        folder.mkdir(parents=True, exist_ok=True)
        world = SyntheticWorld(SyntheticConfig(num_market_users=users, items_per_domain=items))
        for table, path in zip(world.tables()[DOMAIN], paths, strict=True):
            pq.write_table(table, path)
    data = prepare(
        PrepareConfig(
            output_dir=str(folder / "data"),
            tables=(TableSource(domain=DOMAIN, platform="market", items=paths[0], interactions=paths[1]),),
            target_domains=(DOMAIN,),
            vocabulary_size=512,
            min_events=3,
            min_history=1,
            heldout_share=0.2,
            k_core=0,
            workers=1,
        )
    )
    return PretrainConfig(
        data=str(data),
        output_dir=str(folder),
        tiny=TinyModel(hidden_size=64, num_hidden_layers=2, num_attention_heads=2),
        learning_rate=5e-3,
        max_length=128,
        train_batch_size=8,
        anneal_steps=ANNEALING,
        curriculum=Curriculum(walk_length=8, walks_per_item=50),
        report_to=("none",),
    )


def reading(config: PretrainConfig, tokens: float, annealing: float = ANNEALING) -> PretrainConfig:
    """The settings of a run over so many tokens, the last share of which anneals."""
    of_pass = read_shard_manifest(Path(config.data) / "shards" / "train")["num_tokens"]
    return replace(config, num_train_epochs=tokens / of_pass, anneal_steps=annealing)


def curve(run: Path) -> list[Point]:
    """The loss a token on held-out histories, as often as a run measured it."""
    lines = [line for line in read_log(run / LOG) if line.get("heldout")]
    return [(line["tokens"], fmean(map(math.log, line["heldout"].values()))) for line in lines]


def walk_losses(base: PretrainConfig, model: Path) -> tuple[float, float]:
    """The exact entropy of walks, and the loss of a model on walks of another seed: nats an item."""
    writer = curriculum_writer(replace(base, seed=base.seed + 1))
    (group,) = writer.groups([DOMAIN], [WALKS])
    settings: dict[str, Any] = {"rows_per_step": base.train_batch_size, "row_tokens": base.max_length, "seed": 0}
    stream = TokenStream(Corpus([group]), one_phase(group.num_tokens), **settings)
    mean = math.log(perplexity(PackedLoss(load_model(model), bf16=False), stream))
    num_targets = group.num_tokens - len(group.documents)  # nothing is asked of a document's first token
    return float(
        writer.walks_of(DOMAIN).entropies(base.curriculum.walk_length).mean()
    ), mean * num_targets / group.num_events


def annealed(base: PretrainConfig, sizes: Sequence[int]) -> list[Point]:
    """The ends of runs of these sizes: each goes on with the stable phase of the one before, and anneals from there."""
    points, stable, before = [], "", 0
    for number, size in enumerate(sizes):
        annealing = ANNEALING * size
        rest = size - before
        config = reading(base, rest, annealing / rest)
        folder = Path(base.output_dir) / f"annealed-{number}"
        run = pretrain(replace(config, output_dir=str(folder), continue_from=stable, seed=base.seed + number))
        points.append((before + curve(run)[-1][0], curve(run)[-1][1]))
        (found,) = run.glob("stable-*")
        stable, before = str(found), before + read_state(found).num_tokens
    return points


def checkpoints(base: PretrainConfig, sizes: Sequence[int]) -> list[Point]:
    """The loss on the way of one run under a cosine, nearest to each of these sizes."""
    config = replace(reading(base, sizes[-1]), lr_scheduler_type="cosine", output_dir=f"{base.output_dir}/cosine")
    run = pretrain(replace(config, eval_steps=max(1, sizes[0] // (2 * config.train_batch_size * config.max_length))))
    measured = [point for point in curve(run) if point[0]]
    return [min(measured, key=lambda point: abs(point[0] - size)) for size in sizes]


if __name__ == "__main__":
    main()
