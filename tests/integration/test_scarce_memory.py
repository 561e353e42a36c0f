"""Less memory than a guest or a container needs: one clear end, with the guest's own last words."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from conftest import Host
from test_vmm import Bench, make_bench

from hypervisor.errors import HvError
from hypervisor.vmm.config import MIN_MEMORY, DataDisk, VmConfig
from hypervisor.vmm.guest import GuestImage
from hypervisor.vmm.plan import LaunchPlan, plan_template
from hypervisor.vmm.templates.build import build_template
from hypervisor.vsock.address import VsockAddress

pytestmark = [pytest.mark.root, pytest.mark.qemu]

EATER = "head -c 400000000 /dev/zero | tail -c 399999999 >/dev/null; echo tail ended with $?; exit 3"


async def never(_address: VsockAddress) -> None:
    await asyncio.Event().wait()


async def test_a_guest_that_cannot_boot_in_it(short_path: Path) -> None:
    async with make_bench(short_path) as bench:
        with pytest.raises(HvError, match="panicked") as told:
            await bench.start(bench.plan(GuestImage.load(), memory_bytes=MIN_MEMORY), never)
        assert "memory" in str(told.value), "the console's last lines are in the message"


@pytest.mark.uffd
async def test_a_template_that_cannot_be_made_in_it(short_path: Path) -> None:
    async with make_bench(short_path) as bench:
        plan = template_plan(bench)
        folder = short_path / "template"
        folder.mkdir()
        with pytest.raises(HvError, match="panicked"):
            await build_template(plan, bench.zygote, folder)
        assert list(folder.iterdir()) == []
        assert not plan.directory.exists()


def template_plan(bench: Bench) -> LaunchPlan:
    config = VmConfig(
        name="test/vm", guest=GuestImage.load(), memory_bytes=MIN_MEMORY, data_disk=DataDisk(size_bytes=16 << 20)
    )
    plan = plan_template(config, bench.capabilities, bench.state / "vm0", bench.pool.take())
    assert plan is not None
    return plan


def test_a_container_that_takes_more_than_its_limit(host: Host) -> None:
    """The process that takes it is killed in the guest; container, guest and agent go on."""
    host.hv("run", "-d", "--name", "eater", "--memory", "64Mi", "busybox", "--", "sleep", "1000")
    try:
        done = host.hv("exec", "eater", "--", "sh", "-c", EATER, check=False)
        assert done.returncode == 3, done.stderr
        assert b"tail ended with" in done.stdout
        assert b"tail ended with 0" not in done.stdout
        assert host.hv("exec", "eater", "--", "echo", "here").stdout == b"here\n"
    finally:
        host.hv("rm", "-f", "eater")
