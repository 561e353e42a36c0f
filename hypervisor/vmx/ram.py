"""Guest RAM of a clone: filled from its template as it is touched.

Theory of operation
-------------------
::

    made (address space mapped, this process's userfaultfd open) -> WAITING for QEMU's mapping
        -> SERVING: the library in QEMU has passed the userfaultfd and was told to go on
        -> FAILED: a page could not be served; the reason ends this vmx, and with it the VM

QEMU cannot touch its RAM before it was told to go on, and the vsock device tells of its own mapping before it touches
it (`map_hook`), so no page is ever made by anybody else. Ends with the process: descriptors are not closed before, for
that would wake whoever waits for a page, with zeroes.
"""

from __future__ import annotations

import array
import os
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from hypervisor.errors import HvError
from hypervisor.memory.database import PageFrameDatabase
from hypervisor.memory.faults import FaultServer
from hypervisor.memory.native import PAGE
from hypervisor.memory.space import AddressSpace
from hypervisor.vmx.config import RamConfig, RamFds

_MAPPING = struct.Struct("=QQQ")  # address, length, offset in RAM
_GO_ON, _REFUSED = b"\0", b"\1"


class LazyRam:
    """Takes the descriptors over. `failed` is called once, in another thread, with the reason.

    :raises HvError: the database, the mappings or the template make no sense; or no userfaultfd can be had
    """

    def __init__(self, config: RamConfig, fds: RamFds, *, failed: Callable[[str], None]) -> None:
        self._failed = failed
        self._library = socket.socket(fileno=fds.socket)
        self._database = PageFrameDatabase.open(fds.database, writer=False)
        self._space = AddressSpace(self._database)
        for page, pages, vad, vad_page in config.mappings:
            self._space.map(page * PAGE, pages, vad, page=vad_page)
        self._server = FaultServer(
            self._database, self._space, ram_bytes=config.ram_bytes, around_pages=config.around_pages
        )
        self._server.add_source(config.source, fds.template)
        self._server.open_own(fds.device)
        for fd in (fds.database, fds.template, fds.device):
            os.close(fd)

    @property
    def map_hook(self) -> tuple[int, int]:
        """For the vsock device; see `FaultServer.map_hook`."""
        return self._server.map_hook()

    def start(self) -> None:
        """Starts the threads: the server, one that waits for QEMU's mapping, one for the server's failure."""
        self._server.__enter__()
        for work in (self._take_mapping, self._watch):
            threading.Thread(target=work, name="ram", daemon=True).start()

    def _watch(self) -> None:
        self._server.failed.wait()
        self._failed(self._server.reason)

    def _take_mapping(self) -> None:
        try:
            with self._library:
                body, ancillary, _, _ = self._library.recvmsg(_MAPPING.size, socket.CMSG_SPACE(2 * 4))
                if not body:
                    return  # QEMU ended before it made its RAM: its own last words say why
                fds = array.array("i")
                for _, _, data in ancillary:
                    fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
                self._library.send(_GO_ON if self._accept(body, list(fds)) else _REFUSED)
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

    def working_set(self) -> dict[str, Any]:
        """Pages in the order of their first touch, for the control socket."""
        return {"pages": self._server.recorded()}

    def stats(self) -> dict[str, Any]:
        """Counters, and what the page table takes."""
        table = self._space.usage()
        return asdict(self._server.stats()) | {"table_bytes": table.node_bytes, "mapped_pages": table.mapped_pages}
