"""Stage: engines in, an HTTP service out."""

from __future__ import annotations

import logging
import os
import re
import resource
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from cprec.errors import ConfigError
from cprec.progress import say

if TYPE_CHECKING:
    from cprec.serve.engine import Baseline, Engine

TOKEN = "CPREC_TOKEN"
"""The environment variable with the token: a command line can be read by everybody on the machine."""
LOOPBACK = ("127.0.0.1", "::1", "localhost")
OWN_PATHS = ("v1", "docs", "redoc", "openapi.json", "health", "ready", "metrics")
"""What paths of the service begin with."""
MAX_CONNECTIONS = 4_000
"""Beyond these, or half of the files that the process may open, uvicorn answers 503 by itself; the application sheds
load long before."""
SWITCH_SECONDS = 0.0005
"""After which the engine's thread lets that of the connections go on: with Python's 5 ms a busy engine holds up each
step of each request by so much."""
IDLE_SECONDS = 75
"""After which a connection that is not used is closed: longer than proxies keep theirs, so that they never use a closed
one."""
GRACE_SECONDS = 30
"""What requests under way may take once the service shuts down."""


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Settings of the service."""

    models: tuple[str, ...]
    """Model folders that `cprec finetune` or `cprec pretrain` wrote; the first answers where a request names none."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What reads for the models: transformers in this process, or vLLM, an extra for machines with a GPU. Lists are the
    same up to rounding."""
    data: str | None = None
    """Data folder that the models were made from, for the baselines that answer when the model has no time; where it is
    none, the one that the first model folder names, if it is there."""
    state: str | None = None
    """Folder for new and withdrawn items, which one process has to itself; none refuses such changes."""
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


def serve(config: ServeConfig, engines: Sequence[Engine], baselines: Sequence[Baseline]) -> None:
    """Answer requests until SIGINT or SIGTERM; requests under way are finished.

    Raises ConfigError where the address is taken or the state folder belongs to another process, DataError where what
    is stored there is damaged.
    """
    import uvicorn

    from cprec.serve.app import make_app
    from cprec.serve.items import ItemStore
    from cprec.serve.service import Service

    sys.setswitchinterval(SWITCH_SECONDS)
    with _listening(config.host, config.port) as listener:
        service = Service(
            engines,
            baselines,
            ItemStore(config.state),
            deadline_ms=config.deadline_ms,
            max_batch=config.max_batch,
        )
        app = make_app(
            service,
            token=config.token,
            max_body_mb=config.max_body_mb,
            cors=config.cors,
            root_path=config.root_path,
        )
        logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                lifespan="on",
                ws="none",
                limit_concurrency=_max_connections(),
                timeout_keep_alive=IDLE_SECONDS,
                timeout_graceful_shutdown=GRACE_SECONDS,
            )
        )
        host = f"[{config.host}]" if ":" in config.host else config.host
        say(f"serving on http://{host}:{listener.getsockname()[1]} (the interface: /docs; stop: Ctrl-C)")
        # uvicorn raises a signal again once it has shut down in order; that is no reason to die of it.
        handlers = {number: signal.signal(number, _ignore) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            server.run(sockets=[listener])
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            service.close()
    say("stopped: every request that was taken has its answer")


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise ConfigError(
            f"host={host} port={port}: cannot be listened on ({error.strerror}); choose another port, or port=0 for a "
            "free one"
        ) from None


def _max_connections() -> int:
    """As many as there may be files for, once the process's limit is as high as it may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * MAX_CONNECTIONS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else min(MAX_CONNECTIONS, soft // 2)


def _ignore(*_: Any) -> None:
    pass
