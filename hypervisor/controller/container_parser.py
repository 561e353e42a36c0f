"""One container of a manifest that has passed the schema, as a `ContainerSpec`."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Mapping
from typing import Any, cast

from hypervisor.controller import names
from hypervisor.controller.care_parser import parse_care
from hypervisor.controller.schema import field_path
from hypervisor.controller.spec import (
    ContainerSpec,
    EnvFrom,
    EnvVar,
    KeyRef,
    PullPolicy,
    ResourceRef,
    Resources,
    Security,
    Volume,
    VolumeMount,
)
from hypervisor.errors import InvalidInput
from hypervisor.images.reference import id_prefix
from hypervisor.images.reference import parse as parse_reference
from hypervisor.kube.quantity import parse_bytes, parse_cpu_millis

Object = Mapping[str, Any]

# Linux' own limits (MAX_ARG_STRLEN, and a quarter of the 8 MiB stack for all of them): better said here than by execve.
MAX_STRING = 131_071
MAX_STRINGS = 2 * 1024 * 1024
MIN_MEMORY = 4 * 1024 * 1024
MAX_ID = 2**31 - 1

FIELD_REFS = (
    "metadata.name",
    "metadata.namespace",
    "metadata.uid",
    "spec.nodeName",
    "spec.serviceAccountName",
    "status.hostIP",
    "status.hostIPs",
    "status.podIP",
    "status.podIPs",
)
_MAP_REFS = ("metadata.labels", "metadata.annotations")


def one_of(value: Any, allowed: Iterable[str], *, where: str) -> str:
    """`value`, if it is one of the allowed texts; else `InvalidInput` that lists them."""
    if value not in (options := list(allowed)):
        raise InvalidInput(
            f"{str(value)[:80]!r} is not one of {', '.join(o or '(empty)' for o in options)}", where=where
        )
    return cast(str, value)


def parse_container(
    data: Object, volumes: Mapping[str, Volume], pod_security: Security, where: str, *, init: bool = False
) -> ContainerSpec:
    """:raises InvalidInput: the first value that cannot be, with its path"""
    image = data.get("image") or ""
    if not image.strip():
        raise InvalidInput("required, and missing", where=f"{where}.image")
    check_image(image, f"{where}.image")
    pull = data.get("imagePullPolicy") or None
    if pull is not None:
        one_of(pull, ("Always", "IfNotPresent", "Never"), where=f"{where}.imagePullPolicy")
    spec = ContainerSpec(
        name=names.dns_label(data["name"], where=f"{where}.name"),
        image=image,
        pull=cast("PullPolicy | None", pull),
        command=_strings(data.get("command"), f"{where}.command"),
        args=_strings(data.get("args"), f"{where}.args"),
        working_dir=_working_dir(data.get("workingDir"), f"{where}.workingDir"),
        env=tuple(_env(v, f"{where}.env[{i}]") for i, v in enumerate(data.get("env") or ())),
        env_from=tuple(_env_from(v, f"{where}.envFrom[{i}]") for i, v in enumerate(data.get("envFrom") or ())),
        mounts=_mounts(data.get("volumeMounts") or (), volumes, f"{where}.volumeMounts"),
        resources=_resources(data.get("resources") or {}, f"{where}.resources"),
        security=_security(data.get("securityContext") or {}, pod_security, f"{where}.securityContext"),
        tty=bool(data.get("tty")),
        stdin=bool(data.get("stdin")),
        stdin_once=bool(data.get("stdinOnce")),
        care=parse_care(data, where, runs_on=not init or _is_sidecar(data, where)),
        sidecar=init and _is_sidecar(data, where),
    )
    if not init and data.get("restartPolicy"):
        raise InvalidInput("not supported: only init containers have one here", where=f"{where}.restartPolicy")
    if spec.stdin_once and not spec.stdin:
        raise InvalidInput("needs stdin: true", where=f"{where}.stdinOnce")
    _check_ports(data.get("ports") or (), f"{where}.ports")
    _check_total(spec, where)
    return spec


def _is_sidecar(data: Object, where: str) -> bool:
    if not data.get("restartPolicy"):
        return False
    one_of(data["restartPolicy"], ("Always",), where=f"{where}.restartPolicy")
    return True


def check_image(name: str, where: str) -> None:
    """:raises InvalidInput: it is no name of an image"""
    if id_prefix(name) is None:
        try:
            parse_reference(name)
        except InvalidInput as e:
            raise InvalidInput(str(e), where=where) from e


def _string(text: str, where: str) -> str:
    if "\0" in text:
        raise InvalidInput("holds a NUL byte", where=where)
    size = len(text.encode("utf-8", "surrogateescape"))
    if size > MAX_STRING:
        raise InvalidInput(f"{size} bytes; Linux takes at most {MAX_STRING} in one argument or variable", where=where)
    return text


def _strings(value: list[str] | None, where: str) -> tuple[str, ...] | None:
    if not value:
        return None
    return tuple(_string(text, field_path(where, i)) for i, text in enumerate(value))


def _check_total(spec: ContainerSpec, where: str) -> None:
    texts = [*(spec.command or ()), *(spec.args or ()), *(f"{v.name}={v.value}" for v in spec.env)]
    total = sum(len(text.encode("utf-8", "surrogateescape")) + 9 for text in texts)  # with NUL and pointer
    if total > MAX_STRINGS:
        raise InvalidInput(
            f"command, args and env have {total} bytes; Linux takes at most {MAX_STRINGS} for all of them", where=where
        )


def _working_dir(value: str | None, where: str) -> str | None:
    if value and not value.startswith("/"):
        raise InvalidInput(f"{value!r} is not an absolute path", where=where)
    return value or None


def _env(data: Object, where: str) -> EnvVar:
    name = names.env_name(data["name"], where=f"{where}.name")
    source = {key: value for key, value in (data.get("valueFrom") or {}).items() if value is not None}
    if not source:
        return EnvVar(name, _string(data.get("value") or "", f"{where}.value"))
    if data.get("value"):
        raise InvalidInput("give value or valueFrom, not both", where=f"{where}.valueFrom")
    if len(source) != 1:
        raise InvalidInput(f"give one source, not {' and '.join(source)}", where=f"{where}.valueFrom")
    for kind in ("configMap", "secret"):
        if f"{kind}KeyRef" in source:
            return EnvVar(name, key=_key_ref(kind, source[f"{kind}KeyRef"], f"{where}.valueFrom.{kind}KeyRef"))
    if "resourceFieldRef" in source:
        return EnvVar(name, resource=_resource(source["resourceFieldRef"], f"{where}.valueFrom.resourceFieldRef"))
    field = source["fieldRef"]["fieldPath"]
    base = field.partition("[")[0]
    quoted = field.removeprefix(base)
    if base in _MAP_REFS and quoted.startswith("['") and quoted.endswith("']"):
        return EnvVar(name, field=field)
    one_of(field, (*FIELD_REFS, *(f"{m}['KEY']" for m in _MAP_REFS)), where=f"{where}.valueFrom.fieldRef.fieldPath")
    return EnvVar(name, field=field)


def _key_ref(kind: str, data: Object, where: str) -> KeyRef:
    if not data.get("name"):
        raise InvalidInput("required, and missing", where=f"{where}.name")
    return KeyRef(cast(Any, kind), data["name"], data.get("key") or "", bool(data.get("optional")))


def _env_from(data: Object, where: str) -> EnvFrom:
    given = [kind for kind in ("configMap", "secret") if data.get(f"{kind}Ref") is not None]
    if len(given) != 1:
        raise InvalidInput("give one of configMapRef, secretRef", where=where)
    ref = _key_ref(given[0], data[f"{given[0]}Ref"], f"{where}.{given[0]}Ref")
    return EnvFrom(ref, data.get("prefix") or "")


def _resource(data: Object, where: str) -> ResourceRef:
    known = [f"{kind}.{name}" for kind in ("limits", "requests") for name in _LIMITS]
    resource = one_of(data["resource"], known, where=f"{where}.resource")
    cpu = resource.endswith(".cpu")
    divisor = data.get("divisor")
    if divisor in (None, "", "0", 0):
        return ResourceRef(resource, data.get("containerName") or "", 1000 if cpu else 1)
    parse = parse_cpu_millis if cpu else parse_bytes
    amount = parse(divisor, where=f"{where}.divisor")
    if amount <= 0:
        raise InvalidInput(f"{divisor!r} is not more than nothing", where=f"{where}.divisor")
    return ResourceRef(resource, data.get("containerName") or "", amount)


def _mounts(items: Iterable[Object], volumes: Mapping[str, Volume], where: str) -> tuple[VolumeMount, ...]:
    mounts: list[VolumeMount] = []
    for i, data in enumerate(items):
        mount = _mount(data, volumes, field_path(where, i))
        if any(mount.path == other.path for other in mounts):
            raise InvalidInput(f"{mount.path!r} is mounted twice", where=f"{where}[{i}].mountPath")
        mounts.append(mount)
    return tuple(mounts)


def _mount(data: Object, volumes: Mapping[str, Volume], where: str) -> VolumeMount:
    if data["name"] not in volumes:
        known = ", ".join(volumes) or "(none)"
        raise InvalidInput(f"the pod has no volume {data['name']!r}; spec.volumes has {known}", where=f"{where}.name")
    path = data["mountPath"]
    if not path.startswith("/") or ".." in path.split("/") or posixpath.normpath(path).strip("/") == "":
        raise InvalidInput(f"{path!r} is not an absolute path below / without '..'", where=f"{where}.mountPath")
    sub_path, expression = data.get("subPath") or "", data.get("subPathExpr") or ""
    if sub_path and expression:
        raise InvalidInput("give subPath or subPathExpr, not both", where=f"{where}.subPathExpr")
    if sub_path.startswith("/") or ".." in sub_path.split("/"):
        raise InvalidInput(f"{sub_path!r} is not a relative path without '..'", where=f"{where}.subPath")
    read_only = bool(data.get("readOnly")) or volumes[data["name"]].source is not None
    return VolumeMount(data["name"], _string(path, f"{where}.mountPath"), read_only, sub_path, expression)


_LIMITS = ("cpu", "memory", "ephemeral-storage")


def _resources(data: Object, where: str) -> Resources:
    limits, requests = data.get("limits") or {}, data.get("requests") or {}
    values: dict[str, dict[str, int]] = {"limits": {}, "requests": {}}
    for kind, table in (("limits", limits), ("requests", requests)):
        for name, value in table.items():
            path = field_path(f"{where}.{kind}", name)
            one_of(name, _LIMITS, where=path)
            parse = parse_cpu_millis if name == "cpu" else parse_bytes
            values[kind][name] = parse(value, where=path)
    for name, limit in values["limits"].items():
        if limit == 0:
            raise InvalidInput(
                "a limit of nothing; leave it out or raise it", where=field_path(f"{where}.limits", name)
            )
        if values["requests"].get(name, 0) > limit:
            raise InvalidInput(
                f"{requests[name]} is more than the limit {limits[name]}", where=field_path(f"{where}.requests", name)
            )
    memory = values["limits"].get("memory")
    if memory is not None and memory < MIN_MEMORY:
        raise InvalidInput(
            f"{limits['memory']} is too little for any container; give 4Mi or more", where=f"{where}.limits.memory"
        )
    return Resources(
        memory_limit=memory,
        memory_request=values["requests"].get("memory"),
        cpu_limit_millis=values["limits"].get("cpu"),
        cpu_request_millis=values["requests"].get("cpu"),
        disk_limit=values["limits"].get("ephemeral-storage"),
    )


def parse_id(value: int | None, where: str) -> int | None:
    """A user or group id, or None."""
    if value is not None and not 0 <= value <= MAX_ID:
        raise InvalidInput(f"{value} is no user or group id: 0 to {MAX_ID}", where=where)
    return None if value is None else int(value)


def confined_syscalls(data: Object, default: bool, where: str) -> bool:
    """Whether the runtime's seccomp profile applies: it does unless somebody says ``Unconfined``."""
    kind = (data.get("seccompProfile") or {}).get("type")
    if kind is None:
        return default
    return one_of(kind, ("RuntimeDefault", "Unconfined"), where=f"{where}.seccompProfile.type") == "RuntimeDefault"


