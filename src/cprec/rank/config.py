"""How a language model ranks the full catalogue."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from cprec.errors import ConfigError

Mode = Literal["auto", "exact", "beam", "vectors"]
Score = Literal["sum", "mean", "corrected"]
Normaliser = Literal["auto", "vocabulary", "catalogue"]


@dataclass(frozen=True, kw_only=True)
class RankConfig:
    """How a language model ranks the full catalogue."""

    mode: Mode = "auto"
    """`exact` proves that no better item is left; `auto` does too, but stops a query that has read `max_nodes`
    prefixes; `beam` keeps `beam_width` prefixes at each depth. Tables say what was proven, and of a beam what share of
    the exact lists it found. `vectors` ranks by the item head of a model that has one: one pass, no search."""
    beam_width: int = 20
    """Prefixes that a beam keeps at each depth."""
    max_nodes: int = 2000
    """The most prefixes that `auto` reads for a query."""
    score: Score = "sum"
    """Log-probability of a title: summed over its tokens, their mean, or the sum less what it is under an empty history
    (`corrected` for popularity; over the full catalogue this reorders what a beam found)."""

    normaliser: Normaliser = "auto"
    """What the probabilities of a title's next token sum to one over: the `vocabulary`, or the tokens with which titles
    of the `catalogue` go on there; auto: as the model was fine-tuned."""

    def __post_init__(self) -> None:
        for name, choices in (("mode", Mode), ("score", Score), ("normaliser", Normaliser)):
            value, accepted = getattr(self, name), get_args(choices)
            if value not in accepted:
                raise ConfigError(f"{name}={value!r}: choose one of {', '.join(accepted)}")
        for name, number in (("beam_width", self.beam_width), ("max_nodes", self.max_nodes)):
            if number < 1:
                raise ConfigError(f"{name}={number} must be at least 1")
        if self.score != "sum" and self.mode == "vectors":
            raise ConfigError(
                f"score={self.score} with mode=vectors: an item head scores items, not tokens of titles; leave score "
                "out, or choose another mode"
            )
        if self.score == "corrected" and self.mode == "exact":
            raise ConfigError(
                "score=corrected with mode=exact: a corrected score may rise along a title, so nothing can be proven; "
                "choose mode=auto or mode=beam"
            )

    @property
    def suits_blends(self) -> bool:
        """Whether models have the scores that the weights of blends are chosen for."""
        return self.score == "sum" and self.normaliser == "auto"


@dataclass(frozen=True, kw_only=True)
class BlendConfig:
    """Settings of blending."""

    model: str = ""
    """Folder of a model that `cprec finetune` or `cprec pretrain` wrote. A recipe leaves it empty: its run blends each
    model that it fine-tunes."""
    parts: tuple[str, ...] = ("transition graph (titles)", "EASE", "popularity", "titles")
    """Recommenders to blend the model with, by their names in tables; `with` on the command line."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Numbers of the items as parts: the name of a column, and the CSV or Parquet file that has it beside `item_id`, as
    margin:items.csv."""
    fixed: Mapping[str, float] = field(default_factory=dict)
    """Weights that are given, not chosen, of parts or columns, as margin:0.3: each in proportion to the sum of the
    weights that are chosen. What they change is told."""
    data: str | None = None
    """Data folder that `cprec prepare` wrote; by default the one that the model was trained on."""
    domain: str | None = None
    """The domain to recommend from; by default the one that the model was fine-tuned for."""
    log_p: bool = True
    """Whether the probability of titles may have a weight; if not, only the item head and the parts have one, nothing
    is decoded, and minutes become seconds."""
    max_queries: int = 750
    """Validation queries that the weights are chosen on, a seeded sample; 0: all of them."""
    pool: int = 100
    """Best items of each part and of the model that compete for a list while the weights are chosen."""
    max_nodes: int = 2000
    """The most prefixes that the model reads for the best items of a query; see `RankConfig`."""
    uncertified: bool = False
    """Blend although a leakage certificate is missing or does not cover the model."""
    seed: int = 0
    """Decides the sample of queries, and what is random in the parts (iALS, SASRec)."""

    def __post_init__(self) -> None:
        names = (*self.parts, *self.columns)
        for name, weight in self.fixed.items():
            if name not in names:
                raise ConfigError(f"fixed: {name!r} is none of the parts and columns, {', '.join(names)}")
            if not 0 < weight < math.inf:
                raise ConfigError(f"fixed.{name}={weight} must be a number above 0")
        if self.fixed and set(self.parts) <= set(self.fixed):
            raise ConfigError(f"fixed={', '.join(self.fixed)}: leave at least one of the parts a weight that is chosen")
        if self.max_queries < 0:
            raise ConfigError(f"max_queries={self.max_queries} must be 0 or more")
        for name, number, least in (("pool", self.pool, 10), ("max_nodes", self.max_nodes, 1)):
            if number < least:
                raise ConfigError(f"{name}={number} must be at least {least}")


@dataclass(frozen=True, kw_only=True)
class RefitConfig:
    """Settings of refitting."""

    model: str = ""
    """Folder of a fine-tuned model that has an item head or a blend."""
    output_dir: str = ""
    """Where the refitted model goes, a folder of its own; the model stays as it is."""
    events: Literal["all", "validation"] = "all"
    """Events to learn beside the training events. `all`: validation and test events, and those of users who were kept
    out of training, for a model that is to be served. `validation`: for one that is to be tested."""
    data: str | None = None
    """Data folder that `cprec prepare` wrote; by default the one that the model was trained on."""

    def __post_init__(self) -> None:
        if self.events not in ("all", "validation"):
            raise ConfigError(f"events={self.events!r}: choose all or validation")
