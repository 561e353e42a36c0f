"""The pod's volumes: empty directories on the data disk or in memory, with a size, for a group, while the pod lives."""

from __future__ import annotations

import os
from typing import NamedTuple

from . import syscalls
from .errors import conflict, from_os, invalid
from .quota import Quotas
from .storage import DATA, MEMORY_VOLUMES, disk_usage

ANYBODY = 0o777
_SET_GROUP = 0o2000


class VolumeSpec(NamedTuple):
    """What a volume is to be.

    :ivar medium: ``disk`` or ``memory``
    :ivar size_bytes: of a disk volume it holds where there are quotas; a memory volume without gets half of the RAM
    :ivar group: whom its files belong to; None: root's
    """

    name: str
    medium: str
    size_bytes: int | None = None
    group: int | None = None


class Volume(NamedTuple):
    """One that is there. `project` 0: the kernel does not count it."""

    spec: VolumeSpec
    path: str
    project: int


class Volumes:
    """Those of the pod."""

    def __init__(self) -> None:
        self.quotas = Quotas(DATA)
        self._volumes: dict[str, Volume] = {}

    def add(self, spec: VolumeSpec) -> None:
        """Makes an empty volume that anybody may write to.

        :raises AgentError: Conflict; there is one of that name
        """
        if spec.name in self._volumes:
            raise conflict(f"volume {spec.name}: exists already")
        try:
            self._volumes[spec.name] = self._make(spec)
        except OSError as e:
            raise from_os(f"volume {spec.name}", e) from e

    def _make(self, spec: VolumeSpec) -> Volume:
        project = 0
        path = f"{DATA}/volumes/{spec.name}" if spec.medium == "disk" else f"{MEMORY_VOLUMES}/{spec.name}"
        os.makedirs(path, exist_ok=True)
        if spec.medium == "disk":
            project = self.quotas.assign(path, spec.size_bytes)
        elif not os.path.ismount(path):
            size = f"size={spec.size_bytes}" if spec.size_bytes else "size=50%"
            syscalls.mount("volume", path, "tmpfs", syscalls.MS_NOSUID | syscalls.MS_NODEV, f"mode=0777,{size}")
        if spec.group is not None:
            os.chown(path, -1, spec.group)
        os.chmod(path, ANYBODY if spec.group is None else ANYBODY | _SET_GROUP)
        return Volume(spec, path, project)

    def forget(self) -> None:
        """Setup has failed and may be repeated."""
        self._volumes.clear()

    def get(self, name: str) -> Volume:
        """The volume of that name.

        :raises AgentError: Invalid; the pod has no such volume
        """
        if name not in self._volumes:
            have = ", ".join(sorted(self._volumes)) or "none"
            raise invalid(f"container.mounts: the pod has no volume {name!r} (it has: {have})")
        return self._volumes[name]

    def path(self, name: str) -> str:
        """The volume's directory; raises as `get`."""
        return self.get(name).path

    def usage(self) -> dict[str, dict[str, int]]:
        """By name: bytes used and bytes that it can hold. Blocks: run it in a thread."""
        return {name: self._usage(volume) for name, volume in list(self._volumes.items())}

    def _usage(self, volume: Volume) -> dict[str, int]:
        space = os.statvfs(volume.path)
        whole, free = space.f_blocks * space.f_frsize, space.f_bavail * space.f_frsize
        if volume.spec.medium == "memory":
            return {"used_bytes": whole - free, "capacity_bytes": whole}
        used = self.quotas.used(volume.project) if volume.project else disk_usage(volume.path)
        return {"used_bytes": used, "capacity_bytes": min(whole, volume.spec.size_bytes or whole)}
