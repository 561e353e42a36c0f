"""What this host can give VMs: probed once, then passed explicitly to whoever plans."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hypervisor.errors import HostUnfit
from hypervisor.vmm.accel import KvmProbe, probe_kvm
from hypervisor.vmm.argv import Accelerator, VsockPath
from hypervisor.vmm.cgroup import Layout, detect, scope_of
from hypervisor.vmm.config import AcceleratorWish
from hypervisor.vmm.confine import LIBEXEC, ConfinementSupport, host_support

QEMU_NAME = "qemu-system-x86_64"
MIN_QEMU = (7, 2)
VHOST_VSOCK = Path("/dev/vhost-vsock")
USERFAULTFD = Path("/dev/userfaultfd")
RAM_LIBRARY = LIBEXEC / "hv-ram.so"
#: users of VMs when hostd is root: just above the last range that systemd hands to containers; no subuid file goes
#: there
VM_UIDS = (0x70000000, 0x7000FFFF)
_SEARCH = os.defpath + ":/usr/local/sbin:/usr/local/bin:/usr/sbin:/sbin"

VsockWish = Literal["auto", "kernel", "vhost-user"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostCapabilities:
    """
    :param kvm_unusable: why KVM cannot run a guest here; None: it can
    :param lazy_ram_unusable: why guest RAM cannot be filled from a template as it is touched; None: it can
    :param vsock: which host side of vsock new VMs get
    :param uid_range: first and last of the users that VMs run as; None: they run as hostd's own user
    :param confinement: how far VMs can be confined
    :param cgroup_scope: keeps the cgroups of this machine's state directories apart
    """

    qemu: Path
    qemu_version: tuple[int, int, int]
    kvm_unusable: str | None
    vsock: VsockPath
    uid_range: tuple[int, int] | None
    confinement: ConfinementSupport
    cgroup_layout: Layout
    cgroup_scope: str
    mke2fs: Path | None
    lazy_ram_unusable: str | None = None

    def choose_accelerator(self, wish: AcceleratorWish) -> Accelerator:
        """KVM where it is wished for or, with ``auto``, works.

        :raises HostUnfit: ``kvm`` is wished for and cannot run a guest; says why
        """
        if wish == "tcg" or (wish == "auto" and self.kvm_unusable):
            return "tcg"
        if self.kvm_unusable:
            raise HostUnfit(f"KVM cannot run a guest here: {self.kvm_unusable}; use accelerator auto or tcg")
        return "kvm"


async def probe(
    state_directory: Path,
    *,
    guest_kernel: Path | None,
    accelerator: AcceleratorWish = "auto",
    vsock: VsockWish = "auto",
) -> HostCapabilities:
    """Look at this host.

    :param state_directory: hostd's; VMs of two of them on one machine never meet
    :param vsock: ``auto``: the kernel's where ``/dev/vhost-vsock`` opens
    :param guest_kernel: for the KVM probe, which takes some seconds the first time; see `hypervisor.vmm.accel`
    :param accelerator: ``tcg``: KVM is not even probed
    :raises HostUnfit: QEMU is missing or too old, or ``hv-confine`` is not built
    """
    qemu = find_program(QEMU_NAME, package="qemu-system-x86")
    version = await qemu_version(qemu)
    if version < MIN_QEMU:
        raise HostUnfit(
            f"{qemu} is version {'.'.join(map(str, version))}; install {MIN_QEMU[0]}.{MIN_QEMU[1]} or later"
        )
    kvm = KvmProbe(False, "it was not asked for")
    if accelerator != "tcg":
        kvm = await probe_kvm(qemu=qemu, kernel=guest_kernel, cache_directory=state_directory)
    return HostCapabilities(
        qemu=qemu, qemu_version=version, kvm_unusable=None if kvm.usable else kvm.reason, vsock=_vsock_path(vsock),
        uid_range=VM_UIDS if os.geteuid() == 0 else None, confinement=await host_support(),
        cgroup_layout=await asyncio.to_thread(detect), cgroup_scope=scope_of(state_directory), mke2fs=_which("mke2fs"),
        lazy_ram_unusable=lazy_ram_unusable(),
    )  # fmt: skip


def lazy_ram_unusable() -> str | None:
    """Why clones cannot fill their RAM lazily here; None: they can.

    Kernel-mode faults (QEMU's own reads into RAM, KVM's) must be delivered, so the device file is needed: the system
    call gives an ordinary user user-mode faults only.
    """
    if not RAM_LIBRARY.exists():
        return f"{RAM_LIBRARY} is missing: build it with 'make native'"
    try:
        os.close(os.open(USERFAULTFD, os.O_RDWR | os.O_CLOEXEC))
    except OSError as e:
        return f"{USERFAULTFD}: {e.strerror} (it needs Linux 6.1 or later, and this user the right to open it)"
    return None


def find_program(name: str, *, package: str) -> Path:
    """Where `name` is, system directories included.

    :raises HostUnfit: nowhere; names the Debian package to install
    """
    if found := _which(name):
        return found
    raise HostUnfit(f"{name} is not installed; install the package {package}")


def _which(name: str) -> Path | None:
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:{_SEARCH}")
    return Path(found) if found else None


async def qemu_version(qemu: Path) -> tuple[int, int, int]:
    """The version that ``qemu --version`` tells.

    :raises HostUnfit: it does not run, or says something else
    """
    try:
        process = await asyncio.create_subprocess_exec(
            str(qemu), "--version", stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
    except OSError as e:
        raise HostUnfit(f"{qemu} does not run: {e.strerror}") from e
    try:
        out, _ = await asyncio.wait_for(process.communicate(), 10)
    except TimeoutError as e:
        raise HostUnfit(f"`{qemu} --version` gave no answer in 10 s") from e
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    match = re.search(rb"version (\d+)\.(\d+)\.(\d+)", out)
    if match is None:
        raise HostUnfit(f"`{qemu} --version` says {out[:80]!r}, which names no version")
    return int(match[1]), int(match[2]), int(match[3])


def _vsock_path(wish: VsockWish) -> VsockPath:
    if wish != "auto":
        return wish
    return "kernel" if os.access(VHOST_VSOCK, os.R_OK | os.W_OK) else "vhost-user"
