"""Settings of evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from cprec.errors import ConfigError
from cprec.rank.config import RankConfig


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Settings of evaluation."""

    data: str
    """Data folder that `cprec prepare` wrote."""
    output_dir: str
    """Where rankings, metrics and the report go."""
    baselines: tuple[str, ...] = ("random", "popularity", "transition graph")
    """Baselines to rank beside the models, by name; `all` takes every one (docs/evaluation.md)."""
    seeds: tuple[int, ...] = (0,)
    """Seeds for baselines that are trained by gradient steps. With several, each is a row of its own, rows of one model
    are compared together, and `cprec run` fine-tunes each model with every seed (with one, by `finetune.seed`)."""
    tuned: str = ""
    """A file that `cprec tune` wrote: its settings replace the baselines' defaults."""
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Settings of baselines that differ from their defaults, and from those that tuning found, by the baseline's name:
    settings.HLLM.base=FOLDER."""
    models: dict[str, str] = field(default_factory=dict)
    """Model folders to rank with, by the name they have in tables. A folder fine-tuned on a domain ranks that domain
    only; a pre-trained one ranks all."""
    rank: RankConfig = field(default_factory=RankConfig)
    """How the models rank. Baselines do not depend on it."""
    domains: tuple[str, ...] = ()
    """Domains to rank; none named means every one that has queries."""
    part: Literal["test", "validation"] = "test"
    """The held-out events to ask for."""
    k: int = 10
    """Length of the rankings of the full catalogue; metrics are cut at 5 and at this."""
    exclude_seen: bool = True
    """Leave out the items of the query's history in the main table. Results with them and without come from the same
    scores, and both are in the report."""
    refit: bool = False
    """Whether recommenders learn the validation events, too, before the test: baselines, and what stands beside models
    that `cprec refit` has made. What was chosen on these events stays."""
    max_queries: int = 0
    """Rank a seeded sample of at most this many queries a domain; 0 ranks all."""
    num_candidates: int = 20
    """Size of the frozen candidate sets: the target and others, drawn uniformly, and by popularity."""
    generate: bool = False
    """Also let language models write the next title freely and look for it among the candidates."""
    uncertified: bool = False
    """Rank although a leakage certificate is missing or does not cover a model; every table then says so."""
    num_processes: int | Literal["auto"] = 1
    """Processes that rank side by side with a model that reads titles, each with the model in memory: one on each GPU,
    or of one thread on CPUs. auto: as many as there are GPUs, or else cores. A single one uses all cores; rankings are
    the same but for the last digits, which depend on the threads of a process. Everything else is ranked by one
    process, since it takes longer to open than to rank."""
    seed: int = 0
    """Decides candidates, the sample of queries, bootstrap samples, and what other baselines draw (random, iALS)."""

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds={self.seeds}: give one or more, all different")
        if self.k < 5:
            raise ConfigError(f"k={self.k} must be at least 5")
        if self.num_candidates < 2:
            raise ConfigError(f"num_candidates={self.num_candidates} must be at least 2")
        if self.refit and self.part == "validation":
            raise ConfigError(
                "refit=true learns the validation events, and part=validation asks for them: leave one out"
            )
        if self.max_queries < 0:
            raise ConfigError(f"max_queries={self.max_queries} must not be below 0")
        if self.num_processes != "auto" and self.num_processes < 1:
            raise ConfigError(f"num_processes={self.num_processes} must be at least 1, or auto")
