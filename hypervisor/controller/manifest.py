"""Manifests: text -> objects -> a checked, frozen `PodSpec`. Nothing is started or changed here.

Three steps, each of which refuses with the path of the field: the published schema (`schema`), what this host supports
(`fields`), and the values themselves (here and in `container_parser`).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Hashable, Mapping
from typing import Any, cast

import yaml

from hypervisor.controller import names, poddisks, yaml_bounds
from hypervisor.controller.container_parser import confined_syscalls, one_of, parse_container, parse_id
from hypervisor.controller.fields import check_support
from hypervisor.controller.netparser import INCOMING, OUTGOING, parse_bandwidth, parse_host_ports
from hypervisor.controller.schema import check_pod, field_path
from hypervisor.controller.spec import ContainerSpec, Network, NetworkMode, PodSpec, RestartPolicy, Security, Volume
from hypervisor.errors import InvalidInput
from hypervisor.kube.quantity import parse_bytes

Object = Mapping[str, Any]

ANNOTATION_PREFIX = "podvisor.dev/"
NET_ANNOTATION = ANNOTATION_PREFIX + "net"
DISK_ANNOTATION = ANNOTATION_PREFIX + "disk-size"
TIMING_ANNOTATION = ANNOTATION_PREFIX + "timing"
COLD_ANNOTATION = ANNOTATION_PREFIX + "cold"
_PREFIXES = (ANNOTATION_PREFIX, poddisks.ANNOTATION_PREFIX)
FORK_OF_ANNOTATION = ANNOTATION_PREFIX + "fork-of"
FORK_ANNOTATION = ANNOTATION_PREFIX + "fork"
_OWN_ANNOTATIONS = (
    NET_ANNOTATION, DISK_ANNOTATION, COLD_ANNOTATION, poddisks.FILTERS_ANNOTATION, FORK_OF_ANNOTATION, FORK_ANNOTATION,
)  # fmt: skip

MAX_MANIFEST_BYTES = 4 * 1024 * 1024
MAX_CONTAINERS = 64
MAX_GROUPS = 512
_RESOLVER_OPTION = re.compile(r"[A-Za-z0-9][-A-Za-z0-9_.:]{0,62}")
CLUSTER_DOMAIN = "cluster.local"
MAX_HOSTNAME = 64
MIN_VOLUME = 4096
FILE_VOLUME_BYTES = 96 * 1024 * 1024
"""Of a volume whose files are made of objects: an object has 1 MiB at most, though in files that take a page each, and
old and new ones lie side by side.
"""
_FILE_VOLUMES = ("configMap", "secret", "downwardAPI", "projected")
MAX_GRACE_S = 7 * 24 * 3600


class _Loader(yaml.CSafeLoader if hasattr(yaml, "CSafeLoader") else yaml.SafeLoader):  # type: ignore[misc]
    """YAML as Kubernetes reads it: a key given twice is an error, and a time stays a string."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise InvalidInput(f"the key {key.value!r} is given twice", where=f"line {key.start_mark.line + 1}")
                seen.add(key.value)
        return cast("dict[Hashable, Any]", super().construct_mapping(node, deep))


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


def load_documents(text: str | bytes) -> list[dict[str, Any]]:
    """Every object in a YAML (or JSON) text; empty documents are skipped, a ``List`` is opened.

    :raises InvalidInput: too long, not YAML, or a document that is no object
    """
    if len(text) > MAX_MANIFEST_BYTES:
        raise InvalidInput(f"the manifest has {len(text)} bytes; at most {MAX_MANIFEST_BYTES} are taken")
    try:
        yaml_bounds.check(text)
        documents = [document for document in yaml.load_all(text, _Loader) if document is not None]
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as e:
        raise InvalidInput(f"not YAML: {_yaml_problem(e)}") from e
    objects: list[dict[str, Any]] = []
    for document in documents:
        if not isinstance(document, dict):
            raise InvalidInput(f"a manifest must be a mapping, not a {type(document).__name__}")
        items = document.get("items")
        is_list = document.get("kind") in ("List", "PodList") and isinstance(items, list)
        objects.extend(cast("list[dict[str, Any]]", items) if is_list else [document])
    return objects


