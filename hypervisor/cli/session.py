"""One exec or attach session: the terminal or pipes here, a process in a container there.

Theory of operation
-------------------
One poll loop, no threads. It watches the WebSocket, standard input, the two outputs and the signal pipe:

* stdin is read only while less than `HIGH_WATER` bytes wait to be sent, and the socket only while less than that waits
  to be written: a slow end stops the other one, and memory stays bounded;
* the socket does not block; the outputs do (their flags belong to whoever shares the terminal or pipe with us), so
  they are written when poll says so, and never more than a pipe takes without blocking (`SLICE`);
* stdin's end is sent as CLOSE of channel 0 (v5), so the process sees its end of file and may still answer;
* the session is over when the Status on channel 3 has come *and* every output byte has been written; a connection that
  ends before that is an error, never a success.

Signals: SIGWINCH becomes a resize; SIGINT, SIGTERM, SIGHUP and SIGQUIT go to `on_signal`, which by default raises
`Interrupted`: the terminal is restored and the connection closes, which ends an exec'd process.
"""

from __future__ import annotations

import json
import os
import select
import signal
import stat

from hypervisor.cli import terminal, ws
from hypervisor.cli.rest import Connection
from hypervisor.cli.signals import Interrupted, SignalPipe
from hypervisor.errors import HvError, ProtocolError, Unavailable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

V5, V4 = "v5.channel.k8s.io", "v4.channel.k8s.io"
PROTOCOLS = (V5, V4)
STDIN, STDOUT, STDERR, STATUS, RESIZE, CLOSE = 0, 1, 2, 3, 4, 255

HIGH_WATER = 512 * 1024
READ = 64 * 1024
RECEIVE = 256 * 1024
SLICE = 4096  # PIPE_BUF: poll promises that this much fits
_IN = select.POLLIN | select.POLLHUP | select.POLLERR


class Outcome:
    """How a session ended.

    :ivar exit_code: of the process; None when it could not be run, or when the user detached
    :ivar message: why it could not be run
    :ivar detached: the user typed the detach keys; the container goes on
    """

    __slots__ = ("detached", "exit_code", "message")

    def __init__(self, exit_code: int | None, message: str = "", detached: bool = False) -> None:
        self.exit_code = exit_code
        self.message = message
        self.detached = detached


def outcome_of(status: Any) -> Outcome:
    """What the Status object on the error channel says."""
    if not isinstance(status, dict):
        raise ProtocolError("hostd sent a status that is no object")
    if status.get("status") == "Success":
        return Outcome(0)
    message = str(status.get("message") or "the process could not be run")
    for cause in (status.get("details") or {}).get("causes") or ():
        if cause.get("reason") == "ExitCode" and str(cause.get("message")).isdigit():
            return Outcome(int(cause["message"]), message)
    return Outcome(None, message)


