"""Settings of tuning the baselines."""

from __future__ import annotations

from dataclasses import dataclass

from cprec.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """Settings of tuning."""

    data: str
    """Folder made by `cprec prepare`."""
    output: str
    """JSON file of the results; baselines that it holds with the same budget are not tuned again."""
    domains: tuple[str, ...] = ()
    """Domains to tune in, each by itself; empty: all of the data."""
    baselines: tuple[str, ...] = ("all",)
    """Names as in tables; `all`: every one but those set as published."""
    trials: int = 30
    """Settings that each baseline tries in a domain, its defaults first."""
    seconds: float = 600.0
    """Time after which a baseline starts no further trial in a domain; the first is always made."""
    max_queries: int = 2000
    """Validation queries of a domain, a seeded sample; 0: all of them."""
    seed: int = 0
    """Decides the sample of queries, the settings tried and what is random in learning."""

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise ConfigError(f"trials={self.trials} must be at least 1")
        if not self.seconds > 0:
            raise ConfigError(f"seconds={self.seconds} must be above 0")
        if self.max_queries < 0:
            raise ConfigError(f"max_queries={self.max_queries} must be 0 or more")
