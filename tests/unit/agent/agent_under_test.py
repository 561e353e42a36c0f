"""The agent without a guest: its server on a Unix socket, and, as root, a stand-in container for exec."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from hypervisor.agent import calls, wire
from hypervisor.agent import exec as agent_exec
from hypervisor.agent.caps import effective, mask
from hypervisor.agent.container import Container
from hypervisor.agent.exec_request import container_prefix
from hypervisor.agent.reaper import Reaper
from hypervisor.agent.server import Server
from hypervisor.agent.spec import User, parse_spec
from hypervisor.agent.wire import Frame, FrameType

ROOT = Path(__file__).parents[3]
HV_EXEC = ROOT / "build/guest/hv-exec"


async def until(condition: Callable[[], object]) -> None:
    """Waits for a condition of this process, 10 s at most."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.005)


def open_descriptors() -> int:
    """How many descriptors this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


class Client:
    """One connection to the agent under test."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, kind: FrameType, payload: bytes = b"") -> None:
        self.writer.write(wire.pack(kind, payload))
        await self.writer.drain()

    async def receive(self) -> Frame:
        kind, length = wire.parse_header(await self.reader.readexactly(wire.HEADER.size))
        return Frame(kind, await self.reader.readexactly(length))

    async def ask(self, call: str, **args: Any) -> dict[str, Any]:
        """The whole answer, refused or not."""
        self.writer.write(wire.pack_json(FrameType.REQUEST, {"v": 1, "call": call, "args": args}))
        frame = await self.receive()
        assert frame.type is FrameType.RESPONSE
        return wire.parse_json(frame.payload)

    async def finish(self) -> tuple[bytes, bytes, dict[str, Any]]:
        """stdout, stderr and END's body."""
        out = {FrameType.STDOUT: bytearray(), FrameType.STDERR: bytearray()}
        while (frame := await self.receive()).type is not FrameType.END:
            out[frame.type] += frame.payload
        return bytes(out[FrameType.STDOUT]), bytes(out[FrameType.STDERR]), wire.parse_json(frame.payload)


class AgentUnderTest:
    """The agent's server in this process."""

    def __init__(self, path: Path, agent: calls.Agent, server: Server) -> None:
        self.path = path
        self.agent = agent
        self.server = server
        self._clients: list[Client] = []

    async def connect(self) -> Client:
        client = Client(*await asyncio.open_unix_connection(self.path))
        self._clients.append(client)
        return client

    async def close(self) -> None:
        for client in self._clients:
            client.writer.close()
            with suppress(OSError):
                await client.writer.wait_closed()


@pytest.fixture
async def agent(short_path: Path) -> AsyncIterator[AgentUnderTest]:
    """An agent that believes its guest to be set up."""
    import socket

    reaper = Reaper(asyncio.get_running_loop())
    made = calls.Agent(reaper)
    made.setup.done = True
    server = Server(calls.table(made, lambda: None))
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(short_path / "agent.sock"))
    listener.listen()
    server.serve(listener)
    under_test = AgentUnderTest(short_path / "agent.sock", made, server)
    try:
        yield under_test
    finally:
        await under_test.close()
        await server.close()
        reaper.close()


def _first_child(pid: int) -> int:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        if text and Path(f"/proc/{text.split()[0]}/comm").read_text().strip() == "sleep":
            return int(text.split()[0])
        time.sleep(0.01)
    raise AssertionError("the stand-in container did not start")


@pytest.fixture
def sandbox() -> Iterator[int]:
    """The pid of the first process of PID and mount namespaces of their own, with a /proc and a devpts of their own."""
    script = "mount -t proc p /proc && mount -t devpts -o newinstance,ptmxmode=666 d /dev/pts && exec sleep 1000"
    argv = ["unshare", "-m", "-p", "-f", "--kill-child", "sh", "-c", script]
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("this is a chroot: mounts of one's own cannot be kept from the rest of the machine")
    with subprocess.Popen(argv) as process:
        try:
            yield _first_child(process.pid)
        finally:
            process.kill()


@pytest.fixture
def standin(agent: AgentUnderTest, sandbox: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Container]:
    """A "container" named main in the agent: the sandbox on the host's own root, without cgroup and seccomp filter."""
    if not HV_EXEC.exists():
        pytest.skip("needs build/guest/hv-exec; `make native`")
    monkeypatch.setattr(agent_exec, "HV_EXEC", str(HV_EXEC))
    spec = {"name": "main", "image_disk": "img-0", "argv": ["x"], "env": ["PATH=/usr/bin:/bin", "FROM=image"]}
    container = Container(parse_spec(spec), 0)
    container.root.path = "/"
    container.now_running(sandbox, os.pidfd_open(sandbox), User(0, 0))
    container.exec_prefix = exec_prefix(container)
    agent.agent.engine.containers["main"] = container
    try:
        yield container
    finally:
        container.now_exited(0, None)


def exec_prefix(container: Container) -> bytes:
    """The container's own prefix, less what this host may lack: cgroup v2, a filter, capabilities of its own."""
    status = Path("/proc/self/status").read_text()
    have = int(next(line for line in status.splitlines() if line.startswith("CapBnd")).split()[1], 16)
    caps = mask(effective((), (), False)) & have
    dropped = (b"cgroup=", b"seccomp=", b"caps=", b"rlimit=", b"oom=")
    kept = [r for r in container_prefix(container).split(b"\0") if r and not r.startswith(dropped)]
    return b"".join(r + b"\0" for r in [*kept, b"caps=%x,%x,%x,0,0" % (caps, caps, caps)])


@pytest.fixture(autouse=True)
def children_are_reaped() -> Iterator[None]:
    """The agent's reaper takes any child; the tests' own signal handling comes back afterwards."""
    before = signal.getsignal(signal.SIGCHLD)
    yield
    signal.signal(signal.SIGCHLD, before)
