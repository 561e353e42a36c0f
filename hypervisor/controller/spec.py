"""A pod as this host runs it: frozen values, every default filled in, every quantity a number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hypervisor.controller.poddisks import NO_CHAINS, PodDisks

RestartPolicy = Literal["Always", "OnFailure", "Never"]
PullPolicy = Literal["Always", "IfNotPresent", "Never"]
NetworkMode = Literal["user", "none"]


@dataclass(frozen=True, slots=True)
class KeyRef:
    """A config map or secret of the pod's namespace, and one of its keys (none: all of it)."""

    kind: Literal["configMap", "secret"]
    name: str
    key: str = ""
    optional: bool = False


@dataclass(frozen=True, slots=True)
class ResourceRef:
    """``limits.cpu`` and the like; `container` empty means its own; `divisor` in bytes, or thousandths of a CPU."""

    resource: str
    container: str = ""
    divisor: int = 1


@dataclass(frozen=True, slots=True)
class EnvVar:
    """One variable: a value (with ``$(VAR)`` not yet expanded), or where it comes from: a field of the pod, a key of
    another object, a resource.
    """

    name: str
    value: str = ""
    field: str | None = None
    key: KeyRef | None = None
    resource: ResourceRef | None = None


@dataclass(frozen=True, slots=True)
class EnvFrom:
    """All entries of an object as variables, `prefix` before their keys."""

    ref: KeyRef
    prefix: str = ""


@dataclass(frozen=True, slots=True)
class VolumeMount:
    """A volume of the pod at a path of a container; `sub_path_expr` has variables that are not yet expanded."""

    volume: str
    path: str
    read_only: bool = False
    sub_path: str = ""
    sub_path_expr: str = ""


@dataclass(frozen=True, slots=True)
class Volume:
    """An emptyDir: on the pod's disk or in guest memory; `size_bytes` None is without a limit of its own.

    :ivar source: what its files are made of (``configMap``, ``secret``, ``downwardAPI``, ``projected``, as in the
        manifest); None: it begins empty
    """

    name: str
    medium: Literal["disk", "memory"] = "disk"
    size_bytes: int | None = None
    source: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Resources:
    """Requests and limits of one container; None where the manifest says nothing."""

    memory_limit: int | None = None
    memory_request: int | None = None
    cpu_limit_millis: int | None = None
    cpu_request_millis: int | None = None
    disk_limit: int | None = None


@dataclass(frozen=True, slots=True)
class Security:
    """Who the container runs as and what it may do; None means that the image decides."""

    user: int | None = None
    group: int | None = None
    groups: tuple[int, ...] = ()
    non_root: bool = False
    read_only_root: bool = False
    privileged: bool = False
    no_new_privileges: bool = False
    confined_syscalls: bool = True
    add: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ExecAction:
    """A program to run in the container."""

    command: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class HttpAction:
    """A GET; `host` empty means the pod's own address."""

    port: int
    path: str = "/"
    host: str = ""
    https: bool = False
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class TcpAction:
    """A connection; `host` empty means the pod's own address."""

    port: int
    host: str = ""


@dataclass(frozen=True, slots=True)
class GrpcAction:
    """A health check of `service` (empty: the server as a whole) at a port of the pod's own address."""

    port: int
    service: str = ""


@dataclass(frozen=True, slots=True)
class SleepAction:
    """Nothing, for so long."""

    seconds: int


Action = ExecAction | HttpAction | TcpAction | GrpcAction | SleepAction


@dataclass(frozen=True, slots=True)
class Probe:
    """When to look at a container, how, and how often it must be the same before it counts. Times are seconds.

    :ivar grace_s: of the stop that follows its failure; None: the pod's
    """

    action: Action
    initial_delay_s: int = 0
    timeout_s: int = 1
    period_s: int = 10
    success_threshold: int = 1
    failure_threshold: int = 3
    grace_s: int | None = None


@dataclass(frozen=True, slots=True)
class Care:
    """How a container is looked after while it runs: probes, hooks, and where it leaves word of its end.

    :ivar message_from_logs: of one that failed and left no message the end of its log is taken
    """

    liveness: Probe | None = None
    readiness: Probe | None = None
    startup: Probe | None = None
    post_start: Action | None = None
    pre_stop: Action | None = None
    message_path: str = "/dev/termination-log"
    message_from_logs: bool = False


