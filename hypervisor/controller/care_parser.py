"""Probes, hooks and termination messages of a container's manifest that has passed the schema, as `Care`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hypervisor.controller.spec import Action, Care, ExecAction, GrpcAction, HttpAction, Probe, SleepAction, TcpAction
from hypervisor.errors import InvalidInput

Object = Mapping[str, Any]

MAX_SERVICE = 1024
_MAX_SECONDS = 2**31 - 1
_PROBE_ACTIONS = ("exec", "httpGet", "tcpSocket", "grpc")
_HOOK_ACTIONS = ("exec", "httpGet", "tcpSocket", "sleep")
_POLICIES = ("File", "FallbackToLogsOnError")


def parse_care(data: Object, where: str, *, runs_on: bool) -> Care:
    """:param runs_on: it is no init container that runs to its end: those have neither probes nor hooks
    :raises InvalidInput: the first value that cannot be, with its path
    """
    if not runs_on:
        for key in ("livenessProbe", "readinessProbe", "startupProbe", "lifecycle"):
            if data.get(key):
                raise InvalidInput(
                    "an init container runs to its end; only restartPolicy Always has one", where=f"{where}.{key}"
                )
    ports = data.get("ports") or ()
    hooks = data.get("lifecycle") or {}
    policy = data.get("terminationMessagePolicy") or "File"
    if policy not in _POLICIES:
        raise InvalidInput(
            f"{policy!r} is not one of {', '.join(_POLICIES)}", where=f"{where}.terminationMessagePolicy"
        )
    return Care(
        liveness=_probe(data.get("livenessProbe"), ports, f"{where}.livenessProbe", once=True),
        readiness=_probe(data.get("readinessProbe"), ports, f"{where}.readinessProbe", may_kill=False),
        startup=_probe(data.get("startupProbe"), ports, f"{where}.startupProbe", once=True),
        post_start=_hook(hooks.get("postStart"), ports, f"{where}.lifecycle.postStart"),
        pre_stop=_hook(hooks.get("preStop"), ports, f"{where}.lifecycle.preStop"),
        message_path=_message_path(data.get("terminationMessagePath"), f"{where}.terminationMessagePath"),
        message_from_logs=policy == "FallbackToLogsOnError",
    )


def _message_path(path: str | None, where: str) -> str:
    path = path or "/dev/termination-log"
    if not path.startswith("/") or ".." in path.split("/") or not path.strip("/"):
        raise InvalidInput(f"{path!r} is not an absolute path below / without '..'", where=where)
    return path


def _probe(
    data: Object | None, ports: Sequence[Object], where: str, *, once: bool = False, may_kill: bool = True
) -> Probe | None:
    """:param once: one success is enough, and more cannot be asked for"""
    if data is None:
        return None
    probe = Probe(
        action=_action(data, _PROBE_ACTIONS, ports, where),
        initial_delay_s=_seconds(data, "initialDelaySeconds", 0, where, low=0),
        timeout_s=_seconds(data, "timeoutSeconds", 1, where),
        period_s=_seconds(data, "periodSeconds", 10, where),
        success_threshold=_seconds(data, "successThreshold", 1, where),
        failure_threshold=_seconds(data, "failureThreshold", 3, where),
        grace_s=_grace(data, where, may_kill=may_kill),
    )
    if once and probe.success_threshold != 1:
        raise InvalidInput("must be 1 for this probe", where=f"{where}.successThreshold")
    return probe


def _grace(data: Object, where: str, *, may_kill: bool) -> int | None:
    if data.get("terminationGracePeriodSeconds") is None:
        return None
    if not may_kill:
        raise InvalidInput("a readiness probe ends nothing", where=f"{where}.terminationGracePeriodSeconds")
    return _seconds(data, "terminationGracePeriodSeconds", 1, where)


def _seconds(data: Object, key: str, default: int, where: str, *, low: int = 1) -> int:
    """A count or seconds; 0 where at least 1 is meant stands for the default, as the API server has it."""
    value = data.get(key)
    if value is None or (value == 0 and low == 1 and default):
        return default
    if not low <= value <= _MAX_SECONDS:
        raise InvalidInput(f"{value} is not from {low} to {_MAX_SECONDS}", where=f"{where}.{key}")
    return int(value)


def _hook(data: Object | None, ports: Sequence[Object], where: str) -> Action | None:
    return None if not data else _action(data, _HOOK_ACTIONS, ports, where)


def _action(data: Object, kinds: Sequence[str], ports: Sequence[Object], where: str) -> Action:
    given = [kind for kind in kinds if data.get(kind) is not None]
    if len(given) != 1:
        raise InvalidInput(f"give one of {', '.join(kinds)}, not {' and '.join(given) or 'none'}", where=where)
    kind = given[0]
    value, where = data[kind], f"{where}.{kind}"
    match kind:
        case "exec":
            if not value.get("command"):
                raise InvalidInput("required, and missing", where=f"{where}.command")
            return ExecAction(tuple(value["command"]))
        case "httpGet":
            return _http(value, ports, where)
        case "tcpSocket" if "sleep" not in kinds:
            return TcpAction(_port(value["port"], ports, f"{where}.port"), value.get("host") or "")
        case "sleep":
            if value["seconds"] < 0:
                raise InvalidInput(f"{value['seconds']} is less than 0", where=f"{where}.seconds")
            return SleepAction(int(value["seconds"]))
        case "tcpSocket":
            raise InvalidInput("not supported: Kubernetes never made TCP hooks work; use exec", where=where)
    service = value.get("service") or ""
    if len(service) > MAX_SERVICE or not service.isprintable():
        raise InvalidInput(f"{service[:60]!r} is too long, or has control characters", where=f"{where}.service")
    return GrpcAction(_port(value["port"], ports, f"{where}.port"), service)


def _http(data: Object, ports: Sequence[Object], where: str) -> HttpAction:
    scheme = (data.get("scheme") or "HTTP").upper()
    if scheme not in ("HTTP", "HTTPS"):
        raise InvalidInput(f"{scheme!r} is not one of HTTP, HTTPS", where=f"{where}.scheme")
    headers = tuple((h["name"], h.get("value") or "") for h in data.get("httpHeaders") or ())
    for i, (name, value) in enumerate(headers):
        if not name or ":" in name or any(c in name + value for c in "\r\n\0"):
            raise InvalidInput(f"{name!r} is no header, or its value has line ends", where=f"{where}.httpHeaders[{i}]")
    path = data.get("path") or "/"
    path = path if path.startswith("/") else f"/{path}"
    if any(c <= " " or c == "\x7f" for c in path):
        raise InvalidInput(f"{path!r} has blanks or control characters; quote them (%20)", where=f"{where}.path")
    port = _port(data["port"], ports, f"{where}.port")
    return HttpAction(port, path, data.get("host") or "", scheme == "HTTPS", headers)


def _port(value: int | str, ports: Sequence[Object], where: str) -> int:
    """A number, or the name of one of the container's ports."""
    if isinstance(value, str):
        named: dict[str, int] = {p["name"]: p["containerPort"] for p in ports if p.get("name")}
        if value in named:
            return named[value]
        if not value.isdigit():
            known = ", ".join(named) or "none"
            raise InvalidInput(f"the container has no port {value!r}; it has {known}", where=where)
    number = int(value)
    if not 1 <= number <= 65535:
        raise InvalidInput(f"{number} is no port: 1 to 65535", where=where)
    return number
