"""A stand-in for a VM with its agent, for paths of the state machine that real guests take minutes for or never show.

Only the VM is made up: the agent's side speaks the real wire protocol over a real Unix socket, so `AgentClient`, the
feed and the keepers are the real ones. Real guests: tests/integration/test_hostd.py.
"""

from __future__ import annotations

import asyncio
import io
import json
import shutil
import tarfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypervisor.agent import wire
from hypervisor.agent.wire import FrameType
from hypervisor.controller.machine import VmRequest
from hypervisor.controller.spec import ContainerSpec
from hypervisor.errors import HvError, InvalidInput, NotFound
from hypervisor.images.credentials import Credentials
from hypervisor.images.model import Image, ImageConfig
from hypervisor.vsock.address import UnixVsock


@dataclass
class Script:
    """What containers of the guest do: a start takes the next entry of its list; an int ends at once, None runs on."""

    ends: dict[str, list[int | None]] = field(default_factory=dict)
    refuse: dict[str, str] = field(default_factory=dict)
    ignore_sigterm: bool = False
    logs: bytes | None = None
    mute: bool = False
    looks: dict[str, bool] = field(default_factory=dict)
    """What a probe or hook by exec says, by its first argument; one that is not here is content."""
    stats: dict[str, Any] = field(default_factory=dict)


