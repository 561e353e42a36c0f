"""A guest gives memory back through a balloon: what it gave back is zeroes for it ever after, not the source's data."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from vsock_guest import GUEST_DIR, ROOT

from hypervisor.memory.database import PageFrameDatabase, SourceKind, new_memory_file
from hypervisor.memory.native import PAGE
from hypervisor.vmm.capabilities import RAM_LIBRARY
from hypervisor.vmm.qmp import Qmp
from hypervisor.vmx.config import RamConfig, RamFds
from hypervisor.vmx.ram import LazyRam

pytestmark = [pytest.mark.root, pytest.mark.qemu, pytest.mark.uffd]

RAM_BYTES = 128 << 20
LEFT_BYTES = 64 << 20
SOURCE = ROOT / "tests/c/memory/balloon_guest.c"
#: what every page of RAM is before somebody writes to it; a kernel must not care
PATTERN = b"\xa5" * PAGE


def build_initrd(folder: Path) -> Path:
    """The guest image's modules, the balloon's out of the same kernel package, and another /init."""
    packages = list((GUEST_DIR / "cache").glob("linux-image-*.deb"))
    if len(packages) != 1:
        pytest.skip(f"{GUEST_DIR}/cache has {len(packages)} kernel packages; the balloon's module is in it")
    tree = folder / "root"
    (tree / "modules").mkdir(parents=True)
    subprocess.run(["gcc", "-O2", "-static", "-o", tree / "init", SOURCE], check=True)
    names = ["./lib/modules/*/kernel/drivers/virtio/virtio_balloon.ko"]
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", packages[0]], stdout=subprocess.PIPE) as package:
        module = subprocess.run(["tar", "-xO", "--wildcards", *names], stdin=package.stdout, capture_output=True)
    (tree / "modules/virtio_balloon.ko").write_bytes(module.stdout)
    files = b"init\nmodules\nmodules/virtio_balloon.ko\n"
    cpio = ["cpio", "--quiet", "-o", "-H", "newc"]
    archive = subprocess.run(cpio, input=files, cwd=tree, stdout=subprocess.PIPE, check=True).stdout
    initrd = folder / "initrd.img"
    initrd.write_bytes((GUEST_DIR / "initrd.img").read_bytes() + archive)
    return initrd


def lazy_ram(folder: Path, library: int, stack: contextlib.ExitStack) -> LazyRam:
    """RAM that is filled with `PATTERN` from a file."""
    source = folder / "source"
    source.write_bytes(PATTERN * (RAM_BYTES // PAGE))
    fd = new_memory_file("frames")
    database = PageFrameDatabase.create(fd, max_vads=8, max_pfes=RAM_BYTES // PAGE + 1)
    stack.callback(database.close)
    vad = database.add(SourceKind.FILE, pages=RAM_BYTES // PAGE, offset=0)
    config = RamConfig(ram_bytes=RAM_BYTES, mappings=((0, RAM_BYTES // PAGE, vad, 0),))
    device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
    fds = RamFds(qemu=library, database=fd, template=os.open(source, os.O_RDONLY | os.O_CLOEXEC), device=device)
    return LazyRam(config, fds, failed=lambda reason: None)


def argv(folder: Path, initrd: Path) -> list[str]:
    return [
        *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-accel", "tcg", "-cpu", "max", "-display", "none"),
        *("-machine", "pc,memory-backend=ram", "-m", f"{RAM_BYTES >> 20}M", "-serial", "stdio"),
        *("-object", f"memory-backend-memfd,id=ram,size={RAM_BYTES},share=on", "-device", "virtio-balloon-pci"),
        *("-kernel", str(GUEST_DIR / "vmlinuz"), "-initrd", str(initrd), "-append", "console=ttyS0 quiet panic=-1"),
        *("-qmp", f"unix:{folder}/qmp,server=on,wait=off"),
    ]


@contextlib.asynccontextmanager
async def balloon_guest(folder: Path) -> AsyncIterator[tuple[Qmp, LazyRam]]:
    """A guest that is up, its QMP, and its RAM. QEMU is killed at the end; the fault server stays as long as pytest."""
    initrd = await asyncio.to_thread(build_initrd, folder)
    with contextlib.ExitStack() as stack:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ram = await asyncio.to_thread(lazy_ram, folder, ours.detach(), stack)
        ram.start()
        environment = {"LD_PRELOAD": str(RAM_LIBRARY), "HV_RAM": f"{RAM_BYTES}:{theirs.fileno()}:serve:-1"}
        pipe = asyncio.subprocess.PIPE
        qemu = await asyncio.create_subprocess_exec(
            *argv(folder, initrd), env=os.environ | environment, stdout=pipe, pass_fds=[theirs.fileno()]
        )
        theirs.close()
        try:
            assert qemu.stdout is not None
            async with asyncio.timeout(90):
                seen = b""
                while b"balloon guest is up" not in seen:
                    line = await qemu.stdout.readline()
                    assert line, f"the guest never came up:\n{seen.decode(errors='replace')}"
                    seen += line
            assert b"cannot load" not in seen, seen
            yield await Qmp.connect(folder / "qmp", name="balloon"), ram
        finally:
            with contextlib.suppress(ProcessLookupError):
                qemu.kill()
            await qemu.wait()


async def balloon_to(qmp: Qmp, size: int) -> None:
    """Asks the guest, and waits until it has it."""
    await qmp.execute("balloon", {"value": size})
    async with asyncio.timeout(60):
        while (await qmp.execute("query-balloon"))["actual"] != size:  # noqa: ASYNC110 -- the event for it may be lost
            await asyncio.sleep(0.05)


async def test_what_a_balloon_took_comes_back_as_zeroes(tmp_path: Path) -> None:
    async with balloon_guest(tmp_path) as (qmp, ram):
        untouched = RAM_BYTES // PAGE - ram.stats()["pages_copied"]
        await balloon_to(qmp, LEFT_BYTES)
        removed = ram.stats()["removed_pages"]
        assert removed >= (RAM_BYTES - LEFT_BYTES) // PAGE
        await balloon_to(qmp, RAM_BYTES)
        await qmp.execute("stop")
        image = tmp_path / "memory"
        await qmp.execute("pmemsave", {"val": 0, "size": RAM_BYTES, "filename": str(image)})
        data = image.read_bytes()
        pages = [data[at : at + PAGE] for at in range(0, RAM_BYTES, PAGE)]
        zeroes, pattern = pages.count(bytes(PAGE)), pages.count(PATTERN)
        assert zeroes >= removed * 0.9, (zeroes, pattern, removed)
        # What was never given back still is the source's, the part that nobody had touched before included.
        assert 0 < pattern <= untouched, (zeroes, pattern, removed)
        assert ram.stats()["pages_zeroed"] >= removed * 0.9
