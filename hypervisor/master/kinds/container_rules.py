"""What must hold of a container besides its schema.

Source: Kubernetes API reference, Container v1 core; wording as upstream's validation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hypervisor.kube.selectors import label_key_error
from hypervisor.master.kinds.rules import (
    Causes,
    View,
    at_least,
    between,
    config_key,
    dns_label,
    duplicate,
    forbidden,
    invalid,
    named,
    not_found,
    one_of,
    required,
)
from hypervisor.master.schema.scalars import Unfit, quantity_value

PROTOCOLS = ("TCP", "UDP", "SCTP")
HANDLERS = ("exec", "httpGet", "tcpSocket", "grpc")
ENV_SOURCES = ("fieldRef", "resourceFieldRef", "configMapKeyRef", "secretKeyRef", "fileKeyRef")
_PORT_NAME = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")


def container(path: str, obj: View, volumes: set[str], *, init: bool = False) -> Causes:
    """One container of a pod that has these `volumes`."""
    yield from named(f"{path}.name", obj.get("name"), dns_label)
    image = obj.get("image")
    if not image:
        yield required(f"{path}.image")
    elif image != image.strip():
        yield invalid(f"{path}.image", image, "must not have leading or trailing whitespace")
    yield from one_of(f"{path}.imagePullPolicy", obj.get("imagePullPolicy"), ("Always", "IfNotPresent", "Never"))
    yield from one_of(
        f"{path}.terminationMessagePolicy", obj.get("terminationMessagePolicy"), ("FallbackToLogsOnError", "File")
    )
    yield from _ports(f"{path}.ports", obj.get("ports") or ())
    yield from _env(f"{path}.env", obj.get("env") or ())
    yield from _env_from(f"{path}.envFrom", obj.get("envFrom") or ())
    yield from _mounts(f"{path}.volumeMounts", obj.get("volumeMounts") or (), volumes)
    yield from resources(f"{path}.resources", obj.get("resources") or {})
    yield from _life(path, obj, init and obj.get("restartPolicy") != "Always")
    if obj.get("restartPolicy") is not None and init:
        yield from one_of(f"{path}.restartPolicy", obj["restartPolicy"], ("Always", "Never", "OnFailure"))


def _ports(path: str, ports: Any) -> Causes:
    names = set()
    for index, port in enumerate(ports):
        here = f"{path}[{index}]"
        if name := port.get("name"):
            if why := port_name_error(name):
                yield invalid(f"{here}.name", name, why)
            if name in names:
                yield duplicate(f"{here}.name", name)
            names.add(name)
        if not port.get("containerPort"):
            yield required(f"{here}.containerPort")
        yield from between(f"{here}.containerPort", port.get("containerPort") or None, 1, 65535)
        yield from between(f"{here}.hostPort", port.get("hostPort") or None, 1, 65535)
        yield from one_of(f"{here}.protocol", port.get("protocol"), PROTOCOLS)


def port_name_error(name: str) -> str | None:
    """What is wrong with a port's name (IANA service name)."""
    if len(name) > 15:
        return "must be no more than 15 bytes"
    if not _PORT_NAME.fullmatch(name):
        return "must contain only alpha-numeric characters (a-z, 0-9), and hyphens (-)"
    if not re.search(r"[a-z]", name):
        return "must contain at least one letter (a-z)"
    return "must not contain consecutive hyphens" if "--" in name else None


def port_number(path: str, port: Any) -> Causes:
    """A port that is a number or the name of one."""
    if isinstance(port, str):
        if why := port_name_error(port):
            yield invalid(path, port, why)
    elif port is None:
        yield required(path)
    else:
        yield from between(path, port, 1, 65535)


def _env(path: str, variables: Any) -> Causes:
    for index, variable in enumerate(variables):
        here, name = f"{path}[{index}]", variable.get("name")
        if not name:
            yield required(f"{here}.name")
        elif "=" in name or any(not 0x20 <= ord(char) < 0x7F for char in name):
            yield invalid(
                f"{here}.name",
                name,
                "a valid environment variable name must consist only of printable ASCII characters other than '='",
            )
        source = variable.get("valueFrom")
        if source is not None:
            yield from _env_source(f"{here}.valueFrom", source, bool(variable.get("value")))


def _env_source(path: str, source: View, has_value: bool) -> Causes:
    given = [name for name in ENV_SOURCES if source.get(name) is not None]
    if not given:
        yield invalid(
            path,
            "",
            "must specify one of: `fieldRef`, `resourceFieldRef`, `configMapKeyRef`, `secretKeyRef` or `fileKeyRef`",
        )
    elif has_value:
        yield invalid(path, "", "may not be specified when `value` is not empty")
    elif len(given) > 1:
        yield invalid(path, "", "may not have more than one field specified at a time")
    for name in ("configMapKeyRef", "secretKeyRef"):
        reference = source.get(name)
        if reference is not None:
            if not reference.get("name"):
                yield required(f"{path}.{name}.name")
            yield from named(f"{path}.{name}.key", reference.get("key"), config_key)


def _env_from(path: str, sources: Any) -> Causes:
    for index, source in enumerate(sources):
        given = [name for name in ("configMapRef", "secretRef") if source.get(name) is not None]
        if len(given) != 1:
            why = "may not have more than one field specified at a time"
            yield invalid(
                f"{path}[{index}]", "", why if given else "must specify one of: `configMapRef` or `secretRef`"
            )
        for name in given:
            if not source[name].get("name"):
                yield required(f"{path}[{index}].{name}.name")