class FakeGuest:
    """One VM: a `Machine`."""

    def __init__(self, directory: Path, script: Script) -> None:
        self.directory = directory
        self.script = script
        self.containers: dict[str, dict[str, Any]] = {}
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self._listeners: list[asyncio.StreamWriter] = []
        self._connections: set[asyncio.StreamWriter] = set()
        self._death: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._server: asyncio.Server | None = None
        self.silent = script.mute
        self.disk: asyncio.Queue[bool] = asyncio.Queue()
        self.held = False  # stands still
        self.refuse_save: HvError | None = None

    async def listen(self) -> None:
        self.directory.mkdir(exist_ok=True)
        (self.directory / "console.log").write_bytes(b"booting\n")
        self._server = await asyncio.start_unix_server(self._serve, self.directory / "vsock.sock")

    # ---- a Machine ---------------------------------------------------------------------------------------------------

    @property
    def address(self) -> UnixVsock:
        return UnixVsock(self.directory / "vsock.sock")

    def disk_serial(self, image: Path) -> str:
        return image.stem

    async def wait_dead(self) -> str:
        return await asyncio.shield(self._death)

    async def disk_full(self) -> AsyncIterator[bool]:
        while True:
            yield await self.disk.get()

    def note_started(self) -> None:
        self.started = True

    def console_tail(self, limit: int) -> bytes:
        return b"booting\n"[-limit:]

    def memory_used(self) -> int:
        return 1

    async def stats(self) -> Mapping[str, Any]:
        return {"cpu_ns": 1}

    async def save(self, folder: Path, name: str, *, goes_on: bool = False) -> Mapping[str, Any]:
        if self.refuse_save is not None:
            raise self.refuse_save
        folder.mkdir()  # noqa: ASYNC240 - a fake
        (folder / "containers").write_text(json.dumps(self.containers))
        (folder / "manifest.json").write_text("{}")
        self.held = not goes_on
        return {"pages": 1}

    async def wake(self) -> bool:
        held, self.held = self.held, False
        return held

    async def stop(self, shutdown: Callable[[], Awaitable[None]] | None) -> None:
        await self.die("stopped")

    async def remove(self) -> None:
        await self.die("removed")
        shutil.rmtree(self.directory)

    async def detach(self) -> None:
        pass

    async def die(self, reason: str) -> None:
        """The VM ends, its connections with it."""
        if not self._death.done():
            self._death.set_result(reason)
        self.drop_connections()
        if self._server is not None:
            self._server.close()

    def drop_connections(self) -> None:
        for writer in self._connections:
            writer.close()
        self._listeners.clear()

    @property
    def ended(self) -> bool:
        return self._death.done()

    # ---- its agent ---------------------------------------------------------------------------------------------------

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(writer)
        try:
            await reader.readline()
            writer.write(b"OK 4000\n")
            while True:
                kind, length = wire.parse_header(await reader.readexactly(wire.HEADER.size))
                request = wire.parse_json(await reader.readexactly(length))
                assert kind is FrameType.REQUEST
                if self.silent:
                    continue
                await self._answer(request["call"], request["args"], writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._connections.discard(writer)
            writer.close()

    async def _answer(self, call: str, args: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        self.calls.append((call, args))
        handler = getattr(self, "_" + call.replace(".", "_"))
        try:
            result = await handler(args)
        except HvError as e:
            error = {"reason": "NotFound", "message": str(e)}
            writer.write(wire.pack_json(FrameType.RESPONSE, {"ok": False, "error": error}))
            return
        writer.write(wire.pack_json(FrameType.RESPONSE, {"ok": True, "result": result}))
        if call == "events":
            self._listeners.append(writer)
            snapshot = {"type": "snapshot", "containers": list(self.containers.values())}
            writer.write(wire.pack_json(FrameType.EVENT, snapshot))
        if call == "logs.archive":
            writer.write(wire.pack(FrameType.STDOUT, self._logs_tar()))
            writer.write(wire.pack_json(FrameType.END, {}))

    async def _hello(self, _args: dict[str, Any]) -> dict[str, Any]:
        return {"wire": 1}

    async def _renew(self, _args: dict[str, Any]) -> dict[str, Any]:
        return {}

    async def _setup(self, _args: dict[str, Any]) -> dict[str, Any]:
        return {}

    async def _volume_write(self, _args: dict[str, Any]) -> dict[str, Any]:
        return {}

    async def _container_stats(self, _args: dict[str, Any]) -> dict[str, Any]:
        return self.script.stats

    async def _events(self, _args: dict[str, Any]) -> dict[str, Any]:
        return {}

    async def _container_list(self, _args: dict[str, Any]) -> dict[str, Any]:
        return {"containers": list(self.containers.values())}

    async def _container_start(self, args: dict[str, Any]) -> dict[str, Any]:
        name = args["name"]
        if name in self.script.refuse:
            self.containers[name] = {"name": name, "state": "exited", "exit_code": 127, "started_ns": None}
            raise NotFound(self.script.refuse[name])
        started = time.time_ns()
        self.containers[name] = {"name": name, "state": "running", "started_ns": started, "exit_code": None}
        self._publish("start", name)
        ends = self.script.ends.get(name, [])
        end = ends.pop(0) if ends else None
        if end is not None:
            self.exit(name, end)
        return {"pid": 1, "started_ns": started}

    async def _container_stop(self, args: dict[str, Any]) -> dict[str, Any]:
        container, until = self.containers[args["name"]], time.monotonic() + args["grace_s"]
        while self.script.ignore_sigterm and container["state"] == "running" and time.monotonic() < until:  # noqa: ASYNC110 - a fake
            await asyncio.sleep(0.01)
        if container["state"] == "running":
            self.exit(args["name"], 143)
        return {"exit_code": 143, "signal": 15}

    async def _probe(self, args: dict[str, Any]) -> dict[str, Any]:
        if self.containers[args["container"]]["state"] != "running":
            raise NotFound("it does not run")
        if "exec" not in args:
            return {"ok": True, "message": ""}
        what = args["exec"]["argv"][0]
        return {"ok": self.script.looks.get(what, True), "message": f"{what} looked"}

    def looks(self, what: str) -> int:
        """How often that was asked for."""
        return sum(call == "probe" and "exec" in args and args["exec"]["argv"][0] == what for call, args in self.calls)

    async def _container_signal(self, args: dict[str, Any]) -> dict[str, Any]:
        self.exit(args["name"], 128 + args["signal"])
        return {}

    async def _logs_archive(self, _args: dict[str, Any]) -> dict[str, Any]:
        return {}

    def exit(self, name: str, code: int, **more: Any) -> None:
        """The container ends."""
        finished = time.time_ns()
        self.containers[name] |= {"state": "exited", "exit_code": code, "finished_ns": finished} | more
        self._publish("exit", name)

    def _publish(self, kind: str, name: str) -> None:
        for writer in self._listeners:
            writer.write(wire.pack_json(FrameType.EVENT, {"type": kind, "container": self.containers[name]}))

    def _logs_tar(self) -> bytes:
        if self.script.logs is not None:
            return self.script.logs
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as archive:
            for name in self.containers:
                text = b"2026-01-01T00:00:00.000000000Z stdout F hello\n"
                member = tarfile.TarInfo(f"{name}/0.log")
                member.size = len(text)
                archive.addfile(member, io.BytesIO(text))
        return file.getvalue()


class FakeMachines:
    """A `Machines` whose guests do what the scripts say, one script a start; the last one is used again and again."""

    def __init__(self, *scripts: Script) -> None:
        self.scripts = list(scripts) or [Script()]
        self.started: list[FakeGuest] = []
        self.running: dict[Path, FakeGuest] = {}
        self.swept: list[Path] = []
        self.failures: list[HvError] = []
        self.hold = asyncio.Event()
        self.hold.set()
        self.starting = 0
        self.most_starting = 0
        self.busy = asyncio.Event()  # a start is under way

    async def start(self, request: VmRequest) -> FakeGuest:
        self.starting += 1
        self.most_starting = max(self.most_starting, self.starting)
        self.busy.set()
        try:
            await self.hold.wait()
            if self.failures:
                raise self.failures.pop(0)
            script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
            guest = FakeGuest(request.directory, script)
            await guest.listen()
        finally:
            self.starting -= 1
        self.started.append(guest)
        self.running[request.directory] = guest
        return guest

    async def check(self, request: VmRequest, folder: Path) -> None:
        """Every snapshot fits."""

    async def resume(self, request: VmRequest, folder: Path) -> FakeGuest:
        """As it was saved; it stands still."""
        guest = await self.start(request)
        guest.containers = json.loads((folder / "containers").read_text())
        guest.held = True
        return guest

    async def adopt(self, directory: Path) -> FakeGuest | None:
        guest = self.running.get(directory)
        return guest if guest is not None and not guest._death.done() else None

    def usage(self) -> Mapping[str, Any]:
        return {}

    async def sweep(self, directory: Path) -> None:
        self.swept.append(directory)
        shutil.rmtree(directory, ignore_errors=True)


class FakeImages:
    """An `ImageSource` with one image under every name; `failures` come first."""

    def __init__(self, config: ImageConfig | None = None) -> None:
        self.failures: list[HvError] = []
        self.config = config or ImageConfig(cmd=("sh",))
        self.wants: str | None = None  # a password
        self.resolved: list[tuple[str, str]] = []

    async def resolve(self, container: ContainerSpec, image_id: str, credentials: Credentials | None = None) -> Image:
        if self.wants is not None and (credentials is None or credentials.password != self.wants):
            raise InvalidInput("access refused")
        self.resolved.append((container.name, image_id))
        if self.failures:
            raise self.failures.pop(0)
        return Image("ab" * 32, ("x",), "sha256:" + "cd" * 32, Path("/nowhere"), 1, "", self.config)

    def asks_registry(self, container: ContainerSpec) -> bool:
        return container.pull == "Always"

    def lease(self, _image: Image) -> Any:
        return nullcontext()


__all__ = ["FakeGuest", "FakeImages", "FakeMachines", "Script"]
