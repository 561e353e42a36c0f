"""A real Linux guest that serves raw AF_VSOCK (tests/c/vsock/guest.c), behind a vmx from a zygote, as in a pod VM."""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import subprocess
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from hypervisor.vmx.config import VmxConfig
from hypervisor.vmx.process import ProcessId
from hypervisor.vmx.zygote import Zygote
from hypervisor.vsock.address import KernelVsock, VsockAddress

ROOT = Path(__file__).parents[2]
GUEST_DIR = Path(os.environ.get("HV_GUEST_DIR", ROOT / "guest-images/out"))
SOURCE = ROOT / "tests/c/vsock/guest.c"

ECHO, TAKE_BLOCKS, GIVE_BLOCKS, DIAL, NEVER_READ = 7, 9, 19, 20, 21
BLOCK_BYTES = 1 << 20
UID = 64123
CID = 4711
_BOOT_SECONDS = 60 * float(os.environ.get("HV_TEST_PATIENCE", "1"))
_MASK = (1 << 64) - 1


def make_block() -> bytearray:
    """The guest's block: xorshift64."""
    words, x = array.array("Q"), 88172645463325252
    for _ in range(BLOCK_BYTES // 8):
        x ^= x << 13 & _MASK
        x ^= x >> 7
        x ^= x << 17 & _MASK
        words.append(x)
    return bytearray(words.tobytes())


def number_block(block: bytearray, number: int) -> bytearray:
    """The block again, with its number in it."""
    block[:8] = number.to_bytes(8, "little")
    return block


def build_initrd(folder: Path) -> Path:
    """The guest image's initramfs with another /init: archives may simply follow each other, the later file wins.

    Where there is no compiler, one made before: below HV_PREBUILT.
    """
    if "HV_PREBUILT" in os.environ:
        return Path(os.environ["HV_PREBUILT"], "vsock-initrd.img")
    root = folder / "root"
    root.mkdir()
    subprocess.run(["gcc", "-O2", "-static", "-o", root / "init", SOURCE], check=True)
    cpio = ["cpio", "--quiet", "-o", "-H", "newc"]
    archive = subprocess.run(cpio, input=b"init\n", cwd=root, stdout=subprocess.PIPE, check=True).stdout
    initrd = folder / "initrd.img"
    initrd.write_bytes((GUEST_DIR / "initrd.img").read_bytes() + archive)
    return initrd


@dataclass(frozen=True)
class VsockGuest:
    """The guest, up."""

    address: VsockAddress
    vmx: ProcessId | None
    qemu: asyncio.subprocess.Process
    folder: Path

    async def wait_up(self) -> None:
        """Until the guest says on its console that it serves; again after each reset."""
        assert self.qemu.stdout is not None
        async with asyncio.timeout(_BOOT_SECONDS):
            seen = b""
            while b"vsock guest is up" not in seen:
                line = await self.qemu.stdout.readline()
                assert line, f"the guest never came up:\n{seen.decode(errors='replace')}"
                seen += line

    def qemu_cpu_seconds(self) -> float:
        return cpu_seconds(self.qemu.pid)

    def vmx_cpu_seconds(self) -> float:
        assert self.vmx is not None
        return cpu_seconds(self.vmx.pid)


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


_CMDLINE = "console=ttyS0 quiet panic=-1 rcupdate.rcu_expedited=1 tsc=reliable no_timer_check random.trust_cpu=on"


def _argv(directory: Path, initrd: Path, accelerator: str, device: tuple[str, ...]) -> list[str]:
    memory = "memory-backend-memfd,id=ram,size=512M,share=on"
    return [
        *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-accel", accelerator),
        *("-cpu", "max" if accelerator == "tcg" else "host"),
        *("-machine", "pc,memory-backend=ram", "-object", memory, "-m", "512M"),
        *("-display", "none", "-serial", "stdio"),
        *("-kernel", str(GUEST_DIR / "vmlinuz"), "-initrd", str(initrd), "-append", _CMDLINE),
        *device,
        *("-qmp", f"unix:{directory}/qmp.sock,server=on,wait=off"),
    ]


@contextlib.asynccontextmanager
async def vsock_guest(accelerator: str = "tcg") -> AsyncIterator[VsockGuest]:
    """A guest, up; QEMU is killed at the end, and vmx must follow it by itself."""
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory(prefix="hvt-") as folder:
        directory, initrd = await asyncio.to_thread(_prepare, Path(folder), root)
        config = VmxConfig(directory=directory, guest_cid=CID, uid=UID if root else None, gid=UID if root else None)
        async with _running(config, initrd, accelerator) as guest:
            yield guest


def _prepare(folder: Path, root: bool) -> tuple[Path, Path]:
    folder.chmod(0o711)
    directory = folder / "vm"
    directory.mkdir(mode=0o700)
    if root:
        os.chown(directory, UID, UID)
    return directory, build_initrd(folder)


@contextlib.asynccontextmanager
async def _running(config: VmxConfig, initrd: Path, accelerator: str) -> AsyncIterator[VsockGuest]:
    device = (
        *("-chardev", f"socket,id=vsock,path={config.frontend_path}"),
        *("-device", "vhost-user-vsock-pci,chardev=vsock"),
    )
    async with Zygote.start() as zygote:
        vmx = await zygote.fork(config)
        try:
            async with _qemu(_argv(config.directory, initrd, accelerator, device)) as qemu:
                guest = VsockGuest(config.address, vmx, qemu, config.directory)
                await guest.wait_up()
                yield guest
        finally:
            async with asyncio.timeout(10):
                await vmx.wait_exit()


@contextlib.asynccontextmanager
async def kernel_vsock_guest(cid: int = CID) -> AsyncIterator[VsockGuest]:
    """The same guest under KVM with the kernel's vhost-vsock in place of a vmx."""
    with tempfile.TemporaryDirectory(prefix="hvt-") as folder:
        directory, initrd = await asyncio.to_thread(_prepare, Path(folder), False)
        device = ("-device", f"vhost-vsock-pci,guest-cid={cid}")
        async with _qemu(_argv(directory, initrd, "kvm", device)) as qemu:
            guest = VsockGuest(KernelVsock(cid), None, qemu, directory)
            await guest.wait_up()
            yield guest


@contextlib.asynccontextmanager
async def _qemu(argv: list[str]) -> AsyncIterator[asyncio.subprocess.Process]:
    pipe = asyncio.subprocess.PIPE
    qemu = await asyncio.create_subprocess_exec(*argv, stdin=asyncio.subprocess.DEVNULL, stdout=pipe)
    try:
        yield qemu
    finally:
        with contextlib.suppress(ProcessLookupError):
            qemu.kill()
        await qemu.wait()
