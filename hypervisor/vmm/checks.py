"""What ``hv doctor`` tells: what this machine has for the main job, what it lacks, and how to mend that.

Each check is a small function that looks at one thing and answers with a `Finding`; none changes anything, but for the
accelerator probe's remembered answer.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import shutil
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hypervisor.errors import HvError
from hypervisor.vmm import accel, capabilities, cgroup, confine
from hypervisor.vmm.guest import GuestImage
from hypervisor.vsock.address import kernel_vsock_available

Status = Literal["ok", "warn", "fail"]

GIB = 1 << 30
MIB = 1 << 20
MIN_FREE_DISK = 1 * GIB
COMFORTABLE_DISK = 5 * GIB
MIN_MEMORY = 384 * MIB
COMFORTABLE_MEMORY = 2 * GIB
MIN_KERNEL = (5, 12)
"""For mount_setattr, close_range and pidfd_open."""

_USERFAULTFD_CALL = {"x86_64": 323, "aarch64": 282}
_USER_MODE_ONLY = 1


@dataclass(frozen=True)
class Finding:
    """One thing that was looked for. ``dataclasses.asdict`` of it is JSON.

    :param status: ok; warn: works, with less; fail: what it is for does not work
    :param found: what is there, in one line
    :param fix: what to do about it; empty when ok
    :param needed_for_main_job: running a container in a pod VM needs it
    """

    name: str
    status: Status
    found: str
    fix: str = ""
    needed_for_main_job: bool = False


@dataclass(frozen=True)
class Program:
    """A program that is run, and the Debian package that has it."""

    name: str
    package: str
    purpose: str
    needed: bool = True


PROGRAMS = (
    Program("qemu-system-x86_64", "qemu-system-x86", "runs the VMs"),
    Program("mkfs.erofs", "erofs-utils", "makes disks of images"),
    Program("mke2fs", "e2fsprogs", "makes the pods' writable disks"),
    Program("skopeo", "skopeo", "pulls images from registries", needed=False),
)


def main_job_possible(findings: list[Finding]) -> bool:
    """Whether a container could be run; else ``hv doctor`` exits non-zero."""
    return not any(finding.needed_for_main_job and finding.status == "fail" for finding in findings)


async def run_checks(*, state_directory: Path, guest_directory: Path | None = None) -> list[Finding]:
    """Every check, in the order of the table. Takes some seconds where KVM has to be tried; raises nothing on purpose.

    :param state_directory: the host's; it need not exist yet
    :param guest_directory: None: the default one
    """
    image, image_finding = await asyncio.to_thread(_guest_image, guest_directory)
    kernel = image.kernel if image else None
    findings = [await asyncio.to_thread(check_kernel)]
    findings += [await asyncio.to_thread(check_program, program) for program in PROGRAMS]
    findings += [
        await check_qemu(),
        image_finding,
        await _guarded("confinement", check_confinement),
    ]
    findings += await check_accelerator(kernel, state_directory)
    for check in (check_vsock, check_userfaultfd, check_tun, check_cgroup, check_memory):
        findings.append(await asyncio.to_thread(check))
    findings.append(await asyncio.to_thread(check_disk, state_directory))
    findings.append(await asyncio.to_thread(check_user))
    return findings


async def _guarded(name: str, check: Callable[[], Awaitable[Finding]]) -> Finding:
    try:
        return await check()
    except HvError as error:
        return Finding(name, "fail", str(error), needed_for_main_job=True)


def check_kernel() -> Finding:
    """The host's kernel has the system calls that are used."""
    system = os.uname()
    found = f"{system.sysname} {system.release} on {system.machine}"
    version = tuple(int(part) for part in system.release.split("-")[0].split(".")[:2] if part.isdigit())
    if version < MIN_KERNEL:
        return Finding("kernel", "fail", found, f"use Linux {MIN_KERNEL[0]}.{MIN_KERNEL[1]} or newer", True)
    if system.machine != "x86_64":
        return Finding("kernel", "fail", found, "only x86-64 guests are built so far", True)
    return Finding("kernel", "ok", found, needed_for_main_job=True)


