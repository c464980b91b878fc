"""Anneal forks: many annealing branches from the end of one stable phase, compared in one table and one page.

The stable phase costs most and is shared: a branch costs its own annealing only, and comes out as if the whole run had
been made for it. Hägele et al. (2024) measure scaling so; the schedule is that of MiniCPM (Hu et al. 2024).
"""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cprec.config import from_mapping
from cprec.data.dataset import read_split
from cprec.entrants import model_entrants
from cprec.errors import ConfigError
from cprec.evaluate.config import EvaluateConfig
from cprec.evaluate.evaluate import evaluate
from cprec.evaluate.training_page import fork_page, print_forks
from cprec.files import write_whole
from cprec.finetune import finetune
from cprec.progress import say
from cprec.provenance import CONFIG_FILE, read_resolved, save_resolved
from cprec.train.checkpoint import damage, read_state, step_of
from cprec.train.config import AnnealConfig, FinetuneConfig, ForkData, PretrainConfig, share_of, under_current_names
from cprec.train.folder import LOG, read_done, read_log
from cprec.train.pretrain import fork

FORKS = "forks"
SHARED = ("data", "max_length", "train_batch_size", "micro_batch_size", "bf16", "seed")
"""Settings that fine-tuning takes over from the pre-training run."""
TRUNK = "no annealing"
MIXED_LATE, SFT_LATE = 0.8, 0.1
"""Share of mixed sequences in `mixed_late` (1:4), of examples in `sft_late` (our reconstruction, docs/papers.md)."""


def anneal(config: AnnealConfig) -> dict[str, Any]:
    """Grow the branches, fine-tune each in the same short way, and compare; writes forks.json and forks.html.

    Complete branches are reused and interrupted ones resumed, so lengths may be added later. Raises ConfigError where
    the folder holds no pre-training run with a stable checkpoint.
    """
    run = Path(config.run)
    stable = _stable(run, config.start)
    trunk = from_mapping(PretrainConfig, under_current_names(read_resolved(run)["config"]))
    if trunk.lr_scheduler_type != "wsa":  # it had no annealing: all of it is the trunk
        trunk = replace(trunk, lr_scheduler_type="wsa", anneal_steps=0)
    folder = Path(config.output_dir or run / FORKS)
    domain = _domain(config, Path(trunk.data))
    branches = _grow(config, trunk, stable, folder)
    rows = {TRUNK: _row(run, stable)} | {
        name: _row(path, stable, done=read_done(path)) for name, path in branches.items()
    }
    if config.num_train_epochs:
        _fine_tune(config, trunk, domain, {TRUNK: stable, **branches}, folder, rows)
    comparison = {"run": str(run), "start": stable.name, "domain": domain, "rows": rows}
    folder.mkdir(parents=True, exist_ok=True)
    save_resolved(folder, config)
    write_whole(folder / "forks.json", json.dumps(comparison, indent=1) + "\n")
    logs = {name: _log(path) for name, path in branches.items()}
    write_whole(folder / "forks.html", fork_page(comparison, logs, _log(run)))
    print_forks(comparison)
    say(f"wrote {folder / 'forks.json'} and {folder / 'forks.html'}")
    return comparison


def _grow(config: AnnealConfig, trunk: PretrainConfig, stable: Path, folder: Path) -> dict[str, Path]:
    """The model folder of each branch, by its name."""
    branches = {}
    plans = list(itertools.product(config.lengths, config.shapes, config.data))
    for number, (length, shape, data) in enumerate(plans, start=1):
        name = f"{100 * share_of(length):g}% {shape} {data}"
        say(f"[{number}/{len(plans)}] branch: {name}")
        branch = replace(
            trunk,
            output_dir=str(folder / _as_folder(name)),
            branch_length=share_of(length),
            anneal_shape=shape,
            anneal_mixture=_mixture(trunk, data),
            keep="last",  # a branch is what its annealing comes to
            dry_run=False,
        )
        branches[name] = fork(branch, stable)
    return branches


def _as_folder(name: str) -> str:
    return name.replace("%", "").replace(" ", "-")


