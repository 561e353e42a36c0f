"""Work inside a guest beside the same work in a plain process on the host, the same static program in both."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from host import fresh_host
from measure import Figure

SOURCE = Path(__file__).with_suffix(".c")
#: the host's loopback, as a pod with QEMU's user-mode network sees it
HOST_OF_GUEST = "10.0.2.2"
UNITS = {  # by the program's names of cases
    "cpu": "million steps of xorshift",
    "memcpy_bytes": "MB copied",
    "syscall": "million getppid",
    "fork_wait": "thousand processes forked, ended and waited for",
    "file_write_bytes": "MB written to a file and flushed",
    "file_read_bytes": "MB read from a file",
    "tcp_loopback_ask": "thousand bytes sent and echoed over loopback TCP",
    "tcp_from_host_bytes": "MB received over TCP from the host",
}
_SCALE = {"fork_wait": 1e3, "tcp_loopback_ask": 1e3}


def parse(output: str) -> dict[str, float]:
    """Operations a second by case."""
    rows = (line.split() for line in output.splitlines())
    return {name: int(operations) / int(ns) * 1e9 for name, operations, ns in rows}


@contextmanager
def byte_server() -> Iterator[int]:
    """A server on 127.0.0.1 that sends zeroes to whoever connects, until they go; its port."""
    block = bytes(65536)

    def serve(client: socket.socket) -> None:
        with client, suppress(OSError):
            while True:
                client.sendall(block)

    def accept() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)


@contextmanager
def program() -> Iterator[Path]:
    """The program: compiled now, or from where HV_PREBUILT says."""
    if "HV_PREBUILT" in os.environ:
        yield Path(os.environ["HV_PREBUILT"], "guest_speed")
        return
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "guest_speed"
        subprocess.run(["gcc", "-O2", "-static", "-o", made, SOURCE], check=True)
        yield made


def run(rounds: int) -> list[Figure]:
    """What a guest and a plain process do in a second, and how many times slower each kind of work is inside."""
    return compare(rounds, "a guest")


def compare(rounds: int, guest: str) -> list[Figure]:
    """As `run`; `guest` is what the guest is called."""
    rates: dict[str, list[tuple[float, float]]] = {}
    with (
        program() as binary,
        tempfile.TemporaryDirectory() as folder,
        fresh_host("busybox") as host,
        byte_server() as at,
    ):
        host.run("run", "-d", "--name", "speed", "--memory", "256Mi", "busybox", "--", "sleep", "100000")
        host.run("cp", str(binary), "speed:/guest_speed")
        for _ in range(rounds):
            plain = [str(binary), folder, "127.0.0.1", str(at)]
            outside = parse(subprocess.run(plain, check=True, capture_output=True, text=True).stdout)
            command = ("exec", "speed", "--", "/guest_speed", "/", HOST_OF_GUEST, str(at))
            inside = parse(host.run(*command).stdout.decode())
            for name, rate in outside.items():
                rates.setdefault(name, []).append((rate, inside[name]))
    return [figure for name, pairs in rates.items() for figure in _figures(name, guest, pairs)]


def _figures(name: str, guest: str, pairs: list[tuple[float, float]]) -> list[Figure]:
    scale = _SCALE.get(name, 1e6)
    plain, inside = (tuple(rate / scale for rate in rates) for rates in zip(*pairs, strict=True))
    slower = tuple(outside / within for outside, within in pairs)
    return [
        Figure(f"{UNITS[name]}: a plain process", "1/s", plain),
        Figure(f"{UNITS[name]}: in {guest}", "1/s", inside),
        Figure(f"{UNITS[name]}: a plain process's rate over {guest}'s", "x", slower),
    ]