class _Output:
    """Bytes on their way to a descriptor of ours."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.pending = bytearray()
        mode = os.fstat(fd).st_mode
        self._slice = HIGH_WATER if stat.S_ISREG(mode) else SLICE

    def write_some(self) -> None:
        """Writes what fits. :raises BrokenPipeError: nobody reads any more"""
        with memoryview(self.pending) as view:
            written = os.write(self.fd, view[: self._slice])
        del self.pending[:written]


class Session:
    """The loop described above. Owns the socket that it was given, and closes it."""

    def __init__(
        self,
        connection: Connection,
        protocol: str,
        *,
        stdin: int | None,
        tty: bool,
        detach_keys: bool = False,
        on_signal: Callable[[int], None] | None = None,
    ) -> None:
        """
        :param protocol: the agreed subprotocol
        :param stdin: descriptor to read; None sends nothing
        :param tty: the process has a terminal: ours goes raw, and its size is sent
        :param detach_keys: ctrl-p ctrl-q leaves the container running
        :param on_signal: called with a signal that asks us to end; raises, or returns to let the session go on
        """
        self._sock, rest = connection.detach()
        self._sock.setblocking(False)
        self._decoder = ws.Decoder(rest)
        self._half_close = protocol == V5
        self._stdin = stdin
        self._tty = tty
        self._filter = terminal.DetachFilter() if detach_keys and tty else None
        self._on_signal = on_signal or _end
        self._outputs = {STDOUT: _Output(1), STDERR: _Output(2)}
        self._unsent = bytearray()
        self._outcome: Outcome | None = None
        self._broken: HvError | None = None  # raised once all output that came before is written
        self._raw = terminal.RawMode(0) if tty and stdin is not None else None

    def run(self) -> Outcome:
        """Runs the session to its end.

        :raises Interrupted: see the module's text
        :raises BrokenPipeError: nobody reads our output any more
        :raises Unavailable: the connection to hostd broke
        """
        try:
            with SignalPipe() as signals:
                if self._raw is None:
                    return self._loop(signals)
                with self._raw:
                    return self._loop(signals)
        finally:
            self._goodbye()
            self._sock.close()

    def _loop(self, signals: SignalPipe) -> Outcome:
        self._send_size()
        self._receive_messages()  # hostd may have sent some together with its handshake
        while not self._over or any(o.pending for o in self._outputs.values()):
            ready = self._wait(signals.fd)
            if signals.fd in ready:
                self._handle_signals(signals)
            for output in self._outputs.values():
                if output.pending and output.fd in ready:
                    output.write_some()
            if not self._over:
                self._exchange(ready)
        if self._outcome is None:
            raise self._broken or ProtocolError("the session ended without a status")
        return self._outcome

    @property
    def _over(self) -> bool:
        return self._outcome is not None or self._broken is not None

    def _wait(self, signal_fd: int) -> dict[int, int]:
        """Sleeps until something that the state allows can be done."""
        poll = select.poll()
        poll.register(signal_fd, select.POLLIN)
        backlog = 0
        for output in self._outputs.values():
            backlog += len(output.pending)
            if output.pending:
                poll.register(output.fd, select.POLLOUT)
        if not self._over:
            receiving = select.POLLIN if backlog < HIGH_WATER else 0
            poll.register(self._sock.fileno(), receiving | (select.POLLOUT if self._unsent else 0))
            if self._stdin is not None and len(self._unsent) < HIGH_WATER:
                poll.register(self._stdin, select.POLLIN)
        return dict(poll.poll())

    def _exchange(self, ready: dict[int, int]) -> None:
        events = ready.get(self._sock.fileno(), 0)
        if events & _IN:
            self._receive()
        if self._stdin is not None and self._stdin in ready:
            self._read_stdin(self._stdin)
        if self._unsent and not self._over:
            self._flush()

    # ---- towards the container ---------------------------------------------------------------------------------------

    def _read_stdin(self, fd: int) -> None:
        try:
            data = os.read(fd, READ)
        except OSError:
            data = b""  # closed, or a terminal that is gone: the end, as for any other program
        if not data:
            self._end_stdin()
            return
        if self._filter is not None:
            data, detached = self._filter.feed(data)
            if detached:
                self._outcome = Outcome(None, detached=True)
        if data:
            self._send(bytes((STDIN,)) + data)

    def _end_stdin(self) -> None:
        self._stdin = None
        if self._half_close:
            self._send(bytes((CLOSE, STDIN)))

    def _send_size(self) -> None:
        if self._tty and (size := terminal.size(1, 0, 2)):
            self._send(bytes((RESIZE,)) + json.dumps({"Width": size[0], "Height": size[1]}).encode())

    def _send(self, message: bytes) -> None:
        self._unsent += ws.encode(ws.BINARY, message)

    def _flush(self) -> None:
        try:
            while self._unsent:
                with memoryview(self._unsent) as view:
                    sent = self._sock.send(view[:RECEIVE])
                del self._unsent[:sent]
        except BlockingIOError:
            pass
        except OSError:
            # The process may have ended without reading all of its input: its status is still on the way to us.
            self._unsent.clear()
            self._stdin = None

    # ---- from the container ------------------------------------------------------------------------------------------

    def _receive(self) -> None:
        try:
            data = self._sock.recv(RECEIVE)
        except BlockingIOError:
            return
        except OSError as e:
            self._broken = Unavailable(f"the connection to hostd broke ({e.strerror}); see hv host status")
            return
        if not data:
            self._broken = Unavailable("hostd closed the connection before the process ended; see hv host status")
            return
        self._decoder.feed(data)
        self._receive_messages()

    def _receive_messages(self) -> None:
        for opcode, payload in self._decoder.messages():
            if opcode == ws.PING:
                self._unsent += ws.encode(ws.PONG, payload)
            elif opcode == ws.CLOSE and self._outcome is None:
                why = payload[2:].decode("utf-8", "replace") or "it gave no reason"
                self._broken = Unavailable(f"hostd ended the session before the process ended: {why}")
            elif opcode == ws.BINARY and payload:
                self._dispatch(payload[0], payload[1:])

    def _dispatch(self, channel: int, data: bytes) -> None:
        if channel in self._outputs:
            self._outputs[channel].pending += data
        elif channel == STATUS:
            try:
                self._outcome = outcome_of(json.loads(data))
            except ValueError as e:
                raise ProtocolError(f"hostd sent a status that is no JSON: {e}") from e

    # ---- signals and the end -----------------------------------------------------------------------------------------

    def _handle_signals(self, signals: SignalPipe) -> None:
        for number in signals.take():
            if number == signal.SIGWINCH:
                self._send_size()
            elif number == signal.SIGCONT:
                if self._raw is not None:
                    self._raw.apply()
                self._send_size()
            else:
                self._on_signal(number)

    def _goodbye(self) -> None:
        """A closing handshake, if it can be had without waiting."""
        try:
            if not self._unsent:
                self._sock.send(ws.encode(ws.CLOSE, (1000).to_bytes(2, "big")))
        except OSError:
            pass


def _end(signum: int) -> None:
    raise Interrupted(signum)
