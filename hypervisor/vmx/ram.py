"""Guest RAM of a clone: filled from its template as it is touched.

Theory of operation
-------------------
::

    made (address space mapped, this process's userfaultfd open) -> WAITING for QEMU's mapping
        -> SERVING: the library in QEMU has passed the userfaultfd and was told to go on;
                    meanwhile a thread of its own prefetches the template's working set, in order, in small batches
    made as a successor, with the mapping that its dead predecessor had served -> SERVING, after it has woken whoever
        had touched a page that the predecessor had heard of and not filled
        -> FAILED: a page could not be served; the reason ends this vmx, and with it the VM

QEMU cannot touch its RAM before it was told to go on, and the vsock device tells of its own mapping before it touches
it (`map_hook`), so no page is ever made by anybody else. Ends with the process: descriptors are not closed before, for
that would wake whoever waits for a page, with zeroes.
"""

from __future__ import annotations

import array
import base64
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from hypervisor.errors import HvError, InvalidInput
from hypervisor.memory.database import PageFrameDatabase
from hypervisor.memory.faults import FaultServer
from hypervisor.memory.native import PAGE
from hypervisor.memory.space import AddressSpace
from hypervisor.vmx import working_set
from hypervisor.vmx.config import RamConfig, RamFds

_MAPPING = struct.Struct("=QQQ")  # address, length, offset in RAM
_GO_ON, _REFUSED = b"\0", b"\1"


class LazyRam:
    """Takes the descriptors over. `failed` is called once, in another thread, with the reason.

    :raises HvError: the database, the mappings or the template make no sense; or no userfaultfd can be had
    """

    def __init__(self, config: RamConfig, fds: RamFds, *, failed: Callable[[str], None]) -> None:
        self._failed = failed
        self._prefetch = _read_working_set(config, fds.working_set)
        self.prefetch_seconds: float | None = None
        self._inherited = config.inherited
        self._qemu = fds.qemu
        self._database = PageFrameDatabase.open(fds.database, writer=False)
        self._space = AddressSpace(self._database)
        for page, pages, vad, vad_page in config.mappings:
            self._space.map(page * PAGE, pages, vad, page=vad_page)
        self._server = FaultServer(
            self._database, self._space, ram_bytes=config.ram_bytes, around_pages=config.around_pages
        )
        self._server.add_source(config.source, fds.template)
        for number, layer in enumerate(fds.layers, 1):
            self._server.add_source(number, layer)
        self._server.open_own(fds.device)
        for fd in (fds.database, fds.template, fds.device, *fds.layers, fds.working_set):
            if fd is not None:
                os.close(fd)

    @property
    def map_hook(self) -> tuple[int, int]:
        """For the vsock device; see `FaultServer.map_hook`."""
        return self._server.map_hook()

    def trace(self, hook: int) -> None:
        """See `FaultServer.trace`."""
        self._server.trace(hook)

    def start(self) -> None:
        """Starts the threads: the server, one that waits for QEMU's mapping and prefetches, one for the server's end.

        :raises HvError: an inherited mapping makes no sense
        """
        if self._inherited is not None:
            self._server.add_range(self._qemu, *self._inherited)
        self._server.__enter__()
        if self._inherited is not None:
            self._server.wake_all()
        for work in (self._prefetch_all if self._inherited else self._take_mapping, self._watch):
            threading.Thread(target=work, name="ram", daemon=True).start()

    def _watch(self) -> None:
        self._server.failed.wait()
        self._failed(self._server.reason)

    def _take_mapping(self) -> None:
        try:
            with socket.socket(fileno=self._qemu) as library:
                body, ancillary, _, _ = library.recvmsg(_MAPPING.size, socket.CMSG_SPACE(2 * 4))
                if not body:
                    return  # QEMU ended before it made its RAM: its own last words say why
                fds = array.array("i")
                for _, _, data in ancillary:
                    fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
                accepted = self._accept(body, list(fds))
                library.send(_GO_ON if accepted else _REFUSED)
            if accepted:
                self._prefetch_all()
        except OSError as e:
            self._failed(f"QEMU's mapping was not handed over: {e.strerror}")

    def _accept(self, body: bytes, fds: list[int]) -> bool:
        if len(body) != _MAPPING.size or len(fds) != 2:
            self._failed("QEMU's library sent no mapping with two descriptors")
            return False
        memfd, uffd = fds
        os.close(memfd)
        try:
            self._server.add_range(uffd, *_MAPPING.unpack(body))
        except HvError as e:
            self._failed(str(e))
            return False
        return True

    def _prefetch_all(self) -> None:
        """Real faults are served by their own thread, and never wait behind more than one batch in the kernel."""
        began = time.monotonic()
        for batch in working_set.batches(self._prefetch):
            self._server.prefetch(batch)
        self.prefetch_seconds = time.monotonic() - began

    def working_set(self) -> dict[str, Any]:
        """Pages in the order of their first touch, for the control socket: base64 of 32-bit numbers, no more than one
        of its lines may hold. From now on none are recorded for that end, so faults need not come page by page.
        """
        self._server.set_around(RamConfig.around_pages)
        pages = array.array("I", self._server.recorded()[: working_set.MAX_PAGES])
        return {"pages": base64.b64encode(pages.tobytes()).decode()}

    def stats(self) -> dict[str, Any]:
        """Counters, and what the page table takes."""
        table = self._space.usage()
        return asdict(self._server.stats()) | {
            "table_bytes": table.node_bytes, "mapped_pages": table.mapped_pages,
            "working_set_pages": len(self._prefetch), "prefetch_seconds": self.prefetch_seconds,
        }  # fmt: skip


def _read_working_set(config: RamConfig, fd: int | None) -> array.array[int]:
    """What to prefetch; nothing when the file makes no sense: a start is then slower, and otherwise the same."""
    if fd is None:
        return array.array("I")
    try:
        data = os.pread(fd, working_set.MAX_BYTES + 1, 0)
        return working_set.decode(data, template=config.template, ram_pages=config.ram_bytes // PAGE)
    except (OSError, InvalidInput) as e:
        sys.stderr.write(f"nothing is prefetched: {e}\n")
        return array.array("I")
