"""What volumes hold that are made of other objects: config maps, secrets, tokens, fields of the pod.

A pod VM controller asks for the files of a volume before its VM starts and from time to time while it runs, and knows
nothing of where they come from (`PodObjects`). A host without a cluster has `HostObjects`: fields of the pod only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from hypervisor.controller.fieldrefs import pod_field
from hypervisor.controller.spec import PodSpec, Volume
from hypervisor.errors import InvalidInput, NotFound

DEFAULT_MODE = 0o644


@dataclass(frozen=True, slots=True)
class VolumeFile:
    """One file; `path` is relative to the volume."""

    path: str
    data: bytes
    mode: int = DEFAULT_MODE


class Lookup(Protocol):
    """What volumes and environments are made of, one thing at a time."""

    async def config_map(self, namespace: str, name: str) -> Mapping[str, bytes]:
        """Its entries; raises `NotFound`."""

    async def secret(self, namespace: str, name: str) -> Mapping[str, bytes]:
        """Its entries; raises `NotFound`."""

    async def token(self, pod: PodSpec, uid: str, audience: str, seconds: int) -> bytes:
        """A token of the pod's service account, bound to the pod, that is valid for a while yet."""

    async def service_variables(self, pod: PodSpec) -> Mapping[str, str]:
        """What containers of the pod are told of the cluster's Services."""


class PodObjects(Lookup, Protocol):
    """Where such files come from. Safe to ask again: answers that did not change are cheap."""

    async def files(self, pod: PodSpec, uid: str, volume: Volume) -> Sequence[VolumeFile]:
        """The files of a volume that has a `source`, as of now.

        :raises NotFound: an object that is not optional is not there (yet)
        :raises HvError: it cannot be had
        """


async def volume_files(lookup: Lookup, pod: PodSpec, uid: str, volume: Volume) -> list[VolumeFile]:
    """The files of a volume, whatever it is made of; of two with one path the later one holds.

    :raises NotFound: an object or key that is not optional is not there
    """
    source = volume.source or {}
    if "projected" in source:
        parts = source["projected"].get("sources") or ()
        mode = source["projected"].get("defaultMode")
    else:
        parts, mode = (_as_projection(source),), next(iter(source.values())).get("defaultMode")
    files: dict[str, VolumeFile] = {}
    for part in parts:
        for file in await _part(lookup, pod, uid, part, DEFAULT_MODE if mode is None else mode):
            files[file.path] = file
    return list(files.values())


def _as_projection(source: Mapping[str, Any]) -> dict[str, Any]:
    """A volume of one object as a source of a projected one: a secret's name has another key there."""
    ((kind, value),) = source.items()
    return {kind: value | ({"name": value.get("secretName", "")} if kind == "secret" else {})}


async def _part(lookup: Lookup, pod: PodSpec, uid: str, part: Mapping[str, Any], mode: int) -> list[VolumeFile]:
    ((kind, value),) = ((k, v) for k, v in part.items() if v is not None)
    match kind:
        case "serviceAccountToken":
            seconds = int(value.get("expirationSeconds") or 3600)
            token = await lookup.token(pod, uid, value.get("audience") or "", seconds)
            return [VolumeFile(value["path"], token, mode)]
        case "downwardAPI":
            return [
                VolumeFile(i["path"], downward(i, pod, uid), mode if i.get("mode") is None else i["mode"])
                for i in value.get("items") or ()
            ]
        case "configMap" | "secret":
            get = lookup.config_map if kind == "configMap" else lookup.secret
            try:
                entries = await get(pod.namespace, value["name"])
            except NotFound:
                if value.get("optional"):
                    return []
                raise
            return _chosen(entries, value, mode, f"{kind} {pod.namespace}/{value['name']}")
    raise InvalidInput(f"volumes made of {kind} are not supported yet")


def _chosen(entries: Mapping[str, bytes], value: Mapping[str, Any], mode: int, what: str) -> list[VolumeFile]:
    items = value.get("items")
    if not items:
        return [VolumeFile(key, data, mode) for key, data in entries.items()]
    files = []
    for item in items:
        if item["key"] in entries:
            own = item.get("mode")
            files.append(VolumeFile(item["path"], entries[item["key"]], mode if own is None else own))
        elif not value.get("optional"):
            raise NotFound(f"{what} has no key {item['key']!r}; it has: {', '.join(sorted(entries)) or 'none'}")
    return files


def downward(item: Mapping[str, Any], pod: PodSpec, uid: str) -> bytes:
    """The text of one item of a downwardAPI volume; all labels or annotations come as ``key="value"`` lines."""
    path = (item.get("fieldRef") or {}).get("fieldPath") or ""
    if path in ("metadata.labels", "metadata.annotations"):
        pairs = pod.labels if path == "metadata.labels" else pod.annotations
        return "\n".join(f"{key}={_quoted(value)}" for key, value in sorted(pairs)).encode()
    if not path:
        raise InvalidInput("resourceFieldRef is not supported yet; use fieldRef")
    return pod_field(path, pod, uid).encode()


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


class HostObjects:
    """Of a host without a cluster."""

    async def files(self, pod: PodSpec, uid: str, volume: Volume) -> Sequence[VolumeFile]:
        """Fields of the pod; everything else needs a cluster."""
        return await volume_files(self, pod, uid, volume)

    async def config_map(self, namespace: str, name: str) -> Mapping[str, bytes]:
        """There is none."""
        raise NotFound(f"config map {namespace}/{name}: this host is in no cluster")

    async def secret(self, namespace: str, name: str) -> Mapping[str, bytes]:
        """There is none."""
        raise NotFound(f"secret {namespace}/{name}: this host is in no cluster")

    async def token(self, pod: PodSpec, uid: str, audience: str, seconds: int) -> bytes:
        """There is none."""
        raise NotFound("service account tokens: this host is in no cluster")

    async def service_variables(self, pod: PodSpec) -> Mapping[str, str]:
        """There are none."""
        return {}