def _yaml_problem(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark else str(problem)


def parse_pod(manifest: object) -> PodSpec:
    """A ``v1`` Pod as this host runs it.

    :raises InvalidInput: the first thing wrong with it, with its path, what is allowed there, and the nearest name
    """
    if not isinstance(manifest, dict):
        raise InvalidInput("a manifest must be a mapping")
    if (manifest.get("apiVersion"), manifest.get("kind")) != ("v1", "Pod"):
        shown = f"{manifest.get('apiVersion')!s:.60} {manifest.get('kind')!s:.60}"
        raise InvalidInput(f"this host takes apiVersion v1, kind Pod; this is {shown}", where="kind")
    check_pod(manifest)
    check_support(manifest)
    if not manifest.get("spec"):
        raise InvalidInput("required, and missing", where="spec")
    return _parse(manifest.get("metadata") or {}, manifest["spec"], manifest.get("status") or {})


def _parse(metadata: Object, spec: Object, status: Object) -> PodSpec:
    name = metadata.get("name")
    if not name:
        raise InvalidInput("required, and missing", where="metadata.name")
    annotations = _annotations(metadata.get("annotations") or {})
    volumes = _volumes(spec.get("volumes") or ())
    security = _pod_security(spec.get("securityContext") or {})
    containers = _containers(spec, "containers", volumes, security)
    init_containers = _containers(spec, "initContainers", volumes, security)
    _check_unique(containers, init_containers)
    fqdn = _fqdn(spec, name, metadata.get("namespace") or "default")
    _check_resource_refs((*containers, *init_containers))
    if not containers:
        raise InvalidInput("a pod needs at least one container", where="spec.containers")
    return PodSpec(
        namespace=names.dns_label(metadata.get("namespace") or "default", where="metadata.namespace"),
        name=names.dns_subdomain(name, where="metadata.name"),
        containers=containers,
        init_containers=init_containers,
        labels=_labels(metadata.get("labels") or {}),
        annotations=tuple(annotations.items()),
        volumes=tuple(volumes.values()),
        restart_policy=cast(
            RestartPolicy,
            one_of(spec.get("restartPolicy") or "Always", ("Always", "OnFailure", "Never"), where="spec.restartPolicy"),
        ),
        grace_s=_seconds(spec, "terminationGracePeriodSeconds", minimum=0, default=30),
        deadline_s=_seconds(spec, "activeDeadlineSeconds", minimum=1, default=0) or None,
        hostname=fqdn if fqdn and spec.get("setHostnameAsFQDN") else _hostname(spec, name),
        fqdn=fqdn,
        share_process_namespace=bool(spec.get("shareProcessNamespace")),
        host_aliases=_host_aliases(spec.get("hostAliases") or ()),
        network=_network(spec, annotations),
        disk_bytes=_disk_size(annotations),
        disks=_disks(annotations),
        cold=_cold(annotations),
        node_name=spec.get("nodeName") or "",
        service_account=spec.get("serviceAccountName") or "",
        pull_secrets=tuple(s["name"] for s in spec.get("imagePullSecrets") or () if s.get("name")),
        service_links=spec.get("enableServiceLinks") is not False,
        host_address=_address(status.get("hostIP") or "127.0.0.1", "status.hostIP"),
        fs_group=parse_id((spec.get("securityContext") or {}).get("fsGroup"), "spec.securityContext.fsGroup"),
    )


def _containers(spec: Object, key: str, volumes: Mapping[str, Volume], security: Security) -> tuple[ContainerSpec, ...]:
    items = spec.get(key) or ()
    if len(items) > MAX_CONTAINERS:
        raise InvalidInput(f"{len(items)} containers; at most {MAX_CONTAINERS} are taken", where=f"spec.{key}")
    init = key == "initContainers"
    return tuple(parse_container(c, volumes, security, f"spec.{key}[{i}]", init=init) for i, c in enumerate(items))


def _check_unique(containers: tuple[ContainerSpec, ...], init_containers: tuple[ContainerSpec, ...]) -> None:
    seen: set[str] = set()
    for key, group in (("initContainers", init_containers), ("containers", containers)):
        for i, container in enumerate(group):
            if container.name in seen:
                raise InvalidInput(f"{container.name!r} is used twice", where=f"spec.{key}[{i}].name")
            seen.add(container.name)


def _check_resource_refs(containers: tuple[ContainerSpec, ...]) -> None:
    known = {c.name for c in containers}
    for container in containers:
        for variable in container.env:
            if variable.resource is not None and variable.resource.container not in {"", *known}:
                raise InvalidInput(
                    f"variable {variable.name} of container {container.name}: the pod has no container "
                    f"{variable.resource.container!r}",
                    where="resourceFieldRef.containerName",
                )


def _labels(labels: Mapping[str, str | None]) -> tuple[tuple[str, str], ...]:
    for key, value in labels.items():
        where = field_path("metadata.labels", key)
        names.label_key(key, where=where)
        names.label_value(value or "", where=where)
    return tuple((key, value or "") for key, value in labels.items())


def _annotations(annotations: Mapping[str, str | None]) -> dict[str, str]:
    for key in annotations:
        where = field_path("metadata.annotations", key)
        names.label_key(key, where=where)
        if key.startswith(_PREFIXES) and key != TIMING_ANNOTATION:
            one_of(key, _OWN_ANNOTATIONS, where=where)
    return {key: value or "" for key, value in annotations.items() if key != TIMING_ANNOTATION}


def _cold(annotations: Mapping[str, str]) -> bool:
    where = field_path("metadata.annotations", COLD_ANNOTATION)
    return one_of(annotations.get(COLD_ANNOTATION, "false"), ("true", "false"), where=where) == "true"


def _volumes(items: tuple[Object, ...]) -> dict[str, Volume]:
    volumes: dict[str, Volume] = {}
    for i, data in enumerate(items):
        where = f"spec.volumes[{i}]"
        name = names.dns_label(data["name"], where=f"{where}.name")
        if name in volumes:
            raise InvalidInput(f"{name!r} is used twice", where=f"{where}.name")
        made_of = {kind: data[kind] for kind in _FILE_VOLUMES if data.get(kind) is not None}
        if made_of:
            volumes[name] = Volume(name, "memory", FILE_VOLUME_BYTES, _file_volume(made_of, where))
            continue
        source = data.get("emptyDir")
        if source is None:
            raise InvalidInput("give the volume a source; emptyDir: {} is the simplest", where=where)
        medium = one_of(source.get("medium") or "", ("", "Memory"), where=f"{where}.emptyDir.medium")
        limit = source.get("sizeLimit")
        size = None if limit is None else parse_bytes(limit, where=f"{where}.emptyDir.sizeLimit")
        if size is not None and 0 < size < MIN_VOLUME:
            raise InvalidInput(f"{limit} is less than {MIN_VOLUME} bytes", where=f"{where}.emptyDir.sizeLimit")
        volumes[name] = Volume(name, "memory" if medium else "disk", size or None)
    return volumes


def _file_volume(source: Object, where: str) -> Object:
    """A source whose files are made of objects, checked as far as it can be without them."""
    if len(source) != 1:
        raise InvalidInput(f"give one source, not {' and '.join(source)}", where=where)
    ((kind, value),) = source.items()
    _check_mode(value.get("defaultMode"), f"{where}.{kind}.defaultMode")
    parts = value.get("sources") or () if kind == "projected" else ({kind: value},)
    for part in parts:
        for part_kind, part_value in part.items():
            for item in part_value.get("items") or () if part_value else ():
                _inside(item.get("path") or "", f"{where}.{kind}")
                _check_mode(item.get("mode"), f"{where}.{kind}")
            if part_kind == "serviceAccountToken":
                _inside(part_value.get("path") or "", f"{where}.{kind}")
    return source


def _check_mode(mode: int | None, where: str) -> None:
    if mode is not None and not 0 <= mode <= 0o777:
        raise InvalidInput(f"{mode} is no file mode: 0 to 0777 in octal, 0 to 511 in decimal", where=where)


def _inside(path: str, where: str) -> None:
    if not path or any(part in ("", ".", "..") for part in path.split("/")) or path.startswith(".."):
        raise InvalidInput(f"{path!r} is not a relative path without '..'", where=where)


def _pod_security(data: Object) -> Security:
    where = "spec.securityContext"
    user = parse_id(data.get("runAsUser"), f"{where}.runAsUser")
    groups = [*(data.get("supplementalGroups") or ())]
    if len(groups) > MAX_GROUPS:
        raise InvalidInput(f"{len(groups)} groups; at most {MAX_GROUPS} are taken", where=f"{where}.supplementalGroups")
    groups += [] if (own := parse_id(data.get("fsGroup"), f"{where}.fsGroup")) is None else [own]
    return Security(
        user=user,
        group=parse_id(data.get("runAsGroup"), f"{where}.runAsGroup"),
        groups=tuple(parse_id(g, f"{where}.supplementalGroups[{i}]") or 0 for i, g in enumerate(groups)),
        non_root=bool(data.get("runAsNonRoot")),
        confined_syscalls=confined_syscalls(data, True, where),
    )


def _seconds(spec: Object, key: str, *, minimum: int, default: int) -> int:
    value = spec.get(key)
    if value is None:
        return default
    if not minimum <= value <= MAX_GRACE_S:
        raise InvalidInput(f"{value} is not from {minimum} to {MAX_GRACE_S} seconds", where=f"spec.{key}")
    return int(value)


def _hostname(spec: Object, name: str) -> str:
    if spec.get("hostname"):
        return names.dns_label(spec["hostname"], where="spec.hostname")
    return name[:63].rstrip("-.")


def _fqdn(spec: Object, name: str, namespace: str) -> str:
    """The pod's name in the cluster's domain; empty without a subdomain."""
    if not spec.get("subdomain"):
        return ""
    subdomain = names.dns_label(spec["subdomain"], where="spec.subdomain")
    fqdn = f"{_hostname(spec, name)}.{subdomain}.{namespace}.svc.{CLUSTER_DOMAIN}"
    if spec.get("setHostnameAsFQDN") and len(fqdn) > MAX_HOSTNAME:
        raise InvalidInput(
            f"{fqdn} has {len(fqdn)} characters; Linux takes {MAX_HOSTNAME}", where="spec.setHostnameAsFQDN"
        )
    return fqdn


def _host_aliases(items: tuple[Object, ...]) -> tuple[tuple[str, str], ...]:
    aliases: list[tuple[str, str]] = []
    for i, data in enumerate(items):
        where = f"spec.hostAliases[{i}]"
        address = _address(data["ip"], f"{where}.ip")
        for j, name in enumerate(data.get("hostnames") or ()):
            aliases.append((address, names.dns_subdomain(name, where=f"{where}.hostnames[{j}]")))
    return tuple(aliases)


def _address(text: str, where: str) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise InvalidInput(f"{text[:80]!r} is no IP address", where=where) from None


def _name_server(text: str, where: str) -> str:
    try:
        return str(ipaddress.IPv4Address(text))
    except ValueError:
        raise InvalidInput(f"{text[:80]!r} is no IPv4 address, which a pod's network has only", where=where) from None


def _network(spec: Object, annotations: Mapping[str, str]) -> Network:
    where = field_path("metadata.annotations", NET_ANNOTATION)
    mode = one_of(annotations.get(NET_ANNOTATION, "user"), ("user", "none"), where=where)
    config = spec.get("dnsConfig") or {}
    policy = spec.get("dnsPolicy") or "ClusterFirst"
    one_of(policy, ("Default", "ClusterFirst", "ClusterFirstWithHostNet", "None"), where="spec.dnsPolicy")
    servers = config.get("nameservers") or ()
    if policy == "None" and not servers:
        raise InvalidInput("dnsPolicy None needs at least one", where="spec.dnsConfig.nameservers")
    searches = config.get("searches") or ()
    return Network(
        cast(NetworkMode, mode),
        tuple(_name_server(s, f"spec.dnsConfig.nameservers[{i}]") for i, s in enumerate(servers)),
        tuple(names.dns_subdomain(s, where=f"spec.dnsConfig.searches[{i}]") for i, s in enumerate(searches)),
        policy=policy,
        options=tuple(_resolver_option(o, i) for i, o in enumerate(config.get("options") or ())),
        host_ports=parse_host_ports(spec),
        incoming=parse_bandwidth(annotations, INCOMING),
        outgoing=parse_bandwidth(annotations, OUTGOING),
    )


def _resolver_option(option: Mapping[str, str], index: int) -> str:
    text = f"{option['name']}:{option['value']}" if option.get("value") else option.get("name") or ""
    if not _RESOLVER_OPTION.fullmatch(text):
        raise InvalidInput(f"{text!r} is no option of a resolver, as ndots:2", where=f"spec.dnsConfig.options[{index}]")
    return text


def _disk_size(annotations: Mapping[str, str]) -> int | None:
    text = annotations.get(DISK_ANNOTATION)
    return None if text is None else parse_bytes(text, where=field_path("metadata.annotations", DISK_ANNOTATION))


def _disks(annotations: Mapping[str, str]) -> poddisks.PodDisks:
    where = field_path("metadata.annotations", poddisks.FILTERS_ANNOTATION)
    return poddisks.parse_disks(annotations.get(poddisks.FILTERS_ANNOTATION), where=where)
