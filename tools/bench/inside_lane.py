"""Figures of VMs under KVM, taken in the KVM lane's guest: ``inside_lane.py OUT ROUNDS SECTION...`` writes JSON.

Everything here is nested (KVM in a guest that is emulated): ratios say something, times do not. What is compared is run
in turn in the same guest.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests/integration"))

from guest_speed import compare
from host import Host, fresh_host
from measure import Figure
from vsock_guest import (
    BLOCK_BYTES,
    ECHO,
    GIVE_BLOCKS,
    TAKE_BLOCKS,
    VsockGuest,
    kernel_vsock_guest,
    make_block,
    number_block,
    vsock_guest,
)

from hypervisor.vsock.connect import connect_blocking

ASKS, BLOCKS, PATIENCE = 100, 16, 120.0
PHASES = ("vm", "boot", "setup", "containers")
SIDES = {"kernel": "the kernel's vhost-vsock", "ours": "our vhost-user-vsock"}


def starts(rounds: int) -> list[Figure]:
    """Phases of starts under KVM: cold, and from a template."""
    rows: dict[str, list[dict[str, float]]] = {"cold": [], "clone": []}
    with fresh_host("busybox") as host:
        host.run("run", "--rm", "busybox", "--", "true")  # makes the template
        for _ in range(rounds):
            rows["cold"].append(_phases(host, "--cold"))
            rows["clone"] += [_phases(host) for _ in range(2)]
    return [
        Figure(f"nested KVM, {kind}: phase {phase}", "s", tuple(row[phase] for row in of_kind))
        for kind, of_kind in rows.items()
        for phase in PHASES
    ]


def _phases(host: Host, *options: str) -> dict[str, float]:
    done = host.run("run", "--rm", "--timing", *options, "busybox", "--", "true")
    return dict(json.loads(done.stderr.decode().splitlines()[-1])["host"])


async def vsock(rounds: int) -> list[Figure]:
    """The kernel's back end and ours, a guest under KVM each; asks and throughput in turn."""
    asks: dict[str, list[float]] = {side: [] for side in SIDES}
    into: dict[str, list[float]] = {side: [] for side in SIDES}
    out: dict[str, list[float]] = {side: [] for side in SIDES}
    async with kernel_vsock_guest() as kernel, vsock_guest("kvm") as ours:
        guests = {"kernel": kernel, "ours": ours}
        for _ in range(rounds * ASKS):
            for side, guest in guests.items():
                asks[side].append(await asyncio.to_thread(_ask, guest))
        for _ in range(rounds * 2):
            for side, guest in guests.items():
                into[side].append(await asyncio.to_thread(_to_guest, guest))
                out[side].append(await asyncio.to_thread(_from_guest, guest))
    return [
        *(Figure(f"nested KVM, connect, ask, answer: {SIDES[s]}", "ms", tuple(asks[s])) for s in SIDES),
        *(Figure(f"nested KVM, to the guest: {SIDES[s]}", "MB/s", tuple(into[s])) for s in SIDES),
        *(Figure(f"nested KVM, from the guest: {SIDES[s]}", "MB/s", tuple(out[s])) for s in SIDES),
    ]


def _ask(guest: VsockGuest) -> float:
    start = time.perf_counter()
    with connect_blocking(guest.address, ECHO, PATIENCE) as sock:
        sock.sendall(b"?")
        assert sock.recv(1) == b"?"
        return (time.perf_counter() - start) * 1e3


def _to_guest(guest: VsockGuest) -> float:
    block, start = make_block(), time.perf_counter()
    with connect_blocking(guest.address, TAKE_BLOCKS, PATIENCE) as sock:
        start = time.perf_counter()
        for number in range(BLOCKS):
            sock.sendall(number_block(block, number))
        sock.shutdown(socket.SHUT_WR)
        assert sock.makefile().readline() == f"{BLOCKS * BLOCK_BYTES} 0\n"
    return BLOCKS * BLOCK_BYTES / 1e6 / (time.perf_counter() - start)


def _from_guest(guest: VsockGuest) -> float:
    buffer = bytearray(BLOCK_BYTES)
    with connect_blocking(guest.address, GIVE_BLOCKS, PATIENCE) as sock:
        start = time.perf_counter()
        sock.sendall(f"{BLOCKS}\n".encode())
        got = 0
        while n := sock.recv_into(buffer):
            got += n
    assert got == BLOCKS * BLOCK_BYTES
    return got / 1e6 / (time.perf_counter() - start)


def main(out: Path, rounds: int, sections: list[str]) -> None:
    """Each section's figures are in `out` as soon as there are any."""
    kinds: dict[str, Callable[[], list[Figure]]] = {
        "vsock": lambda: asyncio.run(vsock(rounds)),
        "speed": lambda: compare(rounds, "a guest under nested KVM"),
        "starts": lambda: starts(rounds),
    }
    figures: list[Figure] = []
    for section in sections:
        for figure in kinds[section]():
            print(figure.row(), flush=True)
            figures.append(figure)
        out.write_text(json.dumps([figure.to_json() for figure in figures]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
