"""Processes to be killed: each opens the store, writes through many tasks, and says what was acknowledged.

Reads turns from standard input, a line each, and forks a process for each, which begins with ``ready PID``; says
``dead`` when it is. (Forking saves starting Python every time.) Usage: kill_child.py DATABASE
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import structlog
from registry_objects import KINDS, POD, pod

from hypervisor.master.registry.registry import Registry
from hypervisor.master.store.history import Keep
from hypervisor.master.store.sqlite import SqliteStore

IN_FLIGHT = 32


def say(text: str) -> None:
    """One write, so that a line is there whole or not at all."""
    os.write(1, f"{text}\n".encode())


async def stream(registry: Registry, prefix: str) -> None:
    """Creates, updates every third and deletes every fifth."""
    n = 0
    while True:
        n += 1
        name = f"{prefix}-{n}"
        made = await registry.create(POD, pod(name), "ns")
        say(f"+ {name} {made['metadata']['uid']}")
        if n % 3 == 0:
            await registry.update(POD, "ns", name, lambda o: o | {"status": {"phase": "Running"}})
            say(f"u {name}")
        if n % 5 == 0:
            say(f"? {name}")
            await registry.delete(POD, "ns", name)
            say(f"- {name}")


async def write(database: Path, turn: str) -> None:
    """Until killed. History is compacted all the while."""
    store = await SqliteStore.open(database, keep=Keep(age_s=0.02, check_s=0.01, changes=200))
    registry = await Registry.open(store, KINDS)
    say(f"ready {os.getpid()}")
    await asyncio.gather(*(stream(registry, f"t{turn}-{task}") for task in range(IN_FLIGHT)))


def main(database: Path) -> None:
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))  # standard output is for what is said
    for turn in sys.stdin:
        pid = os.fork()
        if not pid:
            asyncio.run(write(database, turn.strip()))
            os._exit(1)
        os.waitpid(pid, 0)
        say("dead")


main(Path(sys.argv[1]))
