"""Where a host keeps its state; the one place that knows the names of the files in it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from hypervisor.errors import InvalidInput

STATE_DIR_VARIABLE = "HV_STATE_DIR"

# The longest path below the state directory that must fit sockaddr_un (108 bytes with the final NUL): a VM's vsock
# socket with the suffix of a guest-initiated connection.
_LONGEST_SOCKET = "/pods/12345678/vm/vsock.sock_4294967295"
_SUN_PATH_MAX = 107
MAX_STATE_DIR = _SUN_PATH_MAX - len(_LONGEST_SOCKET)


@dataclass(frozen=True, slots=True)
class PodPaths:
    """The folder of one pod: ``pods/<first 8 hex digits of its uid>/``."""

    directory: Path

    @property
    def pod(self) -> Path:
        """What was asked for, never changed: its existence is what makes a pod exist."""
        return self.directory / "pod.json"

    @property
    def status(self) -> Path:
        """What became of it so far; rewritten on every change."""
        return self.directory / "status.json"

    @property
    def logs(self) -> Path:
        """Archived logs, once the VM is off."""
        return self.directory / "logs"

    @property
    def console(self) -> Path:
        """The guest console's last part, once the VM is off."""
        return self.directory / "console.log"

    @property
    def suspended(self) -> Path:
        """A suspended pod's VM, as a snapshot."""
        return self.directory / "suspended"

    @property
    def snapshots(self) -> Path:
        """Its snapshots, by name."""
        return self.directory / "snapshots"

    @property
    def fork(self) -> Path:
        """The snapshot that a fork's children are being made from."""
        return self.directory / "fork.new"

    @property
    def vm(self) -> Path:
        """The VM's own state folder; the VM manager makes and removes it."""
        return self.directory / "vm"


@dataclass(frozen=True, slots=True)
class HostPaths:
    """The state directory of one host."""

    root: Path

    @property
    def lock(self) -> Path:
        return self.root / "host.lock"

    @property
    def host(self) -> Path:
        return self.root / "host.json"

    @property
    def token(self) -> Path:
        return self.root / "token"

    @property
    def log(self) -> Path:
        return self.root / "hostd.log"

    @property
    def network(self) -> Path:
        """Which pod has which addresses."""
        return self.root / "network.json"

    @property
    def manifests(self) -> Path:
        return self.root / "manifests"

    @property
    def images(self) -> Path:
        """A link leads to the store that several hosts of one machine share."""
        return _followed(self.root / "images")

    @property
    def pods(self) -> Path:
        return self.root / "pods"

    @property
    def templates(self) -> Path:
        """A link leads to the folder that several hosts of one machine share."""
        return _followed(self.root / "templates")

    @property
    def bases(self) -> Path:
        """Formatted, empty disks that pods' scratch disks are clones of."""
        return self.root / "bases"

    @property
    def disks(self) -> Path:
        """Virtual disks of the host's own (``hv disk``)."""
        return self.root / "disks"

    @property
    def warm(self) -> Path:
        """VMs of the warm pool, also after a pod has taken one: its own folder then has a link to it."""
        return self.root / "warm"

    def pod(self, uid: str) -> PodPaths:
        """The folder of the pod with this uid."""
        return PodPaths(self.pods / uid.replace("-", "")[:8])


def _followed(path: Path) -> Path:
    return path.resolve() if path.is_symlink() else path


def state_directory(given: str | os.PathLike[str] | None = None) -> HostPaths:
    """The host's state directory: `given`, else ``HV_STATE_DIR``, else the usual place of the user. Makes nothing.

    :raises InvalidInput: its path is so long that the sockets below it would not fit ``sockaddr_un``
    """
    root = Path(given or os.environ.get(STATE_DIR_VARIABLE) or _usual_place()).expanduser().absolute()
    if len(os.fsencode(root)) > MAX_STATE_DIR:
        raise InvalidInput(
            f"the state directory's path has {len(os.fsencode(root))} bytes; sockets below it need one of at most "
            f"{MAX_STATE_DIR}: choose a shorter one with --state-dir or {STATE_DIR_VARIABLE}",
            where=str(root),
        )
    return HostPaths(root)


def _usual_place() -> Path:
    if os.geteuid() == 0:
        return Path("/var/lib/podvisor")
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base and os.path.isabs(base) else Path.home() / ".local" / "state") / "podvisor"  # noqa: PTH117
