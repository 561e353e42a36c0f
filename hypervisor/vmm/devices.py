"""The VM's device process as seen from here: how a plan becomes a vmx, and what vmx says of itself."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import os
import socket
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from hypervisor.errors import NotFound, ProtocolError, VmFailed
from hypervisor.vmm.argv import EMPTY_BYTES, Disk, Origin
from hypervisor.vmm.config import BASE
from hypervisor.vmm.directory import disk_error
from hypervisor.vmm.plan import ClonePlan, LaunchPlan
from hypervisor.vmx import control
from hypervisor.vmx.config import BlockConfig, RamConfig, VmxConfig, VmxFds
from hypervisor.vmx.process import ProcessId

_ANSWER_S = 2.0
_STATS_MAX = 1 << 20


class DeviceProcesses(Protocol):
    """What starts a vmx: `hypervisor.vmx.zygote.Zygote`."""

    async def fork(self, config: VmxConfig, fds: VmxFds) -> ProcessId:
        """A confined vmx whose sockets are there."""


def vmx_config(plan: LaunchPlan) -> VmxConfig:
    """What `plan`'s vmx is made from."""
    cgroup = plan.cgroup
    return VmxConfig(
        directory=plan.files.vmx, guest_cid=plan.vmx.guest_cid, uid=plan.identity.uid, gid=plan.identity.uid,
        cgroups=cgroup.cgroups().paths(cgroup.name).directories, stream_limits=(plan.vmx.log_bytes,) * 2,
        ram=None if plan.clone is None else _ram_config(plan.clone),
        blocks=tuple(_block_config(disk, plan.origin) for disk in plan.disks) if plan.block == "vmx" else (),
    )  # fmt: skip


def _block_config(disk: Disk, origin: Origin) -> BlockConfig:
    """A clone's guest remembers its template's capacities, so they are the same for both."""
    announced = 0 if origin == "boot" else EMPTY_BYTES
    return BlockConfig(
        serial=disk.serial, read_only=disk.read_only, announce_bytes=announced, has_disk=disk.path is not None,
        filters=disk.filters, base="" if disk.base is None else BASE.removeprefix("disk:"),
    )  # fmt: skip


def _ram_config(clone: ClonePlan) -> RamConfig:
    config = RamConfig(ram_bytes=clone.ram_bytes, mappings=clone.mappings, template=clone.ram_sha256)
    return dataclasses.replace(config, around_pages=1) if clone.recording else config


def open_disk(disk: Disk, path: Path) -> int:
    """A descriptor of a disk's file; the caller's to close.

    :raises NotFound: there is none; `HvError`: it cannot be opened
    """
    try:
        return os.open(path, (os.O_RDONLY if disk.read_only else os.O_RDWR) | os.O_CLOEXEC)
    except FileNotFoundError as e:
        raise NotFound(f"disk {disk.serial}: there is no {path}") from e
    except OSError as e:
        raise disk_error(e, f"disk {disk.serial}: cannot open {path}") from e


def open_base(disk: Disk) -> int:
    """A descriptor of a disk's base, for reading; the caller's to close. Raises as `open_disk`."""
    assert disk.base is not None
    return open_disk(dataclasses.replace(disk, read_only=True), disk.base)


def connect_disk(plan: LaunchPlan, disk: Disk) -> int:
    """A connection to where QEMU listens for the disk's device; the caller's to close. QEMU takes it when it has time.

    :raises VmFailed: nobody listens there
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)  # a queue of connections that is full is no place to wait in
        sock.connect(str(plan.files.disk_socket(disk.fd)))
    except OSError as e:
        sock.close()
        raise VmFailed(f"QEMU does not take disk {disk.serial}: {e.strerror}") from e
    return sock.detach()


async def vmx_working_set(socket: Path) -> list[int]:
    """Pages of a clone's RAM in the order of their first touch. vmx is not trusted: they may be any numbers.

    :raises HvError: it does not answer, or nonsense
    """
    answer = await control.call(socket, "working-set", timeout=_ANSWER_S)
    try:
        data = base64.b64decode(answer["pages"], validate=True)
        return array("I", data).tolist()
    except (TypeError, KeyError, ValueError) as e:
        raise ProtocolError(f"vmx at {socket} answered nonsense to working-set") from e


async def vmx_stats(socket: Path) -> Mapping[str, Any]:
    """vmx's counters; empty when it does not answer, for they are shown and never needed."""
    try:
        async with asyncio.timeout(_ANSWER_S):
            reader, writer = await asyncio.open_unix_connection(str(socket), limit=_STATS_MAX)
            try:
                writer.write(b'{"call":"stats"}\n')
                answer = json.loads(await reader.readline())
            finally:
                writer.close()
    except (OSError, ValueError, TimeoutError):
        return {}
    result = answer.get("result") if isinstance(answer, dict) else None
    return result if isinstance(result, dict) else {}
