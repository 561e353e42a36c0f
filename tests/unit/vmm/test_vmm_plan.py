"""`plan_launch`: the value that a start goes by."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hypervisor.errors import HostUnfit, InvalidInput
from hypervisor.vmm import records
from hypervisor.vmm.capabilities import HostCapabilities
from hypervisor.vmm.cgroup import Layout
from hypervisor.vmm.config import MIB, VmConfig
from hypervisor.vmm.confine import ConfinementSupport
from hypervisor.vmm.devices import vmx_config
from hypervisor.vmm.guest import GuestImage
from hypervisor.vmm.identity import VmIdentity
from hypervisor.vmm.plan import OVERHEAD, LaunchPlan, cgroup_name, plan_launch
from hypervisor.vsock.address import KernelVsock, UnixVsock

DIRECTORY = Path("/state/pods/0a1b2c3d/vm")
IDENTITY = VmIdentity(10_001, 0x70000001)


@pytest.fixture
def plan(guest: GuestImage, capabilities: HostCapabilities) -> LaunchPlan:
    return plan_launch(VmConfig(name="p", guest=guest), capabilities, DIRECTORY, IDENTITY)


def test_json_round_trip(plan: LaunchPlan) -> None:
    text = records.dumps(plan)
    assert isinstance(json.loads(text)["argv"], list)
    assert records.loads(LaunchPlan, text, where="config.json") == plan


def test_limits_are_the_guests_and_the_overhead(guest: GuestImage, capabilities: HostCapabilities) -> None:
    config = VmConfig(name="p", guest=guest, memory_bytes=512 * MIB, cpu_limit=1.5, vcpus=2)
    limits = plan_launch(config, capabilities, DIRECTORY, IDENTITY).cgroup.limits
    assert limits.memory_bytes == 512 * MIB + OVERHEAD
    assert limits.cpu_quota_us == 150_000
    assert limits.pids is not None and limits.pids > 2 + 64


def test_cgroup_is_named_by_the_directory_alone(plan: LaunchPlan) -> None:
    assert plan.cgroup.name == cgroup_name(DIRECTORY) != cgroup_name(DIRECTORY.with_name("other"))


def test_confinement_of_root(plan: LaunchPlan) -> None:
    c = plan.confinement
    assert (c.uid, c.gid) == (IDENTITY.uid, IDENTITY.uid)
    assert c.private_root
    assert not c.new_network
    assert c.devices == ()
    assert not c.rw_binds
    assert Path("/guest/vmlinux") in c.ro_binds
    assert ("PODVISOR_VM", str(DIRECTORY)) in c.environment
    assert plan.spawned_argv()[-len(plan.argv) :] == list(plan.argv)


def test_net_none_has_no_network_at_all(guest: GuestImage, capabilities: HostCapabilities) -> None:
    plan = plan_launch(VmConfig(name="p", guest=guest, net="none"), capabilities, DIRECTORY, IDENTITY)
    assert plan.confinement.new_network


def test_an_ordinary_user_without_namespaces(guest: GuestImage, capabilities: HostCapabilities) -> None:
    host = replace(
        capabilities,
        uid_range=None,
        confinement=ConfinementSupport(False, False, False, "no"),
        cgroup_layout=Layout("none"),
    )
    plan = plan_launch(VmConfig(name="p", guest=guest), host, DIRECTORY, VmIdentity(10_001, None))
    assert plan.confinement.uid is None
    assert plan.confinement.ro_binds == ()
    assert plan.confinement.cgroups == ()


def test_kvm_is_shown_its_device(guest: GuestImage, capabilities: HostCapabilities) -> None:
    plan = plan_launch(VmConfig(name="p", guest=guest), replace(capabilities, kvm_unusable=None), DIRECTORY, IDENTITY)
    assert plan.accelerator == "kvm"
    assert plan.confinement.devices == ("kvm",)


def test_kvm_wished_for_and_unusable(guest: GuestImage, capabilities: HostCapabilities) -> None:
    with pytest.raises(HostUnfit, match="no /dev/kvm"):
        plan_launch(VmConfig(name="p", guest=guest, accelerator="kvm"), capabilities, DIRECTORY, IDENTITY)


def test_either_vsock(guest: GuestImage, capabilities: HostCapabilities, plan: LaunchPlan) -> None:
    assert plan.address == UnixVsock(DIRECTORY / "vmx/vsock.sock")
    assert vmx_config(plan).guest_cid == IDENTITY.cid
    kernel = plan_launch(VmConfig(name="p", guest=guest), replace(capabilities, vsock="kernel"), DIRECTORY, IDENTITY)
    assert kernel.address == KernelVsock(IDENTITY.cid)
    assert vmx_config(kernel).guest_cid is None


@pytest.mark.parametrize(("path", "says"), [("relative", "absolute"), ("/" + "x" * 90, "--state-dir")])
def test_a_directory_that_no_socket_fits_in(
    guest: GuestImage, capabilities: HostCapabilities, path: str, says: str
) -> None:
    with pytest.raises(InvalidInput, match=says):
        plan_launch(VmConfig(name="p", guest=guest), capabilities, Path(path), IDENTITY)
