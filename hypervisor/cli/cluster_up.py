"""Brings a local cluster up: what does not run is started, what runs is left alone.

Theory of operation
-------------------
::

    cluster.json -> keys and kubeconfigs -> master (started, /readyz) -> hosts (started) -> every Node is Ready

Each step finds what an earlier call, or one that was killed, has done, and does the rest.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hypervisor.cli import cluster_podnetwork
from hypervisor.cli.cluster_down import end
from hypervisor.cli.cluster_networks import Networks
from hypervisor.cli.cluster_state import (
    MASTER,
    NODE_GRACE_S,
    ClusterPaths,
    ClusterSpec,
    HostSpec,
    hosts_of,
    loopback_addresses,
)
from hypervisor.cli.kubeapi import KubeApi
from hypervisor.cli.starter import last_line
from hypervisor.errors import HvError, InvalidInput, Timeout, Unavailable
from hypervisor.kube import kubeconfig
from hypervisor.kube.meta import parse_time
from hypervisor.kube.resources import LEASES, NODES

USUAL_PORT = 6443
USUAL_HOSTS = 2
MOST_HOSTS = 100
LOOK_EVERY = 0.1
READY_TIMEOUT = 120.0  # seconds; a cold KVM probe on each host is part of it
SHARED = ("images", "templates")
"""Folders of the state folder that all hosts of a local cluster use."""
Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What ``hv cluster up`` was asked for; None: as it is, or the usual."""

    hosts: int | None = None
    store: str | None = None
    port: int | None = None
    node_grace_s: float | None = None
    services: str | None = None
    pods: str | None = None
    node_ports: str | None = None
    warm: int | None = None
    pod_network: bool | None = None


def bring_up(paths: ClusterPaths, wanted: Wanted, tell: Tell, timeout: float = READY_TIMEOUT) -> ClusterSpec:
    """Brings it up and waits until every host is a Node that is Ready.

    :raises InvalidInput: it is another cluster than the one that is asked for; nothing was changed
    :raises Unavailable: a component ended; the message carries its last words
    :raises Timeout: not all is ready in time
    """
    from hypervisor.controller.paths import state_directory

    state_directory(paths.host(f"host-{MOST_HOSTS}"))  # a name too long for sockets: refused before anything is made
    with paths.locked():
        spec = planned(paths, wanted)
        deadline = time.monotonic() + timeout
        _write_credentials(paths, spec)
        paths.save(spec)
        _Starter(paths, spec, tell, deadline).run()
    return spec


def planned(paths: ClusterPaths, wanted: Wanted) -> ClusterSpec:
    """What the cluster is to be.

    :raises InvalidInput: that would take away what the cluster has
    """
    old = paths.load()
    count = wanted.hosts or (len(old.hosts) if old else USUAL_HOSTS)
    if count > MOST_HOSTS:
        raise InvalidInput(f"a local cluster has at most {MOST_HOSTS} hosts", where="--hosts")
    if old is None:
        store = wanted.store or "sqlite"
        grace = wanted.node_grace_s or NODE_GRACE_S
        hosts = placed(hosts_of(count), set())
        networks = _networks(wanted, Networks())
        return ClusterSpec(wanted.port or _free_port(), store, hosts, grace, networks, wanted.warm or 0)
    if wanted.store not in (None, old.store):
        raise InvalidInput(f"the cluster keeps its objects in {old.store}; for another store make it anew: "
                           "hv cluster down --delete", where="--store")  # fmt: skip
    port = wanted.port or old.port
    if paths.process(MASTER) is None:
        port = port if _is_free("127.0.0.1", port) else _free_port()
    elif port != old.port:
        raise InvalidInput("the master runs on another port; run hv cluster down first", where="--port")
    elif wanted.node_grace_s not in (None, old.node_grace_s):
        raise InvalidInput("the master runs with another; run hv cluster down first", where="--node-grace-seconds")
    grace = wanted.node_grace_s or old.node_grace_s
    networks = _networks(wanted, old.networks)
    if networks != old.networks:
        raise InvalidInput(
            "the cluster has another network; make it anew: hv cluster down --delete", where="--service-cidr"
        )
    hosts = _grown(old.hosts, count, wanted.hosts is not None)
    running = {host.name for host in hosts if paths.process(host.name) is not None}
    warm = old.warm if wanted.warm is None else wanted.warm
    if warm != old.warm and running:
        raise InvalidInput(f"{min(running)} runs with {old.warm}; run hv cluster down first", where="--warm")
    return ClusterSpec(port, old.store, placed(hosts, running), grace, networks, warm)


def _networks(wanted: Wanted, usual: Networks) -> Networks:
    """:raises InvalidInput: a range that will not do"""
    from hypervisor.master.network.ranges import Ranges

    made = Networks(
        wanted.services or usual.services,
        wanted.pods or usual.pods,
        wanted.node_ports or usual.node_ports,
        usual.pod_network if wanted.pod_network is None else wanted.pod_network,
    )
    Ranges.parse(made.services, made.pods, made.node_ports)
    return made


