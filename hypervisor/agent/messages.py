"""Termination messages: what a container left in its message file, or the end of its log, told with its end."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from . import logs
from .server import complain

if TYPE_CHECKING:
    from .container import Container

LOG_BYTES = 2048
LOG_LINES = 80


def read(container: Container, *, failed: bool) -> str:
    """The message of a container that has just ended; empty when it left none. Never raises."""
    message = container.spec.message
    if message is None:
        return ""
    try:
        text = _head(container.root.message_file, message.max_bytes)
        if not text and message.from_logs and failed:
            text = _log_end(container.log_directory, container.attempt, min(LOG_BYTES, message.max_bytes))
    except OSError as e:
        complain(f"termination message of {container.name}: {e}")
        return ""
    return text.decode("utf-8", "replace")


def _head(path: str, limit: int) -> bytes:
    # The container can write the file, but not put anything else in its place: it is the target of a bind mount there.
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return os.read(fd, limit)
    finally:
        os.close(fd)


def _log_end(directory: str, attempt: int, limit: int) -> bytes:
    end = b""
    for chunk in logs.read_log(directory, attempt, logs.Selection(tail=LOG_LINES)):
        end = (end + chunk)[-limit:]
    return end
