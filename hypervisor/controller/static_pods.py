"""Static pods: what lies in the manifests folder runs; what is taken out of it goes.

The folder is looked at once a second rather than watched: that works on every file system, misses nothing, and costs
50 us. A file is read when its name, size, time or inode changed, and only once it has been the same for one look, so
that a file that is being written is not taken half. Names that begin with a dot are left alone.

What is wrong with a file is logged once and shown by ``GET /hv/v1/host`` until the file is mended.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from hypervisor.controller.manifest import MAX_MANIFEST_BYTES, load_documents
from hypervisor.controller.pods import Pods, manifest_digest
from hypervisor.controller.podvm import PodVm
from hypervisor.errors import Conflict, HvError, InvalidInput, ResourceExhausted

LOOK_EVERY_S = 1.0
SUFFIXES = (".yaml", ".yml", ".json")

Stamp = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class _Seen:
    stamp: Stamp
    settled: bool  # it has been read in this state


class StaticPods:
    """Keeps the pods of a folder. `run` is to be run as a task."""

    def __init__(self, folder: Path, pods: Pods) -> None:
        self._folder = folder
        self._pods = pods
        self._seen: dict[str, _Seen] = {}
        self.broken: dict[str, str] = {}
        self._log = structlog.get_logger()

    async def run(self) -> None:
        """Looks at the folder again and again, for ever."""
        while True:
            try:
                await self.look()
            except OSError as e:
                self._log.warning("the manifests folder cannot be read", folder=str(self._folder), error=str(e))
            await asyncio.sleep(LOOK_EVERY_S)

    async def look(self) -> None:
        """Brings the pods in line with the folder, once. A new file is taken at the second look that sees it alike."""
        found = self._stamps()
        for name in sorted(set(self._seen) - set(found)):
            del self._seen[name]
            self.broken.pop(name, None)
        await self._remove_orphans(set(found))
        for name, stamp in sorted(found.items()):
            seen = self._seen.get(name)
            if seen is None or seen.stamp != stamp:
                self._seen[name] = _Seen(stamp, settled=False)
            elif not seen.settled:
                settled = await self._apply(name)
                self._seen[name] = _Seen(stamp, settled)

    def _stamps(self) -> dict[str, Stamp]:
        found: dict[str, Stamp] = {}
        for path in self._folder.iterdir():
            if path.suffix in SUFFIXES and not path.name.startswith(".") and path.is_file():
                stat = path.stat()
                found[path.name] = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
        return found

    async def _remove_orphans(self, files: set[str]) -> None:
        for pod in list(self._pods):
            name = pod.stored.static_file
            if name is not None and name not in files and pod.journal.record.intent.kind != "delete":
                self._log.info("static pod's file is gone", file=name, pod=pod.pod.name)
                await pod.request_delete()

    async def _apply(self, name: str) -> bool:
        """False when it must be tried again though the file stays the same: the pod it replaces is still going."""
        try:
            wanted = {manifest_digest(m): m for m in await asyncio.to_thread(self._read, name)}
            settled = await self._remove_changed(name, set(wanted))
            for digest, manifest in wanted.items():
                if not self._is_there(name, digest):
                    await self._pods.create(manifest, source=f"file:{name}")
        except (Conflict, ResourceExhausted) as e:
            self._report(name, e)
            return False
        except HvError as e:
            self._report(name, e)
            return True
        self.broken.pop(name, None)
        return settled

    def _read(self, name: str) -> list[dict[str, Any]]:
        path = self._folder / name
        try:
            with path.open("rb") as file:
                text = file.read(MAX_MANIFEST_BYTES + 1)
        except OSError as e:
            raise InvalidInput(f"cannot be read: {e.strerror}") from e
        return load_documents(text)

    def _of_file(self, name: str) -> list[PodVm]:
        return [p for p in self._pods if p.stored.static_file == name]

    def _is_there(self, name: str, digest: str) -> bool:
        return any(p.stored.digest == digest for p in self._of_file(name))

    async def _remove_changed(self, name: str, wanted: set[str]) -> bool:
        changed = [p for p in self._of_file(name) if p.stored.digest not in wanted]
        for pod in changed:
            await pod.request_delete()
        return not changed

    def _report(self, name: str, error: HvError) -> None:
        if self.broken.get(name) != str(error):
            self._log.error("static pod cannot run", file=name, error=str(error))
        self.broken[name] = str(error)