def _stable(run: Path, name: str) -> Path:
    if not (run / CONFIG_FILE).is_file():
        raise ConfigError(f"run={run}: no run of `cprec pretrain` is there (no {CONFIG_FILE})")
    found = sorted((path for path in run.glob("stable-*") if path.name.split("-")[1].isdecimal()), key=step_of)
    if name:
        found = [path for path in found if path.name == name]
    if not found:
        raise ConfigError(
            f"run={run} has no {name or 'stable-STEP'}: it is written at the end of the stable phase of pre-training"
        )
    if reason := damage(found[-1]):
        raise ConfigError(f"{found[-1]} is damaged ({reason}): name another one with start=stable-STEP")
    return found[-1]


def _domain(config: AnnealConfig, data: Path) -> str:
    if config.domain or not config.num_train_epochs:
        return config.domain
    found = sorted(path.name for path in (data / "examples").glob("*") if path.is_dir())
    if len(found) != 1:
        raise ConfigError(f"domain: choose one to fine-tune on; {data} has examples of {', '.join(found) or 'none'}")
    return found[0]


def _mixture(trunk: PretrainConfig, data: ForkData) -> Any:
    if data == "mixed_late":
        return replace(trunk.mixture, mixed_share=MIXED_LATE)
    if data == "sft_late":
        return replace(trunk.mixture, examples_share=SFT_LATE)
    return trunk.anneal_mixture


def _log(run: Path) -> list[dict[str, Any]]:
    return read_log(run / LOG) if (run / LOG).is_file() else []


def _row(run: Path, stable: Path, done: dict[str, Any] | None = None) -> dict[str, Any]:
    """The cost of a branch that is `done`, without the shared part, and the held-out perplexity at its end.

    Without `done` it is the row of the stable checkpoint, whose perplexity was measured when it was saved.
    """
    state = read_state(stable)
    tokens, seconds = (done["tokens"], done["seconds"]) if done else (state.num_tokens, state.seconds)
    return {
        "tokens": tokens - state.num_tokens,
        "seconds": round(seconds - state.seconds, 1),
        "total_tokens": tokens,
        "heldout": _last_heldout(run, None if done else state.step) or {},
    }


def _last_heldout(run: Path, step: int | None = None) -> dict[str, float] | None:
    """The last held-out perplexities in the log of a run, or those at a step."""
    logged = [line["heldout"] for line in _log(run) if line.get("heldout") and step in (None, line["step"])]
    return logged[-1] if logged else None


def _fine_tune(
    config: AnnealConfig,
    trunk: PretrainConfig,
    domain: str,
    starts: dict[str, Path],
    folder: Path,
    rows: dict[str, dict[str, Any]],
) -> None:
    """Fine-tune every branch alike; adds next-item perplexity and, from validation queries, ranking to its row."""
    models: dict[str, str] = {}
    for name, start in starts.items():
        say(f"fine-tuning on {domain}: {name}")
        tuned = finetune(
            FinetuneConfig(
                **{name: getattr(trunk, name) for name in SHARED},
                domain=domain,
                model_name_or_path=str(start),
                output_dir=str(folder / "finetune" / _as_folder(name)),
                num_train_epochs=config.num_train_epochs,
                learning_rate=config.learning_rate or trunk.learning_rate,
            )
        )
        models[name] = str(tuned)
        last = _last_heldout(tuned)
        rows[name]["next_item_perplexity"] = next(iter(last.values())) if last else None
    if config.max_queries:
        _rank(config, trunk.data, domain, models, folder, rows)


def _rank(
    config: AnnealConfig, data: str, domain: str, models: dict[str, str], folder: Path, rows: dict[str, dict[str, Any]]
) -> None:
    """Rank validation queries with every model: these figures choose a fork, so the test queries stay untouched."""
    output = str(folder / "evaluate")
    settings = EvaluateConfig(data=data, output_dir=output, part="validation", max_queries=config.max_queries)
    ranked = evaluate(settings, read_split(data), domain, model_entrants(settings, domain, models))
    for name, arm in ranked.arms.items():
        shown = (ranked.main, replace(ranked.main, name="recall"))
        rows[name] |= {str(metric): asdict(arm.metrics[metric]) for metric in shown}
    for difference in ranked.differences:
        if difference.b == TRUNK:
            test = difference.test
            rows[difference.a]["against_trunk"] = {"mean": test.mean, "low": test.low, "high": test.high}
