"""Signals as bytes in a pipe that a poll loop reads, so that none is missed between a check and the next poll."""

from __future__ import annotations

import os
import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType

WATCHED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGWINCH, signal.SIGCONT)


class Interrupted(BaseException):
    """A signal that asks the process to end. Not an `Exception`: nothing but the outermost layer handles it."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"signal {signum}")
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """What a shell reports for a process that this signal ended."""
        return 128 + self.signum


def _noted(_signum: int, _frame: FrameType | None) -> None:
    """The wake-up descriptor carries the number; the handler only has to exist."""


class SignalPipe:
    """A context manager within which the watched signals do nothing but appear in `take`. Main thread only."""

    def __init__(self) -> None:
        self.fd, self._write_fd = os.pipe()
        os.set_blocking(self.fd, False)
        os.set_blocking(self._write_fd, False)
        self._handlers = {number: signal.getsignal(number) for number in WATCHED}
        self._wakeup = -1

    def __enter__(self) -> SignalPipe:
        self._wakeup = signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        for number, handler in self._handlers.items():
            if handler is not signal.SIG_IGN:  # nohup stays nohup
                signal.signal(number, _noted)
        return self

    def __exit__(self, *_exc: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self.fd)
        os.close(self._write_fd)

    def take(self) -> bytes:
        """The numbers of the signals that came since the last call."""
        try:
            return os.read(self.fd, 64)
        except BlockingIOError:
            return b""


def raise_on_ending_signals() -> None:
    """Turns SIGTERM and SIGHUP into `Interrupted`, as Python does with SIGINT, so that clean-up code runs."""

    def ended(signum: int, _frame: FrameType | None) -> None:
        raise Interrupted(signum)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, ended)
