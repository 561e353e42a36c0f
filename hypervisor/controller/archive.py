"""What is kept of a VM that goes: the containers' log files and the end of the guest's console, each bounded."""

from __future__ import annotations

import asyncio
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from hypervisor.agent.wire import FrameType
from hypervisor.controller.machine import Machine
from hypervisor.controller.paths import PodPaths
from hypervisor.errors import ProtocolError, ResourceExhausted
from hypervisor.introspect.agent import AgentClient

MAX_MEMBERS = 10_000
CONSOLE_BYTES = 1024 * 1024


async def archive_logs(agent: AgentClient, paths: PodPaths, max_bytes: int) -> None:
    """Takes every log file out of the VM, into the pod's ``logs`` folder, all or nothing.

    The guest is not trusted: names, kinds and sizes in its archive are checked.

    :param max_bytes: the archive may have so many; no archive of real logs has more
    :raises HvError: the agent does not answer, or sent something that is no archive of logs
    """
    with tempfile.TemporaryFile(dir=paths.directory) as file:
        await _receive(agent, file, max_bytes)
        await asyncio.to_thread(_unpack, file, paths)


async def _receive(agent: AgentClient, file: IO[bytes], max_bytes: int) -> None:
    size = 0
    async with agent.stream("logs.archive", {}) as stream:
        async for frame in stream.frames():
            if frame.type is not FrameType.STDOUT:
                continue
            size += len(frame.payload)
            if size > max_bytes:
                raise ResourceExhausted(f"the pod's logs have more than {max_bytes} bytes")
            await asyncio.to_thread(file.write, frame.payload)
    if stream.ending is not None and stream.ending.error is not None:
        raise stream.ending.error


def _unpack(file: IO[bytes], paths: PodPaths) -> None:
    file.seek(0)
    fresh = Path(tempfile.mkdtemp(prefix=".logs", dir=paths.directory))
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in _checked(archive):
                _unpack_one(archive, member, fresh)
        shutil.rmtree(paths.logs, ignore_errors=True)
        fresh.rename(paths.logs)
    except tarfile.TarError as e:
        raise ProtocolError(f"pod VM agent: the archive of the logs is damaged: {e}") from e
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _checked(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for count, member in enumerate(archive):
        path = PurePosixPath(member.name)
        if count >= MAX_MEMBERS or path.is_absolute() or ".." in path.parts or len(path.parts) > 4:
            raise ProtocolError(f"pod VM agent: the archive of the logs has the member {member.name[:80]!r}")
        if member.isreg():
            yield member


def _unpack_one(archive: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    source = archive.extractfile(member)
    path = target / member.name
    path.parent.mkdir(parents=True, exist_ok=True)
    if source is not None:
        with source, path.open("xb") as file:
            shutil.copyfileobj(source, file, 1024 * 1024)


def save_console(machine: Machine, paths: PodPaths) -> None:
    """Keeps the end of the guest's console; best effort."""
    try:
        paths.console.write_bytes(machine.console_tail(CONSOLE_BYTES))
    except OSError:
        paths.console.unlink(missing_ok=True)
