"""How a disk that is open in one process is changed by another: requests and answers as lines of JSON on a Unix socket.

The process that has a disk open (`Holder`) listens on ``control.sock`` in the disk's folder, mode 0600. A request is
``{"op": ...}`` with the fields of its operation; the answer is ``{"ok": ...}`` or
``{"error": {"reason", "message"}}``. One request at a time changes a disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypervisor.errors import Conflict, HvError, InvalidInput, NotFound, ProtocolError, ResourceExhausted, Unavailable
from hypervisor.iofilter.chain import OpenDisk
from hypervisor.iofilter.descriptor import Descriptor
from hypervisor.iofilter.loop import Export
from hypervisor.iofilter.spec import FilterSpec
from hypervisor.iofilter.store import DiskStore, without_filter

SOCKET = "control.sock"
LINE_MAX = 1 << 20
_BY_REASON: dict[str, type[HvError]] = {
    kind.reason: kind for kind in (InvalidInput, NotFound, Conflict, ResourceExhausted, Unavailable)
}


class Holder:
    """Serves the control socket of a disk that this process has open, and does what is asked.

    Its methods block; `serve` runs them in a thread, one at a time.
    """

    def __init__(self, store: DiskStore, opened: OpenDisk) -> None:
        self._store = store
        self._disk = opened.disk
        self.descriptor = opened.descriptor
        self._exports: dict[str, Export] = {}
        self._one_at_a_time = asyncio.Lock()
        self._operations: dict[str, Callable[[dict[str, Any]], Any]] = {
            "info": self._info,
            "export": self._export,
            "unexport": self._unexport,
            "filter-add": self._filter_add,
            "filter-remove": self._filter_remove,
            "filter-set": self._filter_set,
            "resize": self._resize,
        }

    @property
    def path(self) -> Path:
        """The control socket."""
        return self._store.folder(self.descriptor.name) / SOCKET

    @contextlib.asynccontextmanager
    async def serving(self) -> Any:
        """Listens for the length of a block; exports end with it."""
        for stale in (self.path, *self.path.parent.glob("nbd-*.sock")):
            stale.unlink(missing_ok=True)  # the lock is ours: whoever made it is gone
        server = await asyncio.start_unix_server(self._client, str(self.path), limit=LINE_MAX)
        self.path.chmod(0o600)
        try:
            yield self
        finally:
            server.close()
            await server.wait_closed()
            self.path.unlink(missing_ok=True)
            for export in self._exports.values():
                await asyncio.to_thread(export.close)

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                async with self._one_at_a_time:
                    answer = await asyncio.to_thread(self.answer, line)
                writer.write(json.dumps(answer).encode() + b"\n")
                await writer.drain()
        except (ConnectionError, ValueError):
            pass  # it went, or sent a line without end
        finally:
            writer.close()

    def answer(self, line: bytes) -> dict[str, Any]:
        """One request's answer; never raises."""
        try:
            request = json.loads(line)
            if not isinstance(request, dict):
                raise InvalidInput("a request is an object")
            return {"ok": self.do(request)}
        except HvError as error:
            return {"error": {"reason": error.reason, "message": str(error)}}
        except (KeyError, TypeError, ValueError) as error:
            return {"error": {"reason": InvalidInput.reason, "message": f"malformed request: {error}"}}

    def do(self, request: dict[str, Any]) -> Any:
        """Does what a request asks. Raises `HvError`; KeyError, TypeError or ValueError for a malformed one."""
        operation = self._operations.get(request["op"])
        if not operation:
            raise InvalidInput(f"there is no operation {request['op']}")
        return operation(request)

    def _info(self, _: dict[str, Any]) -> Any:
        return {
            "disk": self.descriptor.as_json(),
            "size": self._disk.size,
            "figures": self._disk.figures(),
            "filters": {spec.name: self._disk.figures(spec.name) for spec in self.descriptor.filters},
            "exports": sorted(self._exports),
        }

    def _export(self, request: dict[str, Any]) -> Any:
        path = Path(request["socket"])
        read_only = bool(request.get("read_only"))
        self._exports[str(path)] = self._disk.export(path, at=request.get("at"), read_only=read_only)
        return {"socket": str(path)}

    def _unexport(self, request: dict[str, Any]) -> Any:
        export = self._exports.pop(request["socket"], None)
        if not export:
            raise NotFound(f"disk {self.descriptor.name} is not exported on {request['socket']}")
        export.close()
        return {}

    def _filter_add(self, request: dict[str, Any]) -> Any:
        spec = FilterSpec.from_json(request["filter"], "filter")
        changed, spec, place = self._store.add_filter(self.descriptor, spec, request.get("at"))
        folder = self._store.folder(self.descriptor.name)
        try:
            pause = self._disk.add(spec.kind, spec.name, spec.resolved(folder), at=place)
        except HvError:
            self._store.drop_state(self.descriptor.name, spec)
            raise
        self._keep(changed)
        return {"pause_s": pause, "at": place}

    def _filter_remove(self, request: dict[str, Any]) -> Any:
        changed = without_filter(self.descriptor, request["name"])
        pause = self._disk.remove(request["name"])
        self._keep(changed)
        return {"pause_s": pause}

    def _filter_set(self, request: dict[str, Any]) -> Any:
        values = tuple((str(k), str(v)) for k, v in request["settings"].items())
        changed = self.descriptor.with_settings(request["name"], values)
        resolved = changed.filter(request["name"]).resolved(self._store.folder(self.descriptor.name))
        pause = self._disk.set(request["name"], resolved)
        self._keep(changed)
        return {"pause_s": pause}

    def _resize(self, request: dict[str, Any]) -> Any:
        pause = self._disk.resize(int(request["size"]))
        self._keep(Descriptor.from_json({**self.descriptor.as_json(), "size": int(request["size"])}))
        return {"pause_s": pause}

    def _keep(self, changed: Descriptor) -> None:
        self._store.change(self.descriptor.name, changed)
        self.descriptor = changed


def ask(folder: Path, request: dict[str, Any], *, timeout: float = 60) -> Any:
    """Asks the process that has a disk open. Blocks.

    :raises Unavailable: no process has it open
    :raises HvError: what the holder answered
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout)
        try:
            connection.connect(str(folder / SOCKET))
            connection.sendall(json.dumps(request).encode() + b"\n")
            line = connection.makefile("rb").readline(LINE_MAX)
        except OSError as error:
            raise Unavailable(f"disk {folder.name} is not open in any process that answers") from error
    try:
        answer = json.loads(line)
    except ValueError as error:
        raise ProtocolError(f"the process that has disk {folder.name} open went away") from error
    if "error" in answer:
        raise _BY_REASON.get(answer["error"]["reason"], Unavailable)(answer["error"]["message"])
    return answer["ok"]