def check_program(program: Program) -> Finding:
    """A program is found, system directories included."""
    name = f"program {program.name}"
    try:
        path = capabilities.find_program(program.name, package=program.package)
    except HvError:
        fix = f"apt-get install {program.package}   ({program.purpose})"
        return Finding(name, "fail" if program.needed else "warn", "not installed", fix, program.needed)
    return Finding(name, "ok", str(path), needed_for_main_job=program.needed)


async def check_qemu() -> Finding:
    """QEMU is recent enough and has the devices that VMs are made of."""
    try:
        qemu = capabilities.find_program(capabilities.QEMU_NAME, package="qemu-system-x86")
        version = await capabilities.qemu_version(qemu)
        devices = await _output(str(qemu), "-device", "help")
    except (HvError, OSError) as error:
        return Finding("QEMU", "fail", str(error), "apt-get install qemu-system-x86", True)
    found = f"{qemu} {'.'.join(map(str, version))}"
    if version < capabilities.MIN_QEMU:
        return Finding("QEMU", "fail", found, f"install {'.'.join(map(str, capabilities.MIN_QEMU))} or newer", True)
    lacking = [name for name in ("virtio-blk-pci", "vhost-user-vsock-pci") if f'"{name}"' not in devices]
    if lacking:
        fix = "use a QEMU that was built with vhost-user, as Debian's is"
        return Finding("QEMU", "fail", f"{found}, without {', '.join(lacking)}", fix, True)
    return Finding("QEMU", "ok", found, needed_for_main_job=True)


async def check_confinement() -> Finding:
    """The launcher is there and can make a private root."""
    support = await confine.host_support()
    if not support.private_root:
        fix = "run as root, or allow user namespaces (sysctl kernel.unprivileged_userns_clone, AppArmor)"
        return Finding("confinement", "warn", f"{support.reason}; VMs see the file system as the user does", fix, True)
    if not support.own_user:
        return Finding("confinement", "warn", support.reason, "run the host as root for a user per VM", True)
    return Finding("confinement", "ok", "own user, private root, seccomp, no capabilities", needed_for_main_job=True)


async def check_accelerator(kernel: Path | None, state_directory: Path) -> list[Finding]:
    """KVM, tried anew, and what it means where there is none."""
    probe = await _probe_kvm(kernel, state_directory)
    if probe.usable:
        return [Finding("KVM", "ok", probe.reason)]
    return [
        Finding("KVM", "warn", f"unusable: {probe.reason}", "nothing is lost but speed: VMs run under TCG"),
        Finding(
            "isolation",
            "warn",
            "VMs run under TCG, which by QEMU's own policy is no security boundary; each VM's processes are confined",
            "run code that you do not trust only where KVM is usable",
        ),
    ]


async def _probe_kvm(kernel: Path | None, state_directory: Path) -> accel.KvmProbe:
    try:
        qemu = capabilities.find_program(capabilities.QEMU_NAME, package="qemu-system-x86")
        cache = _existing(state_directory)
        return await accel.probe_kvm(qemu=qemu, kernel=kernel, cache_directory=cache, fresh=True)
    except (HvError, OSError) as error:
        return accel.KvmProbe(False, str(error), final=False)


def check_vsock() -> Finding:
    """Which host side VMs' virtual sockets get; there always is one."""
    kernel = kernel_vsock_available()
    if kernel.ok:
        return Finding("vsock", "ok", f"the kernel's: {kernel.found}", needed_for_main_job=True)
    return Finding("vsock", "ok", f"podvisor's own vhost-user back end ({kernel.found})", needed_for_main_job=True)


def check_userfaultfd() -> Finding:
    """Lazily loaded RAM needs it, with faults from kernel mode too."""
    number = _USERFAULTFD_CALL.get(os.uname().machine)
    if number is None:
        return Finding("userfaultfd", "warn", "not known for this architecture")
    full, user_only = _open_userfaultfd(number, 0), _open_userfaultfd(number, _USER_MODE_ONLY)
    setting = _read("/proc/sys/vm/unprivileged_userfaultfd") or "absent"
    if not full:
        return Finding("userfaultfd", "ok", f"usable (vm.unprivileged_userfaultfd = {setting})")
    fix = "run as root, or sysctl vm.unprivileged_userfaultfd=1; until then VMs start without lazily loaded RAM"
    if not user_only:
        return Finding("userfaultfd", "warn", f"user mode faults only (vm.unprivileged_userfaultfd = {setting})", fix)
    return Finding("userfaultfd", "warn", f"not usable: {user_only}", fix)


