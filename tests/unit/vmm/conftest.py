"""Values that VMM tests start from, and ``pytest tests/unit/vmm --regenerate`` for the golden files."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from hypervisor.vmm.capabilities import HostCapabilities
from hypervisor.vmm.cgroup import Layout
from hypervisor.vmm.confine import ConfinementSupport
from hypervisor.vmm.guest import GuestImage


def pytest_addoption(parser: pytest.Parser) -> None:
    with contextlib.suppress(ValueError):  # another folder's conftest has it
        parser.addoption("--regenerate", action="store_true", help="write golden files anew instead of comparing")


@pytest.fixture
def guest() -> GuestImage:
    """An image whose files need not exist."""
    folder = Path("/guest")
    return GuestImage(folder, folder / "vmlinux", folder / "initrd.img", folder / "root.erofs", "6.1.0", 1)


@pytest.fixture
def capabilities() -> HostCapabilities:
    """A host with root, cgroup v2, no KVM and no vhost-vsock."""
    return HostCapabilities(
        qemu=Path("/usr/bin/qemu-system-x86_64"),
        qemu_version=(7, 2, 0),
        kvm_unusable="no /dev/kvm",
        vsock="vhost-user",
        uid_range=(0x70000000, 0x70000003),
        confinement=ConfinementSupport(True, False, True),
        cgroup_layout=Layout("v2", {"unified": Path("/sys/fs/cgroup")}, ("cpu", "memory", "pids")),
        cgroup_scope="abc123",
        mke2fs=Path("/sbin/mke2fs"),
    )