def _security(data: Object, pod: Security, where: str) -> Security:
    """The container's own security context over the pod's."""
    user = parse_id(data.get("runAsUser"), f"{where}.runAsUser")
    group = parse_id(data.get("runAsGroup"), f"{where}.runAsGroup")
    privileged = bool(data.get("privileged"))
    escalation = data.get("allowPrivilegeEscalation")
    capabilities = data.get("capabilities") or {}
    security = Security(
        user=pod.user if user is None else user,
        group=pod.group if group is None else group,
        groups=pod.groups,
        non_root=pod.non_root if data.get("runAsNonRoot") is None else bool(data["runAsNonRoot"]),
        read_only_root=bool(data.get("readOnlyRootFilesystem")),
        privileged=privileged,
        no_new_privileges=escalation is False,
        confined_syscalls=confined_syscalls(data, pod.confined_syscalls and not privileged, where),
        add=_capabilities(capabilities, "add", where),
        drop=_capabilities(capabilities, "drop", where),
    )
    if security.privileged and security.no_new_privileges:
        raise InvalidInput("cannot be false with privileged: true", where=f"{where}.allowPrivilegeEscalation")
    if security.non_root and security.user == 0:
        raise InvalidInput("runAsUser is 0, which is root", where=f"{where}.runAsNonRoot")
    if security.group is not None and security.user is None:
        raise InvalidInput("needs runAsUser too", where=f"{where}.runAsGroup")
    return security


def _capabilities(data: Object, kind: str, where: str) -> tuple[str, ...]:
    path = f"{where}.capabilities.{kind}"
    return tuple(names.capability(c, where=field_path(path, i)) for i, c in enumerate(data.get(kind) or ()))


def _check_ports(ports: Iterable[Object], where: str) -> None:
    for i, port in enumerate(ports):
        number = port["containerPort"]
        if not 1 <= number <= 65535:
            raise InvalidInput(f"{number} is no port: 1 to 65535", where=f"{where}[{i}].containerPort")
        one_of(port.get("protocol") or "TCP", ("TCP", "UDP", "SCTP"), where=f"{where}[{i}].protocol")
