"""Stage: engines in, an HTTP service out."""

from __future__ import annotations

import logging
import resource
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import uvicorn

from cprec.errors import ConfigError
from cprec.progress import say
from cprec.serve.app import make_app
from cprec.serve.config import ServeConfig
from cprec.serve.engine import Baseline, Engine
from cprec.serve.items import ItemStore
from cprec.serve.service import Service

MAX_CONNECTIONS = 4_000
"""Connections beyond which uvicorn answers 503 by itself, or half as many as the process may open files, if that is
fewer. The application refuses requests long before."""
SWITCH_SECONDS = 0.0005
"""How long the engine's thread may run before it lets the thread of the connections go on. With Python's 5 ms a busy
engine would delay each step of each request by as much."""
IDLE_SECONDS = 75
"""How long an unused connection stays open: longer than proxies keep theirs, so that they never use a closed one."""
GRACE_SECONDS = 30
"""How long requests under way may take once the service shuts down."""


def serve(config: ServeConfig, engines: Sequence[Engine], baselines: Sequence[Baseline]) -> None:
    """Answer requests until SIGINT or SIGTERM; requests under way are finished.

    Raises ConfigError if the address is taken or an older process keeps the state folder for itself, DataError if the
    items stored there are damaged.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    with _listening(config.host, config.port) as listener:
        store = ItemStore(config.state)
        service = Service(engines, baselines, store, deadline_ms=config.deadline_ms, max_batch=config.max_batch)
        app = make_app(
            service, token=config.token, max_body_mb=config.max_body_mb, cors=config.cors, root_path=config.root_path
        )
        host = f"[{config.host}]" if ":" in config.host else config.host
        say(f"serving on http://{host}:{listener.getsockname()[1]} (the interface: /docs; stop: Ctrl-C)")
        try:
            with _surviving_signals():
                _server(app).run(sockets=[listener])
        finally:
            service.close()
    say("stopped: every request that was taken has its answer")


def _server(app: Any) -> uvicorn.Server:
    return uvicorn.Server(
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


@contextmanager
def _surviving_signals() -> Iterator[None]:
    """Ignore the signal that uvicorn sends to this process again after it has shut down in order."""
    handlers = {number: signal.signal(number, _ignore) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


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
    """Raise the process's limit of open files as far as allowed, and return how many connections it leaves room for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * MAX_CONNECTIONS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else min(MAX_CONNECTIONS, soft // 2)


def _ignore(*_: Any) -> None:
    pass
