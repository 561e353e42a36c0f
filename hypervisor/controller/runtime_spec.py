"""A container of a pod and its image, as the arguments of the agent's ``container.start`` and ``setup``."""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Mapping
from typing import Any

from hypervisor.controller.environment import NOTHING, External, expand, resource_value
from hypervisor.controller.fieldrefs import pod_field
from hypervisor.controller.sizing import has_disk_limits
from hypervisor.controller.spec import GUEST_ADDRESS, ContainerSpec, Network, PodSpec, VolumeMount
from hypervisor.errors import InvalidInput
from hypervisor.images.model import Image, ImageConfig
from hypervisor.net.addresses import GATEWAY4, GATEWAY6, HOST_MAC

DATA_DISK = "hv-data"
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# What QEMU's user-mode network is always made of.
USER_NETWORK = {"ifname": "eth0", "address": f"{GUEST_ADDRESS}/24", "gateway": "10.0.2.2"}
USER_DNS = "10.0.2.3"
ENTROPY_BYTES = 64
MAX_ENVIRONMENT = 2 * 1024 * 1024
"""What Linux takes in all."""
CPU_PERIOD_US = 100_000
MESSAGE_BYTES, ALL_MESSAGES_BYTES = 4096, 12 * 1024
"""Of one termination message, and of all of a pod's together."""


def environment(container: ContainerSpec, pod: PodSpec, uid: str, external: External = NOTHING) -> dict[str, str]:
    """Variables of Services, of ``envFrom`` and of the manifest, in order; each may refer to those before it."""
    variables = {**external.services, **external.all_of}
    total = 0
    for variable in container.env:
        if variable.key is not None:
            value = external.values.get(variable.name)
        elif variable.resource is not None:
            value = resource_value(variable.resource, container, pod)
        else:
            value = pod_field(variable.field, pod, uid) if variable.field else expand(variable.value, variables)
        if value is not None:
            variables[variable.name] = value
            total += len(value)
        if total > MAX_ENVIRONMENT:
            raise InvalidInput(f"container {container.name}: its variables have more than {MAX_ENVIRONMENT} characters")
    return variables


def command_line(container: ContainerSpec, image: ImageConfig, variables: Mapping[str, str]) -> list[str]:
    """What to execute: the manifest's command replaces the image's whole, its args only the image's arguments.

    :raises InvalidInput: neither the manifest nor the image says what to run
    """
    given = [expand(text, variables) for text in container.args or ()]
    if container.command is not None:
        line = [expand(text, variables) for text in container.command] + given
    else:
        line = [*image.entrypoint, *(image.cmd if container.args is None else given)]
    if not line:
        raise InvalidInput(f"container {container.name}: no command given, and image {container.image} has none")
    return line


def user_of(container: ContainerSpec, image: ImageConfig) -> dict[str, Any] | str:
    """Who the container runs as: ids where they are known, else a name for the guest to look up in the image.

    :raises InvalidInput: ``runAsNonRoot`` and the user is root, or a name, of which that cannot be known
    """
    security = container.security
    name = image.user or "0"
    if security.non_root and security.user is None:
        uid = name.partition(":")[0]
        if not uid.isdigit():
            raise InvalidInput(
                f"container {container.name}: runAsNonRoot, and the image's user is the name {uid!r}; set runAsUser"
            )
        if int(uid) == 0:
            raise InvalidInput(f"container {container.name}: runAsNonRoot, and image {container.image} runs as root")
    if security.user is not None:
        name = str(security.user) if security.group is None else f"{security.user}:{security.group}"
    return {"name": name, "groups": list(security.groups)} if security.groups else name


