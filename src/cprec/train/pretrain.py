"""Stage: continual pre-training on behaviour sequences of all domains, specific and mixed, under WSA."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cprec.errors import ConfigError
from cprec.schema import MIXED
from cprec.train.training import TrainingConfig

if TYPE_CHECKING:
    from cprec.text.shards import Shards
    from cprec.text.stream import TokenStream


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainingConfig):
    """Settings of continual pre-training."""

    mixed_share: float = 0.5
    """Share of tokens from all-domain mixed sequences; the rest is domain-specific (our reconstruction: 1:1)."""
    domain_temperature: float = 0.7
    """Domains share the specific tokens in proportion to (number of events) ** this: 1 as they come, 0 all alike."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.mixed_share <= 1:
            raise ConfigError(f"mixed_share={self.mixed_share} must lie in 0..1")


def pretrain(config: PretrainConfig) -> Path:
    """Continue a model's pre-training on the token shards of a data folder; returns the model folder."""
    from cprec.text.shards import open_shards
    from cprec.text.stream import TokenStream, mixture_weights
    from cprec.train.training import run_training

    folder = Path(config.data) / "shards"
    shards, heldout = open_shards(folder / "train"), open_shards(folder / "heldout")
    group, weight = mixture_weights(
        shards, mixed_share=config.mixed_share, domain_temperature=config.domain_temperature
    )

    def make_stream() -> TokenStream:
        stream = TokenStream(
            shards,
            rows_per_step=config.rows_per_step,
            row_tokens=config.max_length,
            num_tokens=round(config.num_train_epochs * shards.manifest["num_tokens"]),
            seed=config.seed,
            group=group,
            weight=weight,
        )
        report_mixture(shards, stream, group)
        return stream

    return run_training(
        config,
        train_shards=shards,
        make_stream=make_stream,
        validation=heldout_streams(heldout, config),
        about={"stage": "pretrain", **shards.manifest["about"]},
    )


def report_mixture(shards: Shards, stream: TokenStream, group: object) -> None:
    """Print how the tokens of the run divide over domains and kinds, and how often each is repeated."""
    import numpy as np

    from cprec.progress import say

    lengths, kind, domain = shards.column("length"), shards.column("kind"), shards.column("domain")
    for number, tokens in enumerate(stream.group_tokens):
        members = np.asarray(group) == number
        first = int(np.flatnonzero(members)[0])
        name = MIXED if kind[first] == MIXED else domain[first]
        size = int(lengths[members].sum())
        say(f"  {name}: {tokens:,} tokens ({tokens / stream.num_tokens:.1%}), {tokens / size:.2f} passes over {size:,}")


def heldout_streams(heldout: Shards, config: TrainingConfig) -> dict[str, TokenStream]:
    """Held-out documents of users never trained on: one stream per domain for specific ones, one for mixed ones."""
    import numpy as np

    from cprec.text.stream import TokenStream

    kind, domain = heldout.column("kind").astype(str), heldout.column("domain").astype(str)
    names = np.array([k if k == MIXED else f"{d} ({k})" for k, d in zip(kind, domain, strict=True)], dtype=object)
    lengths = heldout.column("length")
    streams = {}
    for name in sorted(set(names)) if config.eval_tokens else ():
        members = names == name
        streams[name] = TokenStream(
            heldout,
            rows_per_step=config.per_device_train_batch_size,
            row_tokens=config.max_length,
            num_tokens=min(config.eval_tokens, int(lengths[members].sum())),
            seed=0,
            group=np.where(members, 0, 1),
            weight=np.array([1.0, 0.0]),
        )
    return streams
