"""Bulk data through exec and cp, checked by hash, and exec as the daemon's own clients see it."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from pathlib import Path

from host import Host, fresh_host
from measure import Figure, interleaved

SIZE = 100 * 1000 * 1000


def run(rounds: int) -> list[Figure]:
    """Megabytes a second both ways, each transfer checked."""
    data = os.urandom(SIZE)
    with tempfile.TemporaryDirectory() as folder, fresh_host("busybox") as host:
        source = Path(folder) / "source"
        source.write_bytes(data)
        host.run("run", "-d", "--name", "bulk", "--disk-size", "2Gi", "busybox", "--", "sleep", "100000")
        samples = interleaved(
            rounds,
            cat=lambda: _cat(host, data),
            into=lambda: SIZE / 1e6 / host.seconds("cp", str(source), "bulk:/file"),
            out=lambda: _out(host, data, Path(folder) / "back"),
        )
    return [
        Figure("100 MB through `hv exec -i POD -- cat` and back", "MB/s", samples["cat"]),
        Figure("100 MB into a pod with `hv cp`", "MB/s", samples["into"]),
        Figure("100 MB out of a pod with `hv cp`", "MB/s", samples["out"]),
    ]


def _cat(host: Host, data: bytes) -> float:
    start = time.perf_counter()
    back = host.run("exec", "-i", "bulk", "--", "cat", stdin=data).stdout
    seconds = time.perf_counter() - start
    assert hashlib.sha256(back).digest() == hashlib.sha256(data).digest()
    return SIZE / 1e6 / seconds


def _out(host: Host, data: bytes, target: Path) -> float:
    seconds = host.seconds("cp", "bulk:/file", str(target))
    assert hashlib.sha256(target.read_bytes()).digest() == hashlib.sha256(data).digest()
    return SIZE / 1e6 / seconds
