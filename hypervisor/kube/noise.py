"""What strangers can do to a daemon's log."""

from __future__ import annotations

import logging

from aiohttp.http_exceptions import HttpProcessingError


def keep_noise_out() -> None:
    """From now on, what breaks the rules of HTTP is answered 400 and not logged: anybody who reaches a port could fill
    a disk with it, and push what matters out of a bounded log."""
    logging.getLogger("aiohttp.server").addFilter(is_ours)


def is_ours(record: logging.LogRecord) -> bool:
    """False for what a client did that sent no HTTP."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, HttpProcessingError)
