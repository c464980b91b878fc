"""Stage: fine-tuning on next-item examples of one domain; the loss covers the target's tokens only."""

from __future__ import annotations

from pathlib import Path

from cprec.errors import ConfigError
from cprec.text.corpus import Corpus
from cprec.text.shards import Shards, open_shards
from cprec.text.stream import TokenStream, one_phase
from cprec.train.config import FinetuneConfig
from cprec.train.estimate import Estimate
from cprec.train.training import Run, plan_of, run_training, time_training


def finetune(config: FinetuneConfig) -> Path:
    """Fine-tune a model on the next-item examples of a domain; returns the model folder."""
    return run_training(_run(config))


def timed(config: FinetuneConfig) -> Estimate:
    """What fine-tuning will take, its speed timed on a micro-batch. Nothing is learnt or written."""
    return time_training(_run(config))


def _run(config: FinetuneConfig) -> Run:
    folder = _examples_of(Path(config.data), config.domain)
    train, validation = open_shards(folder / "train"), open_shards(folder / "validation")

    def stream(shards: Shards, num_tokens: float, rows: int) -> TokenStream:
        return TokenStream(
            Corpus.of(shards, targets_only=True),
            one_phase(num_tokens),
            rows_per_step=rows,
            row_tokens=config.max_length,
            seed=config.seed,
        )

    num_tokens = round(config.num_train_epochs * train.manifest["num_tokens"])
    held_out = min(config.eval_tokens, validation.manifest["num_tokens"])
    name = f"{config.domain} (next item)"
    return Run(
        config=config,
        make_plan=lambda: plan_of(config, stream(train, num_tokens, config.train_batch_size)),
        trained_on=[train.sha256],
        inputs={"heldout": validation.sha256},
        validation={name: stream(validation, held_out, config.rows_per_pass)} if held_out else {},
        stage="finetune",
        about={"domain": config.domain, **train.manifest["about"]},
    )


def _examples_of(data: Path, domain: str) -> Path:
    """The folder of a domain's examples. Raises ConfigError where there is none."""
    folder = data / "examples" / domain
    if folder.is_dir():
        return folder
    if not folder.parent.is_dir():
        what = "is not a data folder of `cprec prepare`" if data.exists() else "does not exist"
        raise ConfigError(f"data={data} {what}: give the folder that `cprec prepare` wrote")
    found = sorted(path.name for path in folder.parent.iterdir() if path.is_dir())
    raise ConfigError(
        f"domain={domain!r} has no fine-tuning examples in {folder.parent}, which has those of "
        f"{', '.join(found) or 'no domain'}. Name it in target_domains of `cprec prepare`"
    )
