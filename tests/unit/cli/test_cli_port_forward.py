"""hv port-forward as a real process: the real server of port-forwards, with this machine's ports for a pod's."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import socketserver
import struct
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256

import pytest
from hostd_standin import HV, Hv, StandIn

from hypervisor.cli.forwarding import joined
from hypervisor.cli.port_forward import parse_ports
from hypervisor.cli.upstream import translated

PATIENCE = 20


class Echo(socketserver.BaseRequestHandler):
    """Answers with the digest of everything, once that has ended; then with as many bytes as it got.

    The word "reset" is answered with a reset.
    """

    def handle(self) -> None:
        sock: socket.socket = self.request
        got = bytearray()
        while data := sock.recv(65536):
            got += data
            if got == b"reset":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                sock.close()
                return
        sock.sendall(sha256(got).digest() + bytes(len(got)))

    def finish(self) -> None:
        self.request.close()


class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 64

    def shutdown_request(self, request: socket.socket | tuple[bytes, socket.socket]) -> None:
        """The handler has closed it."""


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of a server that speaks only after the client has half-closed."""
    with Server(("127.0.0.1", 0), Echo) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


@contextlib.contextmanager
def forwarded(
    environment: dict[str, str], *args: str, count: int = 1
) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """hv port-forward in the background, and its local ports."""
    process = subprocess.Popen(
        [*HV, "port-forward", *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    try:
        lines = [process.stdout.readline() for _ in range(count)]
        found = [re.fullmatch(r"Forwarding from 127\.0\.0\.1:(\d+) -> \d+\n", line) for line in lines]
        assert all(found), (lines, process.stderr and process.poll() is not None and process.stderr.read())
        yield process, [int(match[1]) for match in found if match]
    finally:
        process.kill()
        process.communicate()


def ask(port: int, data: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as sock:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        answer = bytearray()
        while piece := sock.recv(65536):
            answer += piece
        return bytes(answer)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def test_both_directions_and_half_close(environment: dict[str, str], host: StandIn, echo: int) -> None:
    data = bytes(range(256)) * 4096
    local = free_port()
    with forwarded(environment, "hello", f"{local}:{echo}") as (_, ports):
        assert ports == [local]
        assert ask(local, data) == sha256(data).digest() + bytes(len(data))
        assert ask(local, b"") == sha256(b"").digest()


def test_many_connections_at_once_on_two_ports(environment: dict[str, str], host: StandIn, echo: int) -> None:
    payloads = [bytes([n]) * (n * 5000) for n in range(60)]
    with forwarded(environment, "hello", f":{echo}", f":{echo}", count=2) as (_, ports), ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda n: ask(ports[n % 2], payloads[n]), range(60)))
    assert answers == [sha256(p).digest() + bytes(len(p)) for p in payloads]


def test_a_refused_port_is_told_and_the_others_go_on(environment: dict[str, str], host: StandIn, echo: int) -> None:
    refused = free_port()
    with forwarded(environment, "hello", f":{refused}", f":{echo}", count=2) as (process, ports):
        assert process.stderr is not None
        for _ in range(2):
            with contextlib.suppress(ConnectionError):  # it may see the reset before the end
                assert ask(ports[0], b"x") == b""
            line = process.stderr.readline()
            assert line.startswith(f"hv: error forwarding port {refused} to pod: ")
            assert "Connection refused" in line
        assert ask(ports[1], b"on") == sha256(b"on").digest() + bytes(2)


def test_a_reset_in_the_pod_is_one_here_and_no_error(environment: dict[str, str], host: StandIn, echo: int) -> None:
    with forwarded(environment, "hello", f":{echo}") as (process, ports):
        with socket.create_connection(("127.0.0.1", ports[0]), PATIENCE) as sock:
            sock.sendall(b"reset")
            with pytest.raises(ConnectionResetError):
                sock.recv(1)
        assert ask(ports[0], b"on") == sha256(b"on").digest() + bytes(2)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=PATIENCE)[1] == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_connections_open(
    environment: dict[str, str], host: StandIn, echo: int, number: signal.Signals
) -> None:
    with (
        forwarded(environment, "hello", f":{echo}") as (process, ports),
        socket.create_connection(("127.0.0.1", ports[0]), PATIENCE) as sock,
    ):
        sock.sendall(b"half")
        process.send_signal(number)
        assert process.communicate(timeout=PATIENCE) == ("", "")
        assert process.returncode == 128 + number


def test_mistakes_are_one_line(hv: Hv, echo: int) -> None:
    busy = hv("port-forward", "hello", f"{echo}:80")
    assert (busy.stdout, busy.returncode) == ("", 1)
    assert busy.stderr == f"hv: cannot listen on 127.0.0.1:{echo}: Address already in use\n"
    assert hv("port-forward", "nothere", "80").stderr == "hv: there is no pod nothere; hv ps lists them\n"
    for args in (["80:"], ["0"], ["x:80"], ["65536"], ["1:2:3"], [], ["80", "--address", "nowhere"]):
        done = hv("port-forward", "hello", *args)
        assert (done.returncode, done.stderr.count("\n"), done.stdout) == (2, 1, ""), args


def test_ports() -> None:
    assert [parse_ports(t) for t in ("80", "8080:80", ":80", "0:80")] == [(80, 80), (8080, 80), (0, 80), (0, 80)]
    assert (joined("::1", 80), joined("127.0.0.1", 80)) == ("[::1]:80", "127.0.0.1:80")


def test_in_a_cluster_it_is_the_pods_subresource() -> None:
    assert translated(["portForward", "ns", "web"], []) == "/api/v1/namespaces/ns/pods/web/portforward"
