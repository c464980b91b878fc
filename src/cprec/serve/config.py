"""Settings of the service and of recommendation from the command line."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cprec.errors import ConfigError
from cprec.partition import share_of

TOKEN = "CPREC_TOKEN"
"""The environment variable with the token: a command line can be read by everybody on the machine."""


LOOPBACK = ("127.0.0.1", "::1", "localhost")


OWN_PATHS = ("v1", "docs", "redoc", "openapi.json", "health", "ready", "metrics")
"""What paths of the service begin with."""


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Settings of the service."""

    models: tuple[str, ...]
    """Model folders that `cprec finetune` or `cprec pretrain` wrote, or folders of trained baselines that `cprec
    evaluate` wrote (OUT/baselines/DOMAIN/NAME); the first answers where a request names none."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What runs the models: transformers in this process, or vLLM, an extra for machines with a GPU. Lists are the same
    up to rounding."""
    data: str | None = None
    """Data folder that the models were made from, for the baselines that answer when the model has no time; where it is
    none, the one that the first model folder names, if it is there."""
    state: str | None = None
    """Folder for new and withdrawn items, which several processes of one machine may share; none refuses such
    changes."""
    host: str = "127.0.0.1"
    """Address to listen on. Any but the loopback ones needs a token in the environment variable CPREC_TOKEN."""
    port: int = 8080
    """Port to listen on; 0 takes a free one."""
    deadline_ms: float = 1000.0
    """Milliseconds until a list must be there where the request does not say; what is not exact by then comes from
    a beam, or from a baseline, and says so."""
    max_batch: int = 32
    """Users that the model answers together at most, and that may wait; fewer where that many take longer than half of
    the deadline. Others get 503 and a time to come back."""
    cache_mb: float = 256.0
    """Memory for what was read of prompts, in MiB, for users who come back; 0 keeps nothing. Each model has its own;
    vLLM has a cache of its own kind, which this leaves alone."""
    beam_width: int = 20
    """Prefixes that mode beam keeps of each depth."""
    max_nodes: int = 2000
    """Prefixes that mode auto reads for a user at most."""
    max_body_mb: float = 4.0
    """Largest body of a request, in MiB."""
    cors: tuple[str, ...] = ()
    """Origins whose pages may ask from a browser, as https://shop.example; * lets all. By default none but the
    service's own."""
    root_path: str = ""
    """What a proxy strips from the front of paths, as /recommender, so that /docs finds its way back."""

    def __post_init__(self) -> None:
        if not self.models:
            raise ConfigError("models is empty: give at least one model folder")
        if not 0 <= self.port < 1 << 16:
            raise ConfigError(f"port={self.port} must lie from 0 to 65535")
        for name in ("deadline_ms", "max_batch", "beam_width", "max_nodes", "max_body_mb"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be above 0")
        for origin in self.cors:
            if not (origin == "*" or re.fullmatch(r"https?://[^/\s?#,]+", origin)):
                raise ConfigError(
                    f"cors={origin!r}: an origin is scheme and host, with the port if it is not the usual one and "
                    "without a slash at the end, as https://shop.example or http://localhost:3000; * lets all"
                )
        if self.root_path and not re.fullmatch(r"(/[\w.~-]+)+", self.root_path):
            raise ConfigError(
                f"root_path={self.root_path!r} must begin with a slash and end without one, as /recommender"
            )
        if (first := self.root_path[1:].partition("/")[0]) in OWN_PATHS:
            raise ConfigError(f"root_path={self.root_path!r}: /{first} is a path of the service itself; choose another")
        if self.cache_mb < 0:
            raise ConfigError(f"cache_mb={self.cache_mb} must not be below 0")

    @property
    def token(self) -> str | None:
        """The token that requests must have. Raises ConfigError where one is needed and there is none."""
        token = os.environ.get(TOKEN) or None
        if token is None and self.host not in LOOPBACK:
            raise ConfigError(
                f"host={self.host!r} can be reached from other machines, and there is no token: set the environment "
                f"variable {TOKEN}, as in {TOKEN}=$(openssl rand -hex 16) cprec serve ..., or listen on 127.0.0.1"
            )
        return token

    def check(self) -> None:
        """Raise ConfigError where what the service needs is missing: before models are loaded."""
        _ = self.token
        try:
            import fastapi  # noqa: F401
            import prometheus_client  # noqa: F401
            import uvicorn  # noqa: F401
        except ImportError as error:
            raise ConfigError(f"{error}: cprec serve needs its extra; pip install 'cprec[serve]'") from None


SUFFIXES = (".csv", ".jsonl", ".parquet")


@dataclass(frozen=True, kw_only=True)
class RecommendConfig:
    """Settings of recommendation."""

    model: str
    """Model folder that `cprec pretrain` or `cprec finetune` wrote, or the folder of a trained baseline that `cprec
    evaluate` wrote."""
    history: tuple[str, ...] = ()
    """One history, oldest event first: item ids or titles."""
    query: str | None = None
    """What is asked for, in words of titles, brands or categories; beside a history or instead of one."""
    domain: str | None = None
    """Domain to recommend from; by default the one the model was fine-tuned for."""
    k: int = 10
    """Items to recommend."""
    input: str | None = None
    """File of histories: CSV (columns user_id and history, events separated by |), JSONL or Parquet (a list). Of a
    user with fewer items left than `k` the list is shorter; one whose history says nothing gets the popular items."""
    output: str | None = None
    """File to write for `input`, CSV, JSONL or Parquet by its name: user_id, rank, item_id, title, score, and source,
    which is model or popularity."""
    exclude_seen: bool = True
    """Leave out the items of the history."""
    strict: bool = False
    """Stop at the first row or event that cannot be used. By default these are left out, counted, and listed in
    OUTPUT.rejected.csv."""
    num_processes: int | Literal["auto"] = 1
    """Processes that rank an `input` side by side, each with the model in memory: one on each GPU, or of one thread on
    CPUs. auto: as many as there are GPUs, or else cores. A single one uses all cores."""
    partition: str | None = None
    """i/n, from 0/n to (n-1)/n: rank only the i-th share of an `input`, on a scheduler, say; the same command with each
    i, in any order or at once, on machines that see the files, gives the same output as one without. The last to finish
    writes it."""
    engine: str | None = None
    """spark ranks an `input` on the executors of the active Spark session or of a local one, spark://MASTER on those of
    MASTER, as spark://local[4] or spark://host:7077. They must see the files. None: processes of this machine."""

    def __post_init__(self) -> None:
        is_one = bool(self.history) or self.query is not None
        if is_one == bool(self.input):
            raise ConfigError(
                "give either --history with ids or titles, oldest first, --query with words, or both; or --input FILE "
                "with many histories"
            )
        if self.input and not self.output:
            raise ConfigError("--input needs --output FILE (.csv, .jsonl or .parquet)")
        if self.k < 1:
            raise ConfigError(f"k={self.k} must be at least 1")
        if is_one and (self.partition or self.engine or self.num_processes != 1):
            raise ConfigError("num_processes, partition and engine are for --input FILE with many histories")
        if self.num_processes != "auto" and self.num_processes < 1:
            raise ConfigError(f"num_processes={self.num_processes} must be at least 1, or auto")
        share_of(self.partition)
        if self.engine and self.engine.partition("://")[0] != "spark":
            raise ConfigError(f"engine={self.engine!r}: only spark and spark://MASTER are known, as spark://local[4]")
        if self.engine and (self.partition or self.num_processes != 1):
            raise ConfigError("engine=spark shares the work out itself: leave num_processes and partition away")
        for name in ("input", "output"):
            path = getattr(self, name)
            if path and Path(path).suffix not in SUFFIXES:
                raise ConfigError(f"{name}={path!r}: only .csv, .jsonl and .parquet files are known")
