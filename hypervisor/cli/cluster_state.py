"""The files of a local cluster, and the processes that they name.

Theory of operation
-------------------
``cluster.json`` says what the cluster is to be; ``run/<name>.pid`` names the process of a component (the master, or a
host), and is written by that process itself before it becomes what it is to be: a component that runs is always on
record, whenever whoever started it is killed. A record names a process by pid, start time and boot, so that it can
never mean another one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hypervisor.cli.cluster_networks import Networks
from hypervisor.errors import Conflict, InvalidInput, NotFound, Unavailable
from hypervisor.vmx.process import ProcessId

MASTER = "master"
FIRST_ADDRESS = 2  # hosts listen on 127.0.0.2, 127.0.0.3, ...
KUBELET_PORT = 10250
NODE_GRACE_S = 40.0
# The shell writes its record with built-ins alone and then becomes the component: same pid, same start time.
_RECORD_AND_RUN = (
    'read -r stat < "/proc/$$/stat"; read -r boot < /proc/sys/kernel/random/boot_id; '
    'printf "%s\\n%s\\n" "$boot" "$stat" > "$1.new" && mv "$1.new" "$1" && shift && exec "$@"'
)


@dataclass(frozen=True, slots=True)
class HostSpec:
    """A host of the cluster, which is a node of that name."""

    name: str
    address: str
    port: int = KUBELET_PORT


@dataclass(frozen=True, slots=True)
class ClusterSpec:
    """What a cluster is to be.

    :ivar port: of the API server, on 127.0.0.1
    :ivar store: as ``hv master --store`` takes it
    :ivar node_grace_s: without a sign of life for so long a host is taken for lost
    :ivar warm: VMs that each host keeps ready
    """

    port: int
    store: str
    hosts: tuple[HostSpec, ...]
    node_grace_s: float = NODE_GRACE_S
    networks: Networks = field(default_factory=Networks)
    warm: int = 0

    @property
    def server(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def render(self) -> dict[str, Any]:
        """As ``cluster.json`` has it."""
        hosts = [{"name": h.name, "address": h.address, "port": h.port} for h in self.hosts]
        return {
            "version": 1,
            "server": self.server,
            "port": self.port,
            "store": self.store,
            "nodeGraceSeconds": self.node_grace_s,
            "networks": asdict(self.networks),
            "warm": self.warm,
            "hosts": hosts,
        }


def hosts_of(count: int) -> tuple[HostSpec, ...]:
    """The hosts ``host-1`` to ``host-<count>``."""
    return tuple(HostSpec(f"host-{n}", a) for n, a in zip(range(1, count + 1), loopback_addresses(), strict=False))


def loopback_addresses() -> Iterator[str]:
    """Addresses for hosts, in the order in which they are taken."""
    for n in range(FIRST_ADDRESS, 1 << 16):
        if 0 < n & 255 < 255:
            yield f"127.0.{n >> 8}.{n & 255}"


@dataclass(frozen=True, slots=True)
class ClusterPaths:
    """``<state>/cluster/``."""

    state: Path

    @property
    def root(self) -> Path:
        return self.state / "cluster"

    @property
    def spec(self) -> Path:
        return self.root / "cluster.json"

    @property
    def kubeconfig(self) -> Path:
        return self.root / "admin.kubeconfig"

    @property
    def master(self) -> Path:
        return self.root / "master"

    @property
    def hosts(self) -> Path:
        return self.root / "hosts"

    def host(self, name: str) -> Path:
        """The state folder of a host."""
        return self.hosts / name

    def node_kubeconfig(self, name: str) -> Path:
        """A host's credentials."""
        return self.host(name) / "kubeconfig"

    def log(self, component: str) -> Path:
        """Where a component writes."""
        return self.master / "master.log" if component == MASTER else self.host(component) / "hostd.log"

    def record(self, component: str) -> Path:
        """Names its process."""
        return self.root / "run" / f"{component}.pid"

    def load(self) -> ClusterSpec | None:
        """What the cluster is to be; None when there is none.

        :raises InvalidInput: ``cluster.json`` is damaged
        """
        try:
            data = json.loads(self.spec.read_text())
            hosts = tuple(HostSpec(str(h["name"]), str(h["address"]), int(h["port"])) for h in data["hosts"])
            grace = float(data.get("nodeGraceSeconds", NODE_GRACE_S))
            networks = Networks(**data.get("networks", {}))
            return ClusterSpec(int(data["port"]), str(data["store"]), hosts, grace, networks, int(data.get("warm", 0)))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            where = str(self.spec)
            raise InvalidInput(f"is damaged ({error}); remove it, then run: hv cluster up", where=where) from error

    def save(self, spec: ClusterSpec) -> None:
        """Replaces ``cluster.json``."""
        from hypervisor.kube.kubeconfig import write_private

        write_private(self.spec, json.dumps(spec.render(), indent=2).encode() + b"\n")

    def process(self, component: str) -> ProcessId | None:
        """The component's process if it runs."""
        try:
            boot, stat = self.record(component).read_text().splitlines()[:2]
            name_ends = stat.rindex(")")
            found = ProcessId(int(stat.split(" ", 1)[0]), int(stat[name_ends + 1 :].split()[22 - 3]))
        except (OSError, ValueError, IndexError):
            return None
        return found if boot == boot_id() and found.alive() else None

    def start(
        self, component: str, arguments: Sequence[str], environment: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        """Starts ``hv`` with these arguments in a session of its own, its output in the component's log.

        :raises Unavailable: it cannot be started
        """
        record, log = self.record(component), self.log(component)
        command = [sys.executable, "-m", "hypervisor.cli.main", *arguments]
        try:
            record.parent.mkdir(mode=0o700, exist_ok=True)
            with log.open("ab") as output:
                return subprocess.Popen(
                    ["/bin/sh", "-c", _RECORD_AND_RUN, "hv", str(record), *command],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                    cwd="/",
                    env={**environment, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
                )
        except OSError as error:
            raise Unavailable(f"cannot start {component}: {error.strerror}") from error

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """While it is open no other command changes the cluster.

        :raises Conflict: another one does so
        """
        self.root.mkdir(mode=0o755, parents=True, exist_ok=True)
        fd = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise Conflict(
                    "another hv cluster command is at work on this cluster; wait until it has ended"
                ) from error
            yield
        finally:
            os.close(fd)

    def must_load(self) -> ClusterSpec:
        """:raises NotFound: there is no cluster"""
        spec = self.load()
        if spec is None:
            raise NotFound(f"there is no cluster in {self.root}; make one: hv cluster up")
        return spec


def boot_id() -> str:
    """Names this boot of the machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
