"""The VM's device process as seen from here: how a plan becomes a vmx, and what vmx says of itself."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from hypervisor.errors import ProtocolError
from hypervisor.vmm.plan import ClonePlan, LaunchPlan
from hypervisor.vmx import control
from hypervisor.vmx.config import RamConfig, VmxConfig, VmxFds
from hypervisor.vmx.process import ProcessId

_ANSWER_S = 2.0


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
    )  # fmt: skip


def _ram_config(clone: ClonePlan) -> RamConfig:
    config = RamConfig(ram_bytes=clone.ram_bytes, mappings=clone.mappings, template=clone.ram_sha256)
    return dataclasses.replace(config, around_pages=1) if clone.recording else config


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
            reader, writer = await asyncio.open_unix_connection(str(socket))
            try:
                writer.write(b'{"call":"stats"}\n')
                answer = json.loads(await reader.readline())
            finally:
                writer.close()
    except (OSError, ValueError, TimeoutError):
        return {}
    result = answer.get("result") if isinstance(answer, dict) else None
    return result if isinstance(result, dict) else {}