def placed(hosts: Sequence[HostSpec], running: Collection[str]) -> tuple[HostSpec, ...]:
    """The hosts, those whose address another program (another cluster, say) has taken at the next free one.

    :param running: names of hosts that stay where they are
    """
    taken = {host.address for host in hosts}
    result = []
    for host in hosts:
        if host.name not in running and not _is_free(host.address, host.port):
            address = next(a for a in loopback_addresses() if a not in taken and _is_free(a, host.port))
            taken.add(address)
            host = replace(host, address=address)
        result.append(host)
    return tuple(result)


def _grown(old: tuple[HostSpec, ...], count: int, asked: bool) -> tuple[HostSpec, ...]:
    if asked and count < len(old):
        raise InvalidInput(
            f"the cluster has {len(old)} hosts; remove one with: hv host rm {old[-1].name}", where="--hosts"
        )
    names = {host.name for host in old}
    fresh = [host for host in hosts_of(count + len(old)) if host.name not in names]
    return (*old, *fresh[: max(0, count - len(old))])


def _is_free(address: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            return False
        return True


def listens(pid: int, address: str, port: int) -> bool:
    """Whether it is this process that takes connections at an IPv4 address."""
    number = int.from_bytes(socket.inet_aton(address), sys.byteorder)
    wanted = f"{number:08X}:{port:04X}"
    listening = "0A"
    lines = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    sockets = {f"socket:[{words[9]}]" for words in lines if (words[1], words[3]) == (wanted, listening)}
    try:
        return any(os.readlink(f"/proc/{pid}/fd/{fd}") in sockets for fd in os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH115, PTH208
    except OSError:  # it ends, or a file of it was closed just now, or it is another user's
        return True


def _free_port() -> int:
    if _is_free("127.0.0.1", USUAL_PORT):
        return USUAL_PORT
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _write_credentials(paths: ClusterPaths, spec: ClusterSpec) -> None:
    """Folders, keys and kubeconfigs; what is there and good stays."""
    from hypervisor.master.auth import parties
    from hypervisor.master.auth.ca import CertificateAuthority, Request
    from hypervisor.master.auth.user import NODES_GROUP

    paths.hosts.mkdir(mode=0o755, exist_ok=True)
    paths.master.mkdir(mode=0o700, exist_ok=True)
    ca = CertificateAuthority.open(paths.master / "pki")
    _write_kubeconfig(paths.kubeconfig, spec, ca.pem, "kubernetes-admin", parties.admin(ca).read_bytes())
    for host in spec.hosts:
        folder = paths.host(host.name)
        folder.mkdir(mode=0o755, exist_ok=True)
        for name in SHARED:
            _share(paths.state / name, folder / name)
        user = f"system:node:{host.name}"
        pair = ca.ensure(f"node-{host.name}", Request(user, (NODES_GROUP,), client=True))
        _write_kubeconfig(paths.node_kubeconfig(host.name), spec, ca.pem, user, pair.read_bytes())


def _write_kubeconfig(path: Path, spec: ClusterSpec, ca: bytes, user: str, pair: bytes) -> None:
    key_at = pair.index(b"-----BEGIN PRIVATE KEY-----")
    config = kubeconfig.render(server=spec.server, ca=ca, user=user, certificate=pair[:key_at], key=pair[key_at:])
    kubeconfig.write(path, config)


def _share(shared: Path, link: Path) -> None:
    shared.mkdir(mode=0o755 if shared.name == "images" else 0o700, exist_ok=True)
    if not link.is_symlink() and not link.exists():
        link.symlink_to(shared)


class _Starter:
    """Starts what does not run, and waits."""

    def __init__(self, paths: ClusterPaths, spec: ClusterSpec, tell: Tell, deadline: float) -> None:
        self._paths = paths
        self._spec = spec
        self._tell = tell
        self._deadline = deadline
        self._began = time.monotonic()
        self._logged: dict[str, int] = {}
        self._started: dict[str, float] = {}
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "HV_STATE_DIR")}
        self._environment: Mapping[str, str] = environment

    def run(self) -> None:
        self._ensure(MASTER, self._master_arguments())
        with KubeApi(self._paths.kubeconfig) as api:
            self._wait(api.ready, lambda: [MASTER], "the master")
            self._say("the master is ready")
            if self._spec.networks.pod_network:
                cluster_podnetwork.ensure(api, self._spec.networks.services)
            self._place_again()
            for host in self._spec.hosts:
                self._ensure(host.name, self._host_arguments(host))
            self._wait_nodes(api)

    def _say(self, what: str) -> None:
        self._tell(f"{what} ({time.monotonic() - self._began:.1f} s)")

    def _master_arguments(self) -> list[str]:
        spec = self._spec
        return [
            *("master", "--state-dir", str(self._paths.master), "--port", str(spec.port), "--store", spec.store),
            *("--node-grace-seconds", f"{spec.node_grace_s:g}"),
            *spec.networks.arguments(),
        ]

    def _host_arguments(self, host: HostSpec) -> list[str]:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(self._spec.hosts)
        return [
            *("--state-dir", str(self._paths.host(host.name)), "hostd"),
            *("--node-name", host.name, "--kubeconfig", str(self._paths.node_kubeconfig(host.name))),
            *("--node-address", host.address, "--node-port", str(host.port)),
            *("--node-memory", f"{memory >> 20}Mi", "--warm", str(self._spec.warm)),
            *self._spec.networks.host_arguments(),
        ]

    def _place_again(self) -> None:
        """While the master came up another program, such as another cluster, may have taken an address; or while a host
        was down, which then runs and can listen nowhere. Its pods run on while it moves.
        """
        for host in self._spec.hosts:
            process = self._paths.process(host.name)
            if process and not _is_free(host.address, host.port) and not listens(process.pid, host.address, host.port):
                self._tell(f"{host.name} is moved: another program has taken {host.address}:{host.port}")
                end(self._paths, host.name)
        running = {host.name for host in self._spec.hosts if self._paths.process(host.name) is not None}
        hosts = placed(self._spec.hosts, running)
        if hosts != self._spec.hosts:
            self._spec = replace(self._spec, hosts=hosts)
            self._paths.save(self._spec)

    def _ensure(self, component: str, arguments: list[str]) -> None:
        if self._paths.process(component) is not None:
            return
        if component != MASTER:
            _end_unmanaged(self._paths.host(component))
        log = self._paths.log(component)
        self._logged[component] = log.stat().st_size if log.exists() else 0
        self._tell(f"starting {component} (log: {log})")
        self._started[component] = time.time()
        self._children[component] = self._paths.start(component, arguments, self._environment)

    def _wait_nodes(self, api: KubeApi) -> None:
        left = {host.name for host in self._spec.hosts}

        def all_ready() -> bool:
            for name in sorted(left & _ready_nodes(api, self._started) & self._listening()):
                self._say(f"{name} is Ready")
                left.discard(name)
            return not left

        self._wait(all_ready, lambda: [MASTER, *sorted(left)], "nodes")

    def _wait(self, condition: Callable[[], bool], needed: Callable[[], list[str]], what: str) -> None:
        while not condition():
            for component in needed():
                self._check(component)
            if time.monotonic() > self._deadline:
                raise Timeout(f"{what}: not ready in time; see: hv cluster status, hv cluster logs")
            time.sleep(LOOK_EVERY)

    def _listening(self) -> set[str]:
        """Hosts whose kubelet's server takes connections: without it there is no exec and no logs."""
        return {host.name for host in self._spec.hosts if _answers(host.address, host.port)}

    def _check(self, component: str) -> None:
        """:raises Unavailable: it has ended"""
        child = self._children.get(component)
        if child is not None and child.poll() is not None:
            words = last_line(self._paths.log(component), self._logged[component])
            raise Unavailable(f"{component} ended at once: {words}; its log is {self._paths.log(component)}")


