"""The snapshots of a pod: taken while it runs, kept in its folder, put in its place again.

Theory of operation
-------------------
A snapshot is made under a name that begins with a dot, and renamed when it is complete; what a daemon that was killed
left under such a name goes when the next one starts, which also wakes the guest (`Suspension.recover`).

To *restore* one, a copy of it takes the place of ``suspended.new/``; then the pod is suspended, where that copy counts
as what was saved, and resumed. So a daemon that is killed amid it is followed by one whose pod runs as before, or is
suspended as of the snapshot, or goes on from there.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from hypervisor.controller.journal import Journal
from hypervisor.controller.machine import Machine
from hypervisor.controller.names import dns_label
from hypervisor.controller.paths import PodPaths
from hypervisor.controller.suspension import Suspension, remove_folder
from hypervisor.errors import Conflict, NotFound
from hypervisor.vmm.directory import disk_error
from hypervisor.vmm.snapshots.snapshot import Snapshot

Check = Callable[[Path], Awaitable[None]]


class PodSnapshots:
    """Of one pod; one at a time is taken."""

    def __init__(self, paths: PodPaths, journal: Journal, suspension: Suspension) -> None:
        self._paths = paths
        self._journal = journal
        self._suspension = suspension

    async def create(self, machine: Machine | None, name: str) -> Mapping[str, Any]:
        """Takes the snapshot `name`; the pod goes on. What it took: ``paused_s``, ``pages``, ``looked_at``.

        :raises InvalidInput: the name; Conflict: it is taken, or the pod does not run; HvError: it could not be taken
        """
        target = self._path(name)
        if target.exists():
            raise Conflict(f"there is a snapshot {name} already; remove it first")
        await asyncio.to_thread(self._paths.snapshots.mkdir, 0o700, exist_ok=True)
        new = target.with_name(f".{name}.new")
        took = await self.take(machine, new, name)
        await asyncio.to_thread(new.rename, target)
        return took

    async def take(self, machine: Machine | None, folder: Path, name: str) -> Mapping[str, Any]:
        """Makes the snapshot `folder`; the pod goes on. Raises as `create`."""
        record = self._journal.record
        if machine is None or record.suspend or record.terminal or not record.vm_up:
            raise Conflict("the pod does not run; a snapshot is taken of one that does")
        async with self._suspension.saving:
            await asyncio.to_thread(remove_folder, folder)
            return await machine.save(folder, name, goes_on=True)

    def _path(self, name: str) -> Path:
        return self._paths.snapshots / dns_label(name, where="name")

    async def all(self) -> list[dict[str, Any]]:
        """All, the oldest first: ``name``, ``created`` (seconds since the epoch), ``bytes`` that would be free without
        it, ``layers``; of a damaged one its name and ``damaged``.
        """
        return await asyncio.to_thread(self._described)

    def _described(self) -> list[dict[str, Any]]:
        if not self._paths.snapshots.is_dir():
            return []
        folders = [path for path in self._paths.snapshots.iterdir() if not path.name.startswith(".")]
        return sorted(map(_described, folders), key=lambda s: (s["created"], s["name"]))

    async def remove(self, name: str) -> None:
        """:raises NotFound: there is none"""
        await asyncio.to_thread(remove_folder, self.get(name))

    def get(self, name: str) -> Path:
        """Its folder. :raises NotFound: there is none"""
        path = self._path(name)
        if not path.is_dir():
            known = ", ".join(s["name"] for s in self._described()) or "none"
            raise NotFound(f"there is no snapshot {name}; there are: {known}")
        return path

    async def restore(self, name: str, check: Check) -> None:
        """The pod goes on from there; what ran is given up.

        :param check: raises where a snapshot cannot be resumed
        :raises HvError: it cannot be used; the pod goes on as it was
        """
        path = self.get(name)
        if self._journal.record.suspend or not self._journal.record.vm_up:
            raise Conflict("the pod does not run; resume it first")
        await check(path)
        new = self._paths.suspended.with_suffix(".new")
        async with self._suspension.saving:
            try:
                await asyncio.to_thread(remove_folder, new)
                await asyncio.to_thread(Snapshot.read(path).copy, new)
            except OSError as e:
                await asyncio.to_thread(remove_folder, new)
                raise disk_error(e, f"cannot copy snapshot {name}") from e
            self._suspension.prepared = True
        try:
            await self._suspension.request("suspended")
        finally:
            self._suspension.prepared = False
        await self._suspension.request("")

    async def sweep(self) -> None:
        """What a daemon that was killed had begun goes."""
        await asyncio.to_thread(self._sweep)

    def _sweep(self) -> None:
        for path in self._paths.snapshots.glob(".*.new"):
            shutil.rmtree(path, ignore_errors=True)
        shutil.rmtree(self._paths.fork, ignore_errors=True)


def _described(path: Path) -> dict[str, Any]:
    try:
        snapshot = Snapshot.read(path)
    except Exception as e:
        return {"name": path.name, "created": 0.0, "damaged": str(e)}
    manifest = snapshot.manifest
    return {
        "name": path.name, "created": manifest.created, "bytes": snapshot.occupies(), "layers": len(manifest.layers),
        "memory": manifest.ram_bytes,
    }  # fmt: skip