def container_arguments(
    container: ContainerSpec, pod: PodSpec, uid: str, image: Image, external: External = NOTHING
) -> dict[str, Any]:
    """The arguments of ``container.start``.

    :param external: what config maps and secrets give it; without it they give nothing
    :raises InvalidInput: manifest and image together make no container
    """
    security, resources = container.security, container.resources
    variables = environment(container, pod, uid, external)
    env = _image_environment(image.config, pod.hostname) | variables
    return {
        "name": container.name,
        "image_disk": image.serial,
        "argv": command_line(container, image.config, variables),
        "env": [f"{name}={value}" for name, value in env.items()],
        "cwd": container.working_dir or image.config.workdir or "/",
        "user": user_of(container, image.config),
        "tty": container.tty,
        "stdin": container.stdin,
        "stdin_once": container.stdin_once,
        "read_only_root": security.read_only_root,
        "privileged": security.privileged,
        "capabilities": {"add": list(security.add), "drop": list(security.drop)},
        "no_new_privileges": security.no_new_privileges,
        "seccomp": "runtime/default" if security.confined_syscalls else "unconfined",
        "mounts": [
            {"volume": m.volume, "path": m.path, "read_only": m.read_only, "sub_path": _sub_path(m, variables)}
            for m in container.mounts
        ],
        "resources": {
            "memory_bytes": resources.memory_limit,
            "cpu_quota_us_per_100ms": _cpu_quota(resources.cpu_limit_millis),
            "cpu_shares": _cpu_shares(resources.cpu_request_millis),
        },
        "message": {
            "path": container.care.message_path,
            "max_bytes": min(MESSAGE_BYTES, ALL_MESSAGES_BYTES // (len(pod.containers) + len(pod.init_containers))),
            "from_logs": container.care.message_from_logs,
        },
        "stop_signal": image.config.stop_signal or "SIGTERM",
        "disk_bytes": resources.disk_limit,
    }


def _sub_path(mount: VolumeMount, variables: Mapping[str, str]) -> str:
    if not mount.sub_path_expr:
        return mount.sub_path
    path = expand(mount.sub_path_expr, variables)
    if path.startswith("/") or ".." in path.split("/"):
        raise InvalidInput(f"subPathExpr of {mount.path}: {path!r} is not a relative path without '..'")
    return path


def _image_environment(image: ImageConfig, hostname: str) -> dict[str, str]:
    variables = {"PATH": DEFAULT_PATH, "HOSTNAME": hostname}
    return variables | {name: value for name, _, value in (text.partition("=") for text in image.env)}


def _cpu_quota(millis: int | None) -> int | None:
    return None if millis is None else max(1000, millis * CPU_PERIOD_US // 1000)  # the kernel takes no less than 1 ms


def _cpu_shares(millis: int | None) -> int | None:
    return None if millis is None else min(max(2, millis * 1024 // 1000), 262_144)


def _own_name(pod: PodSpec) -> list[tuple[str, str]]:
    """The pod's name in the cluster's domain, where its host name is not that already."""
    if not pod.fqdn or pod.fqdn == pod.hostname:
        return []
    return [(next(iter(pod.network.addresses), "127.0.0.1"), pod.fqdn)]


def _net(network: Network) -> dict[str, Any] | None:
    """The guest's interface, as ``setup`` takes it."""
    if network.mode == "none":
        return None
    names = {"dns": list(network.dns) or [USER_DNS], "search": list(network.search)}
    if network.options:
        names["options"] = list(network.options)
    if not network.routed:
        return USER_NETWORK | names
    return names | {
        "ifname": "eth0",
        "addresses": list(network.routed),
        "peer": HOST_MAC,
        "gateways": [str(GATEWAY4), str(GATEWAY6)],
        "dns": list(network.dns),
    }


def setup_arguments(pod: PodSpec) -> dict[str, Any]:
    """The arguments of ``setup``: fresh entropy and the host's clock, as of now."""
    return {
        "hostname": pod.hostname,
        "clock_ns": time.time_ns(),
        "entropy": base64.b64encode(os.urandom(ENTROPY_BYTES)).decode(),
        "net": _net(pod.network),
        "data_disk": DATA_DISK,
        "hosts": [list(alias) for alias in (*_own_name(pod), *pod.host_aliases)],
        "volumes": [
            {"name": v.name, "medium": v.medium, "size_bytes": v.size_bytes, "group": pod.fs_group} for v in pod.volumes
        ],
        "share_process_namespace": pod.share_process_namespace,
        "quotas": has_disk_limits(pod),
    }
