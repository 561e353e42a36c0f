"""The disks of a VM: one vhost-user-blk device each (csrc/blk), all on one event loop in one thread.

A device may come without a disk: then it reads as zeroes, until one is put in. The capacity that the guest is told
does not depend on that where it is fixed (`BlockConfig.announce_bytes`), so a guest that was resumed from a template
need not look again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hypervisor.errors import HvError, InvalidInput, NotFound
from hypervisor.iofilter.loop import Disk, DiskLoop
from hypervisor.iofilter.native import error_of, ffi, lib, new_fail
from hypervisor.vmx.chains import Chain, Filters
from hypervisor.vmx.config import BlockConfig

_STATS = tuple(name for name, _ in ffi.typeof("struct pv_blk_stats").fields)


class BlockDevices:
    """Takes the descriptors over, also when it fails.

    :param fds: for each device a socket connected to QEMU, and its disk's descriptor or None
    :param bases: of each device whose disk is a clone, in their order, its base's descriptor
    :param folder: where filters have their files
    :param map_hook: function and context, as addresses, told of each mapping of guest memory
    :raises HvError: a device or a disk cannot be made
    """

    def __init__(
        self,
        configs: Sequence[BlockConfig],
        fds: Sequence[tuple[int, int | None]],
        bases: Sequence[int] = (),
        *,
        folder: Path = Path(),
        map_hook: tuple[int, int] | None = None,
    ) -> None:
        self._loop = DiskLoop()
        self._configs = tuple(configs)
        self._map_hook = map_hook
        self._folder = folder
        self._disks: dict[str, Disk] = {}
        self._bases: dict[str, Disk] = {}
        self._chains: dict[str, Chain] = {}
        self._devices: dict[str, Any] = {}
        try:
            self._make_all(fds, bases)
        except BaseException:
            self.close()
            raise

    def _make_all(self, fds: Sequence[tuple[int, int | None]], bases: Sequence[int]) -> None:
        fail = new_fail()
        if lib.pv_guest_prepare(self._loop.handle, fail):
            raise error_of(fail)
        cloned = [config for config in self._configs if config.base]
        for config, fd in zip(cloned, bases, strict=True):
            self._bases[config.serial] = base = self._loop.open_fd(config.base, fd, read_only=True)
            base.start()
        for config, (frontend, disk) in zip(self._configs, fds, strict=True):
            self._devices[config.serial] = device = self._make(config)
            if disk is not None:
                self.insert(config.serial, disk)
            if lib.pv_guest_connect(device, frontend, fail):
                raise error_of(fail)

    @staticmethod
    def trace(hook: int) -> None:
        """Where trace points of block devices go, of this process's all: `PerCpuTrace.hook`, or 0 for nowhere."""
        lib.pv_guest_trace(ffi.cast("void *", hook))

    def _make(self, config: BlockConfig) -> Any:
        fail = new_fail()
        wanted = ffi.new("struct pv_blk_config *")
        serial = config.serial.encode()
        if len(serial) > 20 or config.serial in self._devices:
            raise InvalidInput(f"serial {config.serial!r} is too long, or there is another of it", where="serial")
        wanted.serial = serial
        wanted.queues, wanted.read_only = config.queues, config.read_only
        wanted.announce_bytes = config.announce_bytes
        if self._map_hook is not None:
            function, context = self._map_hook
            wanted.map_hook = ffi.cast("int (*)(void *, int, void *, uint64_t, uint64_t)", function)
            wanted.map_context = ffi.cast("void *", context)
        device = lib.pv_guest_new(self._loop.handle, wanted, fail)
        if not device:
            raise error_of(fail)
        return device

    def insert(self, serial: str, fd: int) -> None:
        """Puts a disk into an empty device; takes `fd` over.

        :raises NotFound: there is no such device
        :raises Conflict: it has a disk
        """
        config = next((config for config in self._configs if config.serial == serial), None)
        disk = self._loop.open_fd(serial, fd, read_only=config is not None and config.read_only)
        try:
            if config is None:
                raise NotFound(f"there is no disk {serial}")
            chain = Chain(disk, config.filters, self._folder)
            self._start(serial, disk)
        except HvError:
            disk.close()
            raise
        self._disks[serial], self._chains[serial] = disk, chain

    def _start(self, serial: str, disk: Disk) -> None:
        fail = new_fail()
        disk.start()
        if lib.pv_guest_insert(self._devices[serial], disk.handle, fail):
            raise error_of(fail)

    def change(self, serial: str, filters: Filters) -> float:
        """Gives a disk that runs another chain: `Chain.change`. Raises `NotFound` when there is no such disk."""
        if serial not in self._chains:
            raise NotFound(f"there is no disk {serial}")
        return self._chains[serial].change(filters)

    def stats(self) -> Mapping[str, Mapping[str, Any]]:
        """Counters of each device by its serial, those of its disk among them, and of its ``filters`` and ``base``."""
        return {serial: self._stats_of(serial, device) for serial, device in self._devices.items()}

    def _stats_of(self, serial: str, device: Any) -> dict[str, Any]:
        out = ffi.new("struct pv_blk_stats *")
        lib.pv_blk_get_stats(device, out)
        known: dict[str, Any] = {name: int(getattr(out, name)) for name in _STATS}
        known["fault"] = ffi.string(lib.pv_blk_fault(device)).decode()
        if serial in self._disks:
            known |= self._disks[serial].figures()
            known["filters"] = self._chains[serial].figures()
        if serial in self._bases:
            known["base"] = self._bases[serial].figures()
        return known

    def close(self) -> None:
        """Waits for what is under way, then closes everything."""
        for device in self._devices.values():
            lib.pv_guest_free(device)
        for disk in (*self._disks.values(), *self._bases.values()):
            with contextlib.suppress(HvError):
                disk.close()
        for kept in (self._devices, self._chains, self._disks, self._bases):
            kept.clear()
        self._loop.close()