def _mounts(path: str, mounts: Any, volumes: set[str]) -> Causes:
    places = set()
    for index, mount in enumerate(mounts):
        here, name, place = f"{path}[{index}]", mount.get("name"), mount.get("mountPath")
        if not name:
            yield required(f"{here}.name")
        elif name not in volumes:
            yield not_found(f"{here}.name", name)
        if not place:
            yield required(f"{here}.mountPath")
        elif place in places:
            yield invalid(f"{here}.mountPath", place, "must be unique")
        places.add(place)
        for key in ("subPath", "subPathExpr"):
            yield from local_path(f"{here}.{key}", mount.get(key) or "")
        if mount.get("subPath") and mount.get("subPathExpr"):
            yield invalid(f"{here}.subPathExpr", mount["subPathExpr"], "subPathExpr and subPath are mutually exclusive")


def local_path(path: str, value: str) -> Causes:
    """A path below some directory, which does not lead out of it."""
    if value.startswith("/"):
        yield invalid(path, value, "must be a relative path")
    if ".." in value.split("/"):
        yield invalid(path, value, "must not contain '..'")


def resources(path: str, obj: View) -> Causes:
    """Requests and limits: quantities, and no request above its limit."""
    limits, requests = obj.get("limits") or {}, obj.get("requests") or {}
    yield from resource_list(f"{path}.limits", limits)
    yield from resource_list(f"{path}.requests", requests)
    for name, value in requests.items():
        asked, most = _amount(value), _amount(limits.get(name))
        if asked is not None and most is not None and asked > most:
            yield invalid(f"{path}.requests", value, f"must be less than or equal to {name} limit of {limits[name]}")
        elif name in limits and _fixed(name) and asked != most:
            yield invalid(f"{path}.requests", value, f"must be equal to {name} limit of {limits[name]}")


def _fixed(name: str) -> bool:
    """Resources that cannot be had in part: huge pages, and what others than Kubernetes define."""
    return name.startswith("hugepages-") or ("/" in name and "kubernetes.io/" not in name)


def _amount(value: Any) -> Any:
    try:
        return None if value is None else quantity_value(str(value))
    except Unfit:
        return None


_STANDARD = ("cpu", "memory", "ephemeral-storage", "storage", "pods")


def resource_list(path: str, listed: Mapping[str, Any]) -> Causes:
    """Amounts by resource: known or qualified names, not negative."""
    for name, value in listed.items():
        here = f"{path}[{name}]"
        if why := label_key_error(name):
            yield invalid(here, name, why)
        elif "/" not in name and name not in _STANDARD and not name.startswith("hugepages-"):
            yield invalid(here, name, "must be a standard resource type or fully qualified")
        amount = _amount(value)
        if amount is not None and amount < 0:
            yield invalid(here, str(value), "must be greater than or equal to 0")


def _life(path: str, obj: View, plain_init: bool) -> Causes:
    """Probes and hooks; an init container that ends before the next starts has none."""
    for name in ("livenessProbe", "readinessProbe", "startupProbe"):
        if obj.get(name) is None:
            continue
        if plain_init:
            yield forbidden(f"{path}.{name}", "may not be set for init containers without restartPolicy=Always")
        yield from probe(f"{path}.{name}", obj[name], once=name != "readinessProbe")
    hooks = obj.get("lifecycle") or {}
    if hooks and plain_init:
        yield forbidden(f"{path}.lifecycle", "may not be set for init containers without restartPolicy=Always")
    for name in ("postStart", "preStop"):
        if hooks.get(name) is not None:
            yield from handler(f"{path}.lifecycle.{name}", hooks[name], ("exec", "httpGet", "tcpSocket", "sleep"))


def probe(path: str, obj: View, *, once: bool) -> Causes:
    """A probe; `once`: one success is enough (liveness, start-up)."""
    yield from handler(path, obj, HANDLERS)
    yield from at_least(f"{path}.initialDelaySeconds", obj.get("initialDelaySeconds"))
    for name in ("timeoutSeconds", "periodSeconds", "successThreshold", "failureThreshold"):
        yield from at_least(f"{path}.{name}", obj.get(name), 1)
    if once and obj.get("successThreshold", 1) != 1:
        yield invalid(f"{path}.successThreshold", obj["successThreshold"], "must be 1")


def handler(path: str, obj: View, known: tuple[str, ...]) -> Causes:
    """What a probe or hook does: exactly one thing."""
    given = [name for name in known if obj.get(name) is not None]
    if not given:
        yield required(path, "must specify a handler type")
    for extra in given[1:]:
        yield forbidden(f"{path}.{extra}", "may not specify more than 1 handler type")
    for name in given[:1]:
        yield from _handler(f"{path}.{name}", name, obj[name])


def _handler(path: str, name: str, obj: View) -> Causes:
    if name == "exec" and not obj.get("command"):
        yield required(f"{path}.command")
    if name == "httpGet":
        if not obj.get("path"):
            yield required(f"{path}.path")
        yield from one_of(f"{path}.scheme", obj.get("scheme"), ("HTTP", "HTTPS"))
    if name in ("httpGet", "tcpSocket"):
        yield from port_number(f"{path}.port", obj.get("port"))
    if name == "grpc":
        yield from between(f"{path}.port", obj.get("port", 0), 1, 65535)
