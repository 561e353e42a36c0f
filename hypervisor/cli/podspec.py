"""The v1 Pod manifest that ``hv run`` stands for. Values are checked by hostd; here only what a manifest cannot say."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypervisor.errors import InvalidInput

PULL_POLICIES = {"always": "Always", "missing": "IfNotPresent", "never": "Never"}
RESTART_POLICIES = {"no": "Never", "on-failure": "OnFailure", "always": "Always"}
NET_ANNOTATION = "podvisor.dev/net"
COLD_ANNOTATION = "podvisor.dev/cold"
MAX_NAME = 63

# Fields of the manifest that hostd may complain about, and the option of ``hv run`` that each comes from.
_FLAGS = (
    ("metadata.name", "--name"),
    ("metadata.labels", "--label"),
    ("spec.hostname", "--hostname"),
    ("spec.volumes", "--volume"),
    ("spec.containers[0].name", "--name"),
    ("spec.containers[0].image", "IMAGE"),
    ("spec.containers[0].resources.limits.memory", "--memory"),
    ("spec.containers[0].resources.limits.cpu", "--cpus"),
    ("spec.containers[0].resources.limits.ephemeral-storage", "--disk-size"),
    ("spec.containers[0].volumeMounts", "--volume"),
    ("spec.containers[0].workingDir", "--workdir"),
    ("spec.containers[0].securityContext.runAs", "--user"),
    ("spec.containers[0].env", "--env"),
)

_ADJECTIVES = """
    amber bold brisk calm clear coral crisp daring deft eager fair fleet fond gentle glad golden grand happy hardy
    honest jolly keen kind light lively lucid lucky mellow merry mild modest neat nimble noble placid plucky polite
    prime proud quick quiet rapid ready rosy royal silent silver smooth snowy solid spry steady still stout sunny
    swift tidy true vivid warm wise witty
"""
_NOUNS = """
    acorn alder aspen badger bay beech birch brook cedar cliff cloud comet coral crane creek dale dune eagle ember
    falcon fern finch fjord forest fox garnet glade grove harbor hare hawk hazel heron hill isle jade lake larch lark
    lynx maple marsh meadow moss oak opal otter owl pebble pine pond quartz raven reef ridge river robin sage seal
    sparrow spruce stone swan thistle tide topaz trout vale wren
"""


def generate_name() -> str:
    """A name for a pod that has none: adjective-noun-number."""
    return f"{random.choice(_ADJECTIVES.split())}-{random.choice(_NOUNS.split())}-{random.randrange(10, 100)}"


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What ``hv run`` was asked for; texts as typed, empty or None for what was not given."""

    image: str
    name: str
    command: Sequence[str] = ()
    entrypoint: str | None = None
    stdin: bool = False
    stdin_once: bool = False
    tty: bool = False
    memory: str | None = None
    cpus: str | None = None
    env: Sequence[str] = ()
    env_files: Sequence[str] = ()
    net: str = "user"
    disk_size: str | None = None
    pull: str = "missing"
    volumes: Sequence[str] = ()
    workdir: str | None = None
    user: str | None = None
    hostname: str | None = None
    read_only: bool = False
    restart: str = "no"
    labels: Sequence[str] = ()
    cold: bool = False


def build_pod(options: RunOptions) -> dict[str, Any]:
    """The manifest.

    :raises InvalidInput: an option that no manifest can express; the message names it
    """
    volumes, mounts = parse_volumes(options.volumes)
    metadata: dict[str, Any] = {"name": options.name}
    if options.labels:
        metadata["labels"] = dict(_pair(text, "--label") for text in options.labels)
    annotations = {NET_ANNOTATION: options.net} if options.net != "user" else {}
    if options.cold:
        annotations[COLD_ANNOTATION] = "true"
    if annotations:
        metadata["annotations"] = annotations
    spec: dict[str, Any] = {"restartPolicy": RESTART_POLICIES[options.restart], "containers": []}
    spec["containers"].append(_container(options, mounts))
    if options.hostname:
        spec["hostname"] = options.hostname
    if volumes:
        spec["volumes"] = volumes
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def check(options: RunOptions) -> None:
    """Refuses what hostd would refuse, before a daemon is started or an image pulled for it.

    :raises InvalidInput: an option that does not fit; the message names it
    """
    from hypervisor.controller.names import dns_subdomain
    from hypervisor.kube.quantity import parse_quantity

    if options.name:
        dns_subdomain(options.name, where="--name")
    for text, flag in ((options.memory, "--memory"), (options.cpus, "--cpus"), (options.disk_size, "--disk-size")):
        if text is not None:
            parse_quantity(text, where=flag)
    build_pod(options)