def _ready_nodes(api: KubeApi, started: Mapping[str, float]) -> set[str]:
    """Nodes that are Ready now. One that was just started is believed once it has renewed its lease: what an earlier
    process of it reported is still there.
    """
    try:
        ready = {node["metadata"]["name"] for node in api.list(NODES) if node_is_ready(node)}
        renewed = {lease["metadata"]["name"]: _renewed(lease) for lease in api.list(LEASES, "kube-node-lease")}
    except HvError:
        return set()  # the master is just coming up, or going: `_check` tells
    return {name for name in ready if renewed.get(name, 0.0) >= started.get(name, 0.0)}


def _renewed(lease: Mapping[str, Any]) -> float:
    text = (lease.get("spec") or {}).get("renewTime")
    return parse_time(text) if text else 0.0


def _answers(address: str, port: int) -> bool:
    try:
        with socket.create_connection((address, port), timeout=1.0):
            return True
    except OSError:
        return False


def node_is_ready(node: Mapping[str, Any]) -> bool:
    """Whether its condition says so."""
    conditions = (node.get("status") or {}).get("conditions") or ()
    return any(c.get("type") == "Ready" and c.get("status") == "True" for c in conditions)


def _end_unmanaged(state: Path) -> None:
    """A daemon that another command started on a host's folder gives way; its pods run on."""
    from hypervisor.cli.connect import connect_running
    from hypervisor.cli.host import stop_host

    connection = connect_running(str(state))
    if connection is not None:
        with connection:
            stop_host(connection, pods=False)
