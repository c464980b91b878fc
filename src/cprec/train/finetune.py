"""Stage: fine-tuning on next-item examples of one domain; the loss covers the target's tokens only."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cprec.errors import ConfigError
from cprec.train.config import FinetuneConfig

if TYPE_CHECKING:
    from cprec.text.shards import Shards
    from cprec.text.stream import TokenStream


def finetune(config: FinetuneConfig) -> Path:
    """Fine-tune a model on the next-item examples of a domain; returns the model folder."""
    from cprec.text.corpus import Corpus
    from cprec.text.shards import open_shards
    from cprec.text.stream import TokenStream, one_phase
    from cprec.train.plan import Plan, make_plan
    from cprec.train.training import run_training

    folder = Path(config.data) / "examples" / config.domain
    if not folder.is_dir():
        if not folder.parent.is_dir():
            what = "does not exist" if not Path(config.data).exists() else "is no data folder of `cprec prepare`"
            raise ConfigError(f"data={config.data} {what}: give the folder that `cprec prepare` wrote")
        found = sorted(path.name for path in folder.parent.iterdir() if path.is_dir())
        raise ConfigError(
            f"domain={config.domain!r} has no fine-tuning examples in {folder.parent}, which has those of "
            f"{', '.join(found) or 'no domain'}. Name it in target_domains of `cprec prepare`"
        )
    train, validation = open_shards(folder / "train"), open_shards(folder / "validation")

    def stream(shards: Shards, num_tokens: float, rows: int) -> TokenStream:
        return TokenStream(
            Corpus.of(shards, targets_only=True),
            one_phase(num_tokens),
            rows_per_step=rows,
            row_tokens=config.max_length,
            seed=config.seed,
        )

    def plan() -> Plan:
        num_tokens = round(config.num_train_epochs * train.manifest["num_tokens"])
        return make_plan(config, stream(train, num_tokens, config.rows_per_step))

    held_out = min(config.eval_tokens, validation.manifest["num_tokens"])
    name = f"{config.domain} (next item)"
    return run_training(
        config,
        make_plan=plan,
        trained_on=[train.sha256],
        inputs={"heldout": validation.sha256},
        validation={name: stream(validation, held_out, config.per_device_train_batch_size)} if held_out else {},
        about={"stage": "finetune", "domain": config.domain, **train.manifest["about"]},
    )