@dataclass(frozen=True, slots=True)
class ContainerSpec:
    """One container; `command` and `args` None mean the image's own. `pull` None: the manifest says nothing.

    :ivar sidecar: an init container that runs beside the main containers (``restartPolicy: Always``)
    """

    name: str
    image: str
    pull: PullPolicy | None = None
    command: tuple[str, ...] | None = None
    args: tuple[str, ...] | None = None
    working_dir: str | None = None
    env: tuple[EnvVar, ...] = ()
    env_from: tuple[EnvFrom, ...] = ()
    mounts: tuple[VolumeMount, ...] = ()
    resources: Resources = Resources()
    security: Security = Security()
    tty: bool = False
    stdin: bool = False
    stdin_once: bool = False
    care: Care = Care()
    sidecar: bool = False


@dataclass(frozen=True, slots=True)
class HostPort:
    """A port of the host that leads to one of the pod's; `address` empty: at all addresses of the host."""

    number: int
    protocol: str
    container_port: int
    address: str = ""


GUEST_ADDRESS = "10.0.2.15"
"""Every pod's address on QEMU's user-mode network; nothing else can reach it."""


@dataclass(frozen=True, slots=True)
class Network:
    """The pod's network; `dns` empty means the network's own name server.

    :ivar policy: the pod's dnsPolicy, which on the pod network says what `dns` and `search` are put together of
    :ivar options: of the resolver, as ``resolv.conf`` has them
    :ivar incoming, outgoing: at most so many bytes a second to and from the pod; 0: no limit
    :ivar routed: its addresses on the pod network, where its host has one; empty: QEMU's user-mode network
    """

    mode: NetworkMode = "user"
    dns: tuple[str, ...] = ()
    search: tuple[str, ...] = ()
    routed: tuple[str, ...] = ()
    policy: str = "ClusterFirst"
    options: tuple[str, ...] = ()
    host_ports: tuple[HostPort, ...] = ()
    incoming: int = 0
    outgoing: int = 0

    @property
    def addresses(self) -> tuple[str, ...]:
        """The pod's own, the first one foremost; empty where it has no network."""
        if self.mode == "none":
            return ()
        return self.routed or (GUEST_ADDRESS,)


@dataclass(frozen=True, slots=True)
class PodSpec:
    """One pod; `hostname` is what the kernel is told, `fqdn` its name in the cluster's domain if it has a subdomain.
    Containers keep the manifest's order; `grace_s` and `deadline_s` are seconds; a `cold` one's VM boots
    instead of being cloned from a template; volumes belong to `fs_group`, which every container is in.
    """

    namespace: str
    name: str
    containers: tuple[ContainerSpec, ...]
    init_containers: tuple[ContainerSpec, ...] = ()
    labels: tuple[tuple[str, str], ...] = ()
    annotations: tuple[tuple[str, str], ...] = ()
    volumes: tuple[Volume, ...] = ()
    restart_policy: RestartPolicy = "Always"
    grace_s: int = 30
    deadline_s: int | None = None
    hostname: str = ""
    fqdn: str = ""
    share_process_namespace: bool = False
    host_aliases: tuple[tuple[str, str], ...] = ()
    network: Network = Network()
    disk_bytes: int | None = None
    disks: PodDisks = NO_CHAINS
    cold: bool = False
    node_name: str = ""
    service_account: str = ""
    pull_secrets: tuple[str, ...] = ()
    fs_group: int | None = None
    service_links: bool = True
    host_address: str = "127.0.0.1"

    @property
    def key(self) -> tuple[str, str]:
        """What names a pod on its host."""
        return self.namespace, self.name

    @property
    def sidecars(self) -> tuple[ContainerSpec, ...]:
        """The init containers that run for as long as the main ones."""
        return tuple(c for c in self.init_containers if c.sidecar)

    def container(self, name: str) -> ContainerSpec:
        """The container or init container of that name, which must be one of the pod's."""
        return next(c for c in (*self.init_containers, *self.containers) if c.name == name)
