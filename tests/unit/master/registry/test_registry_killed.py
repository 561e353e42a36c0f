"""kill -9 under a stream of writes, over and over: what was acknowledged is there, once.

``HV_STORE_KILLS`` says how often (``make soak``: 300).
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from registry_objects import KINDS, POD

from hypervisor.master.registry.registry import Registry
from hypervisor.master.store.sqlite import SqliteStore

HERE = Path(__file__).parent
KILLS = int(os.environ.get("HV_STORE_KILLS", "30"))
LONGEST_S = 0.08


@dataclass
class Said:
    """What the killed processes said was acknowledged; `unsure`: deletes that were asked for."""

    uids: dict[str, str] = field(default_factory=dict)
    running: set[str] = field(default_factory=set)
    deleted: set[str] = field(default_factory=set)
    unsure: set[str] = field(default_factory=set)

    def hear(self, line: str) -> None:
        what, name, *uid = line.split()
        if what == "+":
            assert name not in self.uids
            self.uids[name] = uid[0]
        else:
            {"u": self.running, "?": self.unsure, "-": self.deleted}[what].add(name)


@asynccontextmanager
async def parent(database: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """The process that forks those that are killed."""
    path = f"{HERE.parents[3]}:{HERE}"
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(HERE / "kill_child.py"),
        str(database),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": path},
    )
    try:
        yield process
    finally:
        process.stdin.close()  # type: ignore[union-attr]
        await asyncio.wait_for(process.wait(), 30)


async def kill_one(process: asyncio.subprocess.Process, turn: int, said: Said, after: float) -> None:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(b"%d\n" % turn)
    async with asyncio.timeout(60):
        ready, pid = (await process.stdout.readline()).split()
        asyncio.get_running_loop().call_later(after, os.kill, int(pid), signal.SIGKILL)
        assert ready == b"ready"
        while (line := await process.stdout.readline()) != b"dead\n":
            said.hear(line.decode())


async def pods(database: Path) -> dict[str, dict[str, Any]]:
    store = await SqliteStore.open(database)
    registry = await Registry.open(store, KINDS)
    found = {entry.obj["metadata"]["name"]: entry.obj for entry in registry.peek_all(POD)}
    await registry.close()
    await store.close()
    return found


async def test_what_was_acknowledged_is_there_and_once(tmp_path: Path) -> None:
    rng, said = random.Random(), Said()
    async with parent(tmp_path / "store.db") as process:
        for turn in range(KILLS):
            await kill_one(process, turn, said, rng.uniform(0, LONGEST_S))
    there = await pods(tmp_path / "store.db")
    assert len(said.uids) > KILLS
    for name, uid in said.uids.items():
        if name in said.deleted:
            assert name not in there
        elif name not in said.unsure or name in there:
            assert there[name]["metadata"]["uid"] == uid, f"{name} was lost, or made twice"
            assert name not in said.running or there[name]["status"]["phase"] == "Running"
