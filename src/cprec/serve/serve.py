"""Stage: engines in, an HTTP service out."""

from __future__ import annotations

import logging
import resource
import signal
import socket
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cprec.errors import ConfigError
from cprec.progress import say
from cprec.serve.config import ServeConfig

if TYPE_CHECKING:
    from cprec.serve.engine import Baseline, Engine

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
