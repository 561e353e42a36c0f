"""A pod as this host runs it: frozen values, every default filled in, every quantity a number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

RestartPolicy = Literal["Always", "OnFailure", "Never"]
PullPolicy = Literal["Always", "IfNotPresent", "Never"]
NetworkMode = Literal["user", "none"]


@dataclass(frozen=True, slots=True)
class EnvVar:
    """One variable: a value (with ``$(VAR)`` not yet expanded), or the path of a field of the pod."""

    name: str
    value: str = ""
    field: str | None = None


@dataclass(frozen=True, slots=True)
class VolumeMount:
    """A volume of the pod at a path of a container."""

    volume: str
    path: str
    read_only: bool = False
    sub_path: str = ""


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
class ContainerSpec:
    """One container; `command` and `args` None mean the image's own. `pull` None: the manifest says nothing."""

    name: str
    image: str
    pull: PullPolicy | None = None
    command: tuple[str, ...] | None = None
    args: tuple[str, ...] | None = None
    working_dir: str | None = None
    env: tuple[EnvVar, ...] = ()
    mounts: tuple[VolumeMount, ...] = ()
    resources: Resources = Resources()
    security: Security = Security()
    tty: bool = False
    stdin: bool = False
    stdin_once: bool = False


@dataclass(frozen=True, slots=True)
class Network:
    """The pod's network; `dns` empty means the network's own name server."""

    mode: NetworkMode = "user"
    dns: tuple[str, ...] = ()
    search: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PodSpec:
    """One pod. Containers keep the manifest's order; `grace_s` and `deadline_s` are seconds; a `cold` one's VM boots
    instead of being cloned from a template.
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
    share_process_namespace: bool = False
    host_aliases: tuple[tuple[str, str], ...] = ()
    network: Network = Network()
    disk_bytes: int | None = None
    cold: bool = False
    node_name: str = ""
    service_account: str = ""

    @property
    def key(self) -> tuple[str, str]:
        """What names a pod on its host."""
        return self.namespace, self.name

    def container(self, name: str) -> ContainerSpec:
        """The container or init container of that name, which must be one of the pod's."""
        return next(c for c in (*self.init_containers, *self.containers) if c.name == name)
