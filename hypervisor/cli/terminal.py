"""The user's terminal: raw mode that is always undone, its size, and the keys that detach from a container."""

from __future__ import annotations

import os
import termios
import tty
from contextlib import suppress

DETACH_KEYS = b"\x10\x11"  # ctrl-p ctrl-q, as docker has it


class RawMode:
    """A context manager that puts a terminal into raw mode and restores it however the block ends.

    Signals that end the process must have been turned into exceptions (see `hypervisor.cli.signals`), or the terminal
    stays raw. Does nothing where `fd` is no terminal.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._saved = termios.tcgetattr(fd) if os.isatty(fd) else None

    def __enter__(self) -> RawMode:
        self.apply()
        return self

    def apply(self) -> None:
        """Raw mode (again: after the process was stopped and continued, the shell may have reset it)."""
        if self._saved is not None:
            tty.setraw(self._fd, termios.TCSADRAIN)

    def __exit__(self, *_exc: object) -> None:
        if self._saved is not None:
            # An error means that the terminal is gone: there is nothing left to restore.
            with suppress(termios.error):
                termios.tcsetattr(self._fd, termios.TCSADRAIN, self._saved)


def size(*fds: int) -> tuple[int, int] | None:
    """Columns and rows of the first of `fds` that is a terminal with a size."""
    for fd in fds:
        try:
            columns, rows = os.get_terminal_size(fd)
        except OSError:
            continue
        if columns and rows:
            return columns, rows
    return None


class DetachFilter:
    """Finds the detach keys in what is typed, also when they come in two reads."""

    def __init__(self, keys: bytes = DETACH_KEYS) -> None:
        self._keys = keys
        self._matched = 0

    def feed(self, data: bytes) -> tuple[bytes, bool]:
        """What is to be sent on, and whether the keys were typed; what follows them is dropped.

        A first key is held back until the next byte says whether it was the beginning of the sequence.
        """
        data = self._keys[: self._matched] + data
        at = data.find(self._keys)
        if at >= 0:
            self._matched = 0
            return data[:at], True
        self._matched = next((n for n in range(len(self._keys) - 1, 0, -1) if data.endswith(self._keys[:n])), 0)
        return data[: len(data) - self._matched], False