def _open_userfaultfd(number: int, flags: int) -> str:
    """Returns why it does not open, else an empty string."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(ctypes.c_long(number), ctypes.c_int(os.O_CLOEXEC | flags))
    if fd < 0:
        return os.strerror(ctypes.get_errno())
    os.close(fd)
    return ""


def check_tun() -> Finding:
    """For the pod network; user-mode networking needs none."""
    device = Path("/dev/net/tun")
    if not device.exists():
        return Finding("tun", "warn", f"{device} does not exist", "modprobe tun; user-mode networking works without")
    if not os.access(device, os.R_OK | os.W_OK):
        return Finding(
            "tun", "warn", f"{device} may not be opened by this user", "run as root; not needed for --net user"
        )
    return Finding("tun", "ok", str(device))


def check_cgroup() -> Finding:
    """Whether VMs' memory, CPU time and processes can be limited and counted on the host."""
    layout = cgroup.detect()
    if layout.kind == "none":
        return Finding("cgroup", "warn", "none usable: VMs run without host limits", layout.reason)
    found = f"{layout.kind}: {', '.join(layout.controllers)}"
    return Finding("cgroup", "warn" if layout.reason else "ok", found, layout.reason)


def check_memory() -> Finding:
    """Enough for a small VM now."""
    rows = (line.split() for line in (_read("/proc/meminfo") or "").splitlines())
    available = next((int(row[1]) * 1024 for row in rows if row[0] == "MemAvailable:"), 0)
    found = f"{available // MIB} MiB available"
    if available < MIN_MEMORY:
        return Finding("memory", "fail", found, f"a pod VM needs about {MIN_MEMORY // MIB} MiB", True)
    if available < COMFORTABLE_MEMORY:
        return Finding("memory", "warn", found, "room for few pods only", True)
    return Finding("memory", "ok", found, needed_for_main_job=True)


def check_disk(state_directory: Path) -> Finding:
    """Room for images and pods' disks where the state directory is or will be, and the right to write there."""
    place = state_directory.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not os.access(place, os.W_OK | os.X_OK):
        return Finding(
            "state directory", "fail", f"{place} may not be written", "choose another with --state-dir", True
        )
    free = shutil.disk_usage(place).free
    found = f"{state_directory}: {free // MIB} MiB free"
    if free < MIN_FREE_DISK:
        return Finding("state directory", "fail", found, "free some space, or choose another with --state-dir", True)
    if free < COMFORTABLE_DISK:
        return Finding("state directory", "warn", found, "room for few images only", True)
    return Finding("state directory", "ok", found, needed_for_main_job=True)


def check_user() -> Finding:
    """What an ordinary user goes without."""
    if os.geteuid() == 0:
        return Finding("user", "ok", "root")
    lacks = "no user of its own per VM"
    if cgroup.detect().kind == "none":
        lacks += ", no limits on the host"
    if accel.KVM_DEVICE.exists() and not os.access(accel.KVM_DEVICE, os.R_OK | os.W_OK):
        lacks += ", no KVM"
    return Finding("user", "warn", f"uid {os.geteuid()}: {lacks}", "run the host as root for all of it")


def _guest_image(directory: Path | None) -> tuple[GuestImage | None, Finding]:
    try:
        image = GuestImage.load(directory)
    except HvError as error:
        return None, Finding("guest image", "fail", str(error), "make guest-image", True)
    return image, Finding("guest image", "ok", f"{image.directory}, Linux {image.release}", needed_for_main_job=True)


async def _output(*argv: str) -> str:
    """Standard output of a short command; raises OSError when it does not run or hangs."""
    process = await asyncio.create_subprocess_exec(
        *argv, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        async with asyncio.timeout(10):
            out, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return out.decode(errors="replace")


def _existing(directory: Path) -> Path | None:
    return directory if directory.is_dir() else None


def _read(file: str) -> str | None:
    try:
        return Path(file).read_text().strip()
    except OSError:
        return None
