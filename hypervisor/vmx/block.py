"""The disks of a VM: one vhost-user-blk device each (csrc/blk), all on one event loop in one thread.

A device may come without a disk: then it reads as zeroes, until one is put in. The capacity that the guest is told
does not depend on that where it is fixed (`BlockConfig.announce_bytes`), so a guest that was resumed from a template
need not look again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypervisor.errors import HvError, InvalidInput, NotFound
from hypervisor.iofilter.loop import DiskLoop
from hypervisor.iofilter.native import error_of, ffi, lib, new_fail
from hypervisor.vmx.config import BlockConfig

_STATS = tuple(name for name, _ in ffi.typeof("struct pv_blk_stats").fields)


class BlockDevices:
    """Takes the descriptors over, also when it fails.

    :param fds: for each device a socket connected to QEMU, and its disk's descriptor or None
    :param map_hook: function and context, as addresses, told of each mapping of guest memory
    :raises HvError: a device or a disk cannot be made
    """

    def __init__(
        self,
        configs: Sequence[BlockConfig],
        fds: Sequence[tuple[int, int | None]],
        *,
        map_hook: tuple[int, int] | None = None,
    ) -> None:
        self._loop = DiskLoop()
        self._configs = tuple(configs)
        self._map_hook = map_hook
        self._disks: dict[str, Any] = {}
        self._devices: dict[str, Any] = {}
        try:
            self._make_all(fds)
        except BaseException:
            self.close()
            raise

    def _make_all(self, fds: Sequence[tuple[int, int | None]]) -> None:
        fail = new_fail()
        if lib.pv_guest_prepare(self._loop.handle, fail):
            raise error_of(fail)
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
        fail = new_fail()
        read_only = any(config.read_only for config in self._configs if config.serial == serial)
        disk = lib.pv_disk_open_file(self._loop.handle, serial.encode(), fd, read_only, False, fail)
        if not disk:
            raise error_of(fail)
        try:
            self._start(serial, disk, fail)
        except HvError:
            lib.pv_disk_close(disk, new_fail())
            raise
        self._disks[serial] = disk

    def _start(self, serial: str, disk: Any, fail: Any) -> None:
        if serial not in self._devices:
            raise NotFound(f"there is no disk {serial}")
        if lib.pv_disk_start(disk, fail) or lib.pv_guest_insert(self._devices[serial], disk, fail):
            raise error_of(fail)

    def stats(self) -> dict[str, dict[str, int | str]]:
        """Counters of each device by its serial, those of its disk among them."""
        return {serial: self._stats_of(serial, device) for serial, device in self._devices.items()}

    def _stats_of(self, serial: str, device: Any) -> dict[str, int | str]:
        out = ffi.new("struct pv_blk_stats *")
        lib.pv_blk_get_stats(device, out)
        known: dict[str, int | str] = {name: int(getattr(out, name)) for name in _STATS}
        known["fault"] = ffi.string(lib.pv_blk_fault(device)).decode()
        if serial in self._disks:
            known |= figures(self._disks[serial])
        return known

    def close(self) -> None:
        """Waits for what is under way, then closes everything."""
        for device in self._devices.values():
            lib.pv_guest_free(device)
        for disk in self._disks.values():
            lib.pv_disk_close(disk, new_fail())
        self._devices.clear()
        self._disks.clear()
        self._loop.close()


def figures(disk: Any) -> dict[str, int]:
    """What a disk's instance counts; see csrc/iofilter/disks.h."""
    out = ffi.new("struct pv_disk_figure[]", 32)
    count = lib.pv_disk_figures(disk, ffi.NULL, out, 32, new_fail())
    return {ffi.string(out[i].name).decode(): int(out[i].value) for i in range(max(count, 0))}
