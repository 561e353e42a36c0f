"""Changes of a disk's chain, wherever it is: in the process that has the disk open, or in its descriptor."""

from __future__ import annotations

from typing import Any

from hypervisor.errors import Unavailable
from hypervisor.iofilter.chain import open_disk
from hypervisor.iofilter.control import Holder, ask
from hypervisor.iofilter.descriptor import Descriptor
from hypervisor.iofilter.loop import DiskLoop
from hypervisor.iofilter.spec import FilterSpec
from hypervisor.iofilter.store import DiskStore


class Changes:
    """What can be changed of one disk. Each method blocks, and returns ``{"pause_s": ...}`` for one open elsewhere.

    A disk that is not open is opened for the change, so that a filter that would refuse it then refuses it now.
    """

    def __init__(self, store: DiskStore, name: str) -> None:
        self._store, self._name = store, name
        self.descriptor: Descriptor = store.load(name)

    def add_filter(self, spec: FilterSpec, at: int | None = None) -> dict[str, Any]:
        """Puts a filter in. `at`: its place, 0 nearest to the guest; None: behind those of its class."""
        return self._change({"op": "filter-add", "filter": spec.as_json(), "at": at})

    def remove_filter(self, name: str) -> dict[str, Any]:
        """Takes a filter out. Raises `InvalidInput` when the data would be wrong without it."""
        return self._change({"op": "filter-remove", "name": name})

    def set_filter(self, name: str, settings: tuple[tuple[str, str], ...]) -> dict[str, Any]:
        """Gives a filter other settings, all of them."""
        return self._change({"op": "filter-set", "name": name, "settings": dict(settings)})

    def resize(self, size: int) -> dict[str, Any]:
        """Changes the size, bytes."""
        return self._change({"op": "resize", "size": size})

    def _change(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            return dict(ask(self._store.folder(self._name), request))
        except Unavailable:
            self._change_here(request)
            return {}

    def _change_here(self, request: dict[str, Any]) -> None:
        with DiskLoop() as loop:
            opened = open_disk(loop, self._store, self._name)
            try:
                Holder(self._store, opened).do(request)
            finally:
                opened.close()
