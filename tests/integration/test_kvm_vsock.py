"""Both host sides of vsock under KVM, side by side: the kernel's vhost-vsock, and this project's vhost-user back end.

The times go to the results (`record_property`): what a nested guest measures is no figure to fail a test by.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from agent_vm import Stream
from conftest import PATIENCE

from hypervisor.agent.wire import AGENT_PORT
from hypervisor.errors import Timeout, Unavailable
from hypervisor.vmm.capabilities import HostCapabilities, probe
from hypervisor.vmm.config import MIB, VmConfig
from hypervisor.vmm.guest import GuestImage
from hypervisor.vmm.identity import IdentityPool
from hypervisor.vmm.launch import start
from hypervisor.vmm.plan import plan_launch
from hypervisor.vmm.vm import RunningVm
from hypervisor.vmx.zygote import Zygote
from hypervisor.vsock.address import KernelVsock, UnixVsock, VsockAddress
from hypervisor.vsock.connect import connect, connect_blocking

pytestmark = [pytest.mark.root, pytest.mark.qemu, pytest.mark.kvm, pytest.mark.vhost_vsock]

ROUNDS = 60


async def answers(address: VsockAddress) -> None:
    """Waits until the guest's agent takes connections: nothing tells of it but a connection."""
    deadline = time.monotonic() + 60 * PATIENCE
    while True:
        try:
            _, writer = await connect(address, AGENT_PORT, timeout=10)
        except (Unavailable, Timeout):
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.05)
            continue
        writer.close()
        return


@asynccontextmanager
async def running(folder: Path, capabilities: HostCapabilities, zygote: Zygote) -> AsyncIterator[RunningVm]:
    config = VmConfig(name="test/vm", guest=GuestImage.load(), memory_bytes=192 * MIB, net="none", data_disk=None)
    plan = plan_launch(config, capabilities, folder / capabilities.vsock, IdentityPool(capabilities).take())
    vm = await start(plan, zygote, ready=answers)
    try:
        yield vm
    finally:
        await vm.end_now()
        await vm.remove()


def ask(address: VsockAddress) -> float:
    """Seconds to connect, ask and be answered."""
    begun = time.perf_counter()
    with Stream(connect_blocking(address, AGENT_PORT, 20 * PATIENCE)) as stream:
        assert stream.request("hello")
    return time.perf_counter() - begun


async def test_both_answer_under_kvm(short_path: Path, record_property: Callable[[str, object], None]) -> None:
    kernel = await probe(short_path, guest_kernel=None)
    assert (kernel.vsock, kernel.kvm_unusable) == ("kernel", None)
    ours = replace(kernel, vsock="vhost-user")
    async with Zygote.start() as zygote, AsyncExitStack() as stack:
        async with asyncio.TaskGroup() as group:
            starting = [
                group.create_task(stack.enter_async_context(running(short_path, side, zygote)))
                for side in (kernel, ours)
            ]
        a, b = (task.result() for task in starting)
        assert (type(a.address), type(b.address)) == (KernelVsock, UnixVsock)
        taken: dict[str, list[float]] = {"kernel": [], "vhost-user": []}
        for _ in range(ROUNDS):
            taken["kernel"].append(ask(a.address))
            taken["vhost-user"].append(ask(b.address))
    record_property("ms", json.dumps({side: round(statistics.median(t) * 1e3, 2) for side, t in taken.items()}))