def in_terms_of_flags(message: str) -> str | None:
    """hostd's complaint about a manifest that `build_pod` made, about the option instead; None if it is about none."""
    for field, flag in _FLAGS:
        if message.startswith(field):
            return f"{flag}: {message.partition(': ')[2]}"
    return None


def container_name(pod_name: str) -> str:
    """The container of a pod that ``hv run`` makes is named like the pod, as far as a container may be."""
    return pod_name.replace(".", "-")[:MAX_NAME].strip("-")


def _container(options: RunOptions, mounts: list[dict[str, Any]]) -> dict[str, Any]:
    # hv has pulled the image already where the policy is "always": the pod need not ask the registry a second time.
    policy = "Never" if options.pull == "never" else "IfNotPresent"
    container: dict[str, Any] = {
        "name": container_name(options.name),
        "image": options.image,
        "imagePullPolicy": policy,
        "command": [options.entrypoint] if options.entrypoint else None,
        "args": list(options.command),
        "env": [{"name": k, "value": v} for k, v in environment(options.env, options.env_files)],
        "workingDir": options.workdir,
        "resources": _resources(options),
        "volumeMounts": mounts,
        "securityContext": _security(options),
        "stdin": options.stdin,
        "stdinOnce": options.stdin_once,
        "tty": options.tty,
    }
    return {key: value for key, value in container.items() if value}


def _resources(options: RunOptions) -> dict[str, Any]:
    limits = {"memory": options.memory, "cpu": options.cpus, "ephemeral-storage": options.disk_size}
    given = {key: value for key, value in limits.items() if value is not None}
    return {"limits": given} if given else {}


def _security(options: RunOptions) -> dict[str, Any]:
    security: dict[str, Any] = {"readOnlyRootFilesystem": True} if options.read_only else {}
    if options.user:
        user, colon, group = options.user.partition(":")
        if not user.isdecimal() or (colon and not group.isdecimal()):
            raise InvalidInput(f"{options.user!r} is no UID or UID:GID; a pod takes numbers only", where="--user")
        security["runAsUser"] = int(user)
        if colon:
            security["runAsGroup"] = int(group)
    return security


def parse_volumes(texts: Iterable[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """``NAME:/path[:ro|rw|memory[,...]]`` as the pod's volumes and the container's mounts."""
    volumes: dict[str, dict[str, Any]] = {}
    mounts: list[dict[str, Any]] = []
    for text in texts:
        name, _, rest = text.partition(":")
        path, _, options = rest.partition(":")
        flags = set(filter(None, options.split(",")))
        if not name or not path.startswith("/") or flags - {"ro", "rw", "memory"}:
            raise InvalidInput(f"{text!r} is no NAME:/PATH, NAME:/PATH:ro or NAME:/PATH:memory", where="--volume")
        if "/" in name or name.startswith((".", "~")):
            raise InvalidInput(
                f"{text!r}: folders of this machine are not shared with a pod VM; "
                "name a volume of the pod, and copy files with hv cp",
                where="--volume",
            )
        volumes.setdefault(name, {"name": name, "emptyDir": {"medium": "Memory"} if "memory" in flags else {}})
        mounts.append({"name": name, "mountPath": path} | ({"readOnly": True} if "ro" in flags else {}))
    return list(volumes.values()), mounts


def environment(texts: Iterable[str], files: Iterable[str]) -> list[tuple[str, str]]:
    """Variables of the files, then those given one by one; the last of a name wins."""
    found: dict[str, str] = {}
    for file in files:
        found.update(_read_env_file(file))
    for text in texts:
        found.update(_variable(text, "--env"))
    return list(found.items())


def _variable(text: str, where: str) -> dict[str, str]:
    """``K=V``; a bare ``K`` takes hv's own value, and nothing where hv has none, as docker does."""
    name, equals, value = text.partition("=")
    if not name or any(c.isspace() or not c.isprintable() for c in name):
        raise InvalidInput(f"{text!r} is no NAME=VALUE", where=where)
    if equals:
        return {name: value}
    return {name: os.environ[name]} if name in os.environ else {}


def _read_env_file(path: str) -> dict[str, str]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "not UTF-8 text"
        raise InvalidInput(f"cannot read {path}: {reason}", where="--env-file") from e
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.lstrip().startswith("#"):
            found.update(_variable(line.strip(), f"{path} line {number}"))
    return found


def _pair(text: str, where: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise InvalidInput(f"{text!r} is no KEY=VALUE", where=where)
    return key, value
