"""Takes a snapshot of a VM that runs.

Theory of operation
-------------------
::

    RUNNING -> vsock device unplugged (vhost-user's cannot be migrated) -> STOPPED -> device state saved
        -> RAM compared with its base, and written -> disk linked or copied -> manifest
        -> HELD: the guest stands still, and the caller decides: end it, or `wake` it
        failed or cancelled anywhere: the folder goes, and the guest is woken

`wake` is also what follows a daemon that was killed amid this: it plugs in what is missing and lets the guest go on,
from wherever it was left.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import os
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from hypervisor.errors import Conflict, HvError, InvalidInput
from hypervisor.vmm import launch, records
from hypervisor.vmm.directory import VmDirectory, write_atomically
from hypervisor.vmm.snapshots import index
from hypervisor.vmm.snapshots.compact import compact
from hypervisor.vmm.snapshots.index import TEMPLATE, ZERO, Piece
from hypervisor.vmm.snapshots.layer import PAGE, LayerWriter
from hypervisor.vmm.snapshots.memory import Base, Difference, write_difference
from hypervisor.vmm.snapshots.snapshot import (
    FORMAT,
    MAX_LAYERS,
    Layer,
    Manifest,
    Snapshot,
    copy_sparse,
    full,
    link_or_copy,
)
from hypervisor.vmm.succession import borrow, devices, ram_descriptor, unplug
from hypervisor.vmm.templates.frames import pieces as template_pieces
from hypervisor.vmm.templates.template import Template, digest_of
from hypervisor.vmm.vm import RunningVm
from hypervisor.vmx import working_set
from hypervisor.vmx.process import ProcessId

log = structlog.get_logger(__name__)

_SAVE_TIMEOUT_S = 60.0
_HELD = ("paused", "postmigrate", "prelaunch", "finish-migrate")

#: puts the VM's own disk, the first one, where the second says; blocks; raises OSError
DiskCopy = Callable[[Path, Path], None]


@dataclass(frozen=True, slots=True)
class Taken:
    """What taking it took.

    :ivar paused_s: seconds that the guest stood still, up to now
    :ivar pages: pages of RAM written; `looked_at`: compared
    """

    snapshot: Snapshot
    paused_s: float
    pages: int
    looked_at: int


async def take(
    vm: RunningVm, folder: Path, *, name: str, copy_disk: DiskCopy = link_or_copy, durable: bool = True
) -> Taken:
    """Makes the snapshot `folder`; on return the guest stands still. Failed or cancelled: it goes on, there is none.

    :param folder: must not exist
    :param durable: it is on stable storage on return
    :raises Conflict: the VM was not started from a template
    :raises ResourceExhausted: the disk is full
    """
    refuse_unfit(vm)
    try:
        await asyncio.to_thread(folder.mkdir, 0o700)
        if vm.plan.vmx.guest_cid is not None:
            await unplug(vm)
        began = time.monotonic()
        await vm.pause()
        await _save_state(vm, folder)
        difference, snapshot = await _thread(functools.partial(_write, vm, folder, name, copy_disk))
        if len(snapshot.manifest.layers) > 2 * MAX_LAYERS - 1:
            snapshot = await asyncio.to_thread(compact, snapshot)
        if durable:
            await asyncio.to_thread(sync, folder)
        return Taken(snapshot, time.monotonic() - began, difference.written, difference.looked_at)
    except BaseException as e:
        await asyncio.shield(_undo(vm, folder))
        if isinstance(e, OSError):
            raise full(e, folder) from e
        raise


async def take_and_wake(vm: RunningVm, folder: Path, *, name: str) -> Taken:
    """Makes the snapshot `folder`; on return the guest goes on, and the next snapshot has only what differs from this.

    Raises as `take`, and leaves what it leaves.
    """
    began = time.monotonic()
    taken = await take(vm, folder, name=name, copy_disk=copy_sparse, durable=False)
    held = time.monotonic()
    try:
        await wake(vm)
        paused_s = taken.paused_s + time.monotonic() - held
        snapshot = await asyncio.to_thread(_kept, taken.snapshot, vm.plan.files)
    except BaseException as e:
        await asyncio.shield(_undo(vm, folder))
        if isinstance(e, OSError):
            raise full(e, folder) from e
        raise
    log.info("snapshot taken", vm=vm.name, paused_s=round(paused_s, 4), seconds=round(time.monotonic() - began, 3))
    return replace(taken, snapshot=snapshot, paused_s=paused_s)


def _kept(snapshot: Snapshot, files: VmDirectory) -> Snapshot:
    """What the next one is compared with, whatever becomes of this one."""
    if len(snapshot.manifest.layers) > MAX_LAYERS:
        snapshot = compact(snapshot)
    sync(snapshot.path)
    shutil.rmtree(files.last, ignore_errors=True)
    snapshot.link(files.last)
    return snapshot


def refuse_unfit(vm: RunningVm) -> None:
    """:raises Conflict: no snapshot can be taken of this VM"""
    if vm.plan.clone is None:
        raise Conflict(f"VM {vm.name} was started cold; only what was started from a template can be saved")
    if vm.plan.block == "vmx":
        raise Conflict(f"the disks of VM {vm.name} are served by vmx; such a VM cannot be saved yet")


async def _thread(work: Callable[[], tuple[Difference, Snapshot]]) -> tuple[Difference, Snapshot]:
    """Cancelled, it waits for the thread's end: nothing writes into a folder that is being removed."""
    task = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


