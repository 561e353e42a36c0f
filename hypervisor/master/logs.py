"""The master's log: one readable line each on stderr, errors with a plain traceback.

No values of variables stand in it: those of a request may be Secrets, and rendering them takes seconds of the loop that
serves everybody. Where stderr is ``master.log`` of the master's own folder (``hv cluster`` starts it so), the file is
bounded: it is moved aside to ``master.log.1`` and so on. What only breaks the rules of HTTP is answered 400 and not
logged: anybody who reaches the port could fill a disk with it.
"""

from __future__ import annotations

import logging
import logging.handlers
import os
import sys
from pathlib import Path
from typing import Any

import structlog

from hypervisor.kube.noise import keep_noise_out

FILE = "master.log"
MAX_BYTES = 16 * 1024 * 1024
KEPT = 2


def set_up(state: Path, *, level: int = logging.INFO) -> None:
    """Sends this process's log, the libraries' included, to stderr."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="%Y-%m-%d %H:%M:%S", utc=True),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    renderer = structlog.dev.ConsoleRenderer(
        colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
    )
    handler = _handler(state)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    keep_noise_out()


def _handler(state: Path) -> logging.Handler:
    own = state / FILE
    try:
        bounded = os.path.samestat(os.fstat(sys.stderr.fileno()), own.stat())
    except (OSError, ValueError):  # no such file, or no stderr
        bounded = False
    if bounded:
        return logging.handlers.RotatingFileHandler(own, maxBytes=MAX_BYTES, backupCount=KEPT, encoding="utf-8")
    return logging.StreamHandler(sys.stderr)
