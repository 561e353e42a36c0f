"""Bounded logs of byte streams: the guest's console and QEMU's stderr, drained for ever, kept to a size.

Theory of operation
-------------------
vmx, not hostd, drains them: hostd may restart at any time, and a console that nobody reads would block the guest. One
thread reads every source as fast as it comes and appends to its log. A log that would outgrow its limit is cut in
place to the newest half, under an exclusive `flock`, so that one descriptor is all that the confined process needs
(no rename, no directory that it may write to). Its first line then says how much was dropped::

    [... 1048576 earlier bytes dropped]

A reader (`read_tail`, `LogFollower`) takes the lock shared, and by that line knows the absolute position of what it
reads, so it misses nothing that is there and repeats nothing. A write error (host disk full) drops that text and goes
on draining.

States of a source: OPEN -> (read gives nothing, or fails) -> EOF. When all are at EOF, QEMU is gone; `done` is set.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import selectors
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_CHUNK = 64 * 1024
_DROPPED = re.compile(rb"\[\.\.\. (\d{1,20}) earlier bytes dropped\]\n")
_DROPPED_MAX = 64


@dataclass(frozen=True, slots=True)
class StreamLog:
    """One stream and where it goes.

    :param source_fd: pipe or stream socket to drain
    :param log_fd: the log, a regular file open for reading and writing
    :param max_bytes: the log never grows beyond this; after a cut the newest half is left
    """

    source_fd: int
    log_fd: int
    max_bytes: int


class StreamLogs:
    """Drains streams into bounded logs in one thread; owns the descriptors it was given and closes them at EOF."""

    def __init__(self, streams: Sequence[StreamLog]) -> None:
        #: set once every source is at EOF and all text is in the logs
        self.done = threading.Event()
        self._streams = tuple(streams)
        self._thread = threading.Thread(target=self._run, name="logs", daemon=True)

    def start(self) -> None:
        """Begin to drain."""
        self._thread.start()

    def join(self, timeout: float | None = None) -> bool:
        """Wait until all is drained; False when `timeout` (seconds) passed first."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            for stream in self._streams:
                os.set_blocking(stream.source_fd, False)
                selector.register(stream.source_fd, selectors.EVENT_READ, stream)
            while selector.get_map():
                for key, _ in selector.select():
                    if not _drain(key.data):
                        selector.unregister(key.fd)
                        os.close(key.data.source_fd)
                        os.close(key.data.log_fd)
        self.done.set()


def _drain(stream: StreamLog) -> bool:
    """Move one chunk; False at the source's end."""
    try:
        data = os.read(stream.source_fd, _CHUNK)
    except BlockingIOError:
        return True
    except OSError:
        return False
    if data:
        with contextlib.suppress(OSError):
            append_bounded(stream.log_fd, data, stream.max_bytes)
    return bool(data)


def append_bounded(fd: int, data: bytes, max_bytes: int) -> None:
    """Append `data` to the log `fd`; cut it to its newest half when it would exceed `max_bytes`.

    :raises OSError: the disk is full or failing; what was there before may have been cut
    """
    with _locked(fd, fcntl.LOCK_EX):
        size = os.fstat(fd).st_size
        if size + len(data) <= max_bytes:
            _write_all(fd, data, size)
            return
        dropped, start = _dropped(fd)
        text = os.pread(fd, size, start) + data
        kept = text[-(max_bytes // 2) :]
        header = f"[... {dropped + len(text) - len(kept)} earlier bytes dropped]\n".encode()
        os.ftruncate(fd, 0)
        _write_all(fd, header + kept, 0)


def _write_all(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        n = os.pwrite(fd, view, offset)
        view, offset = view[n:], offset + n


def _dropped(fd: int) -> tuple[int, int]:
    """How many bytes were cut from the log's beginning, and where its text starts."""
    match = _DROPPED.match(os.pread(fd, _DROPPED_MAX, 0))
    return (int(match[1]), match.end()) if match else (0, 0)


@contextlib.contextmanager
def _locked(fd: int, how: int) -> Iterator[None]:
    fcntl.flock(fd, how)
    try:
        yield
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)


def read_tail(path: Path, max_bytes: int = 1 << 30, *, lines: int | None = None) -> bytes:
    """The log's newest text; empty when there is no log. Blocks on disk only.

    :param max_bytes: at most so much
    :param lines: at most so many lines
    """
    try:
        with path.open("rb") as file, _locked(file.fileno(), fcntl.LOCK_SH):
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - max_bytes))
            text = file.read(max_bytes)
    except FileNotFoundError:
        return b""
    return text if lines is None else _last_lines(text, lines)


def _last_lines(text: bytes, lines: int) -> bytes:
    return b"".join(text.splitlines(keepends=True)[-lines:]) if lines else b""


class LogFollower:
    """Reads a growing bounded log piece by piece, across cuts; text that was cut unread is skipped. Not thread-safe.

    :param lines: begin with so many last lines; None: with all there is
    """

    def __init__(self, path: Path, *, lines: int | None = None) -> None:
        self._path = path
        self._lines = lines
        self._position: int | None = None  # absolute: bytes of the stream, dropped ones included

    def read_new(self) -> bytes:
        """What came since the last call; empty when nothing did, or there is no log (yet). Blocks on disk only."""
        try:
            with self._path.open("rb") as file, _locked(file.fileno(), fcntl.LOCK_SH):
                dropped, start = _dropped(file.fileno())
                skip = 0 if self._position is None else max(0, self._position - dropped)
                text = os.pread(file.fileno(), os.fstat(file.fileno()).st_size, start + skip)
                end = dropped + skip + len(text)
        except FileNotFoundError:
            return b""
        if self._position is None and self._lines is not None:
            text = _last_lines(text, self._lines)
        self._position = end
        return text