async def _undo(vm: RunningVm, folder: Path) -> None:
    await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
    with contextlib.suppress(HvError):  # it has ended, which its watch tells
        await wake(vm)


async def wake(vm: RunningVm) -> bool:
    """Gives a guest that stands still its vsock device back and lets it go on; whether it had to.

    Raises as `RunningVm.execute`.
    """
    held = await vm.status() in _HELD
    missing = vm.plan.vmx.guest_cid is not None and "vsock0" not in await devices(vm)
    if missing:
        await vm.plug_vsock()
    if held:
        await vm.resume()
    return held or missing


async def _save_state(vm: RunningVm, folder: Path) -> None:
    fd = os.open(Snapshot.state_of(folder), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        await launch.save_state(vm, fd, _SAVE_TIMEOUT_S)
    finally:
        os.close(fd)


# ---- in a thread -----------------------------------------------------------------------------------------------------


def _write(vm: RunningVm, folder: Path, name: str, copy_disk: DiskCopy) -> tuple[Difference, Snapshot]:
    files = vm.plan.files
    Template.link(files.template, Snapshot.template_of(folder))
    template = Template.linked(files.template)
    with ExitStack() as stack:
        known_path = files.last if Snapshot.exists(files.last) else files.snapshot
        base, layers = open_base(files.template, known_path, template, stack)
        ram = _ram_of(vm, stack)
        difference, layer = _write_layer(ram, base, folder)
    keep = working_set.encode(difference.touched, template=template.manifest.ram_sha256, ram_pages=_pages(template))
    Snapshot.working_set_of(folder).write_bytes(keep)
    for known in layers:
        link_or_copy(known_path / known.file, folder / known.file)
    copy_disk(files.disk, Snapshot.disk_of(folder))
    return difference, _write_manifest(vm, folder, name, template, (*layers, layer), difference.pieces)


def open_base(
    template_path: Path, snapshot_path: Path, template: Template, stack: ExitStack
) -> tuple[Base, tuple[Layer, ...]]:
    """What a VM was started from, its descriptors closed by `stack`, and its layers.

    :raises SnapshotDamaged: the snapshot that it was started from cannot be read
    """
    paths = [Template.ram_of(template_path)]
    layers: tuple[Layer, ...] = ()
    if Snapshot.exists(snapshot_path):
        snapshot = Snapshot.read(snapshot_path)
        layers, pieces = snapshot.manifest.layers, list(snapshot.pieces)
        paths += snapshot.layers
    else:
        pieces = pieces_of(template)
    fds = []
    for path in paths:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, fd)
        fds.append(fd)
    return Base(pieces, fds), layers


def pieces_of(template: Template) -> list[Piece]:
    """RAM as a clone of `template` has it."""
    return [
        Piece(first, count, TEMPLATE, first) if has_data else Piece(first, count, ZERO, 0)
        for first, count, has_data in template_pieces(template.manifest.extents, _pages(template))
    ]


def _pages(template: Template) -> int:
    return template.manifest.ram_bytes // PAGE


def _ram_of(vm: RunningVm, stack: ExitStack) -> int:
    qemu = ProcessId.of(vm.pids["qemu"])
    fd = borrow(qemu, ram_descriptor(qemu.pid))
    stack.callback(os.close, fd)
    assert vm.plan.clone is not None
    if os.fstat(fd).st_size != vm.plan.clone.ram_bytes:
        raise InvalidInput(f"VM {vm.name}: its RAM has {os.fstat(fd).st_size} bytes")
    return fd


def _write_layer(ram: int, base: Base, folder: Path) -> tuple[Difference, Layer]:
    path = folder / "layer.new"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        writer = LayerWriter(fd)
        difference = write_difference(ram, base, writer)
        layer = Layer(id=writer.finish(), pages=writer.pages)
    finally:
        os.close(fd)
    path.rename(folder / layer.file)
    return difference, layer


def _write_manifest(
    vm: RunningVm, folder: Path, name: str, template: Template, layers: tuple[Layer, ...], pieces: list[Piece]
) -> Snapshot:
    ram_bytes, state = template.manifest.ram_bytes, Snapshot.state_of(folder)
    data = index.encode(pieces, ram_pages=ram_bytes // PAGE, layers=len(layers))
    (folder / "index").write_bytes(data)
    manifest = Manifest(
        format=FORMAT, name=name, created=time.time(), key=template.manifest.key,
        template_sha256=template.manifest.ram_sha256, ram_bytes=ram_bytes, disks=vm.plan.disks, layers=layers,
        index_sha256=hashlib.sha256(data).hexdigest(), state_bytes=state.stat().st_size,
        state_sha256=digest_of(state), disk_bytes=Snapshot.disk_of(folder).stat().st_size,
    )  # fmt: skip
    write_atomically(folder / "manifest.json", records.dumps(manifest.sealed()))
    return Snapshot(folder, manifest.sealed(), tuple(pieces))


def sync(folder: Path) -> None:
    """Has a snapshot on stable storage. Blocks."""
    for path in (*folder.iterdir(), folder):
        _sync(path)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
