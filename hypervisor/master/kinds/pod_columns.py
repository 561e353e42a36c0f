"""The columns of a Pod: READY, STATUS and RESTARTS are computed from container states as upstream's printer does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from hypervisor.master.kinds.cells import AGE, NAME, NONE, View, dig, field, human, instant, wide
from hypervisor.master.kinds.kind import Column


@dataclass(slots=True)
class _Summary:
    """What the container statuses of a pod add up to."""

    reason: str
    ready: int = 0
    total: int = 0
    restarts: int = 0
    sidecar_restarts: int = 0
    last: datetime | None = None
    sidecar_last: datetime | None = None


def _sidecar(container: Mapping[str, Any] | None) -> bool:
    return bool(container) and dict(container or {}).get("restartPolicy") == "Always"


def _later(one: datetime | None, other: datetime | None) -> datetime | None:
    return max((t for t in (one, other) if t), default=None)


def _terminated(state: Mapping[str, Any]) -> str:
    """The reason of a container's end: its own, or made of its signal or exit code."""
    if state.get("reason"):
        return str(state["reason"])
    if state.get("signal"):
        return f"Signal:{state['signal']}"
    return f"ExitCode:{state.get('exitCode', 0)}"


def _last_end(status: Mapping[str, Any]) -> datetime | None:
    return instant(dig(status, "lastState.terminated.finishedAt"))


def _summarize(pod: View) -> _Summary:
    spec, status = pod.get("spec", {}), pod.get("status", {})
    summary = _Summary(str(status.get("reason") or status.get("phase") or ""), total=len(spec.get("containers", ())))
    if any(c.get("type") == "PodScheduled" and c.get("reason") == "SchedulingGated" for c in _conditions(pod)):
        summary.reason = "SchedulingGated"
    initializing = _init_containers(summary, spec, status)
    if not initializing or _condition(pod, "Initialized"):
        _containers(summary, pod)
    _deleted(summary, pod)
    return summary


def _init_containers(summary: _Summary, spec: Mapping[str, Any], status: Mapping[str, Any]) -> bool:
    """Counts init containers and finds the one that is not done; whether there is one."""
    listed = {container.get("name"): container for container in spec.get("initContainers", ())}
    summary.total += sum(map(_sidecar, listed.values()))
    for place, state in enumerate(status.get("initContainerStatuses", ())):
        sidecar = _sidecar(listed.get(state.get("name")))
        summary.restarts += state.get("restartCount", 0)
        summary.last = _later(summary.last, _last_end(state))
        if sidecar:
            summary.sidecar_restarts += state.get("restartCount", 0)
            summary.sidecar_last = _later(summary.sidecar_last, _last_end(state))
        if dig(state, "state.terminated") is not None and dig(state, "state.terminated.exitCode", 0) == 0:
            continue
        if sidecar and state.get("started"):
            summary.ready += bool(state.get("ready"))
            continue
        summary.reason = _init_reason(state, place, len(listed))
        return True
    return False


def _init_reason(state: Mapping[str, Any], place: int, total: int) -> str:
    ended = dig(state, "state.terminated")
    if ended is not None:
        return f"Init:{_terminated(ended)}"
    waiting = dig(state, "state.waiting.reason", "")
    return f"Init:{waiting}" if waiting and waiting != "PodInitializing" else f"Init:{place}/{total}"


def _containers(summary: _Summary, pod: View) -> None:
    # Restarts of plain init containers are of no interest any more: only sidecars' go on counting.
    summary.restarts, summary.last = summary.sidecar_restarts, summary.sidecar_last
    running = False
    for state in reversed(pod.get("status", {}).get("containerStatuses", ())):
        summary.restarts += state.get("restartCount", 0)
        summary.last = _later(summary.last, _last_end(state))
        ended = dig(state, "state.terminated")
        if dig(state, "state.waiting.reason"):
            summary.reason = state["state"]["waiting"]["reason"]
        elif ended is not None:
            summary.reason = _terminated(ended)
        elif state.get("ready") and dig(state, "state.running") is not None:
            running = True
            summary.ready += 1
    if summary.reason == "Completed" and running:
        summary.reason = "Running" if _condition(pod, "Ready") else "NotReady"


def _deleted(summary: _Summary, pod: View) -> None:
    if not dig(pod, "metadata.deletionTimestamp"):
        return
    if dig(pod, "status.reason") == "NodeLost":
        summary.reason = "Unknown"
    elif dig(pod, "status.phase") not in ("Failed", "Succeeded"):
        summary.reason = "Terminating"


def _conditions(pod: View) -> list[Mapping[str, Any]]:
    return list(dig(pod, "status.conditions", ()))


def _condition(pod: View, name: str) -> bool:
    return any(c.get("type") == name and c.get("status") == "True" for c in _conditions(pod))


def status(pod: View) -> str:
    """The STATUS cell: ``Running``, ``Init:0/1``, ``CrashLoopBackOff``, ``Terminating``, ``Completed``, ..."""
    return _summarize(pod).reason


def ready(pod: View) -> str:
    """The READY cell: how many of the containers are."""
    summary = _summarize(pod)
    return f"{summary.ready}/{summary.total}"


def restarts(pod: View) -> str:
    """The RESTARTS cell, with the time since the last one."""
    summary = _summarize(pod)
    if not summary.restarts or summary.last is None:
        return str(summary.restarts)
    return f"{summary.restarts} ({human((datetime.now(UTC) - summary.last).total_seconds())} ago)"


def _address(pod: View) -> str:
    addresses = dig(pod, "status.podIPs", ())
    return str((addresses[0].get("ip") if addresses else dig(pod, "status.podIP")) or NONE)


def _gates(pod: View) -> str:
    gates = dig(pod, "spec.readinessGates", ())
    passed = sum(_condition(pod, gate.get("conditionType", "")) for gate in gates)
    return f"{passed}/{len(gates)}" if gates else NONE


POD = (
    NAME,
    Column("Ready", ready, description="The aggregate readiness state of this pod for accepting traffic."),
    Column("Status", status, description="The aggregate status of the containers in this pod."),
    Column("Restarts", restarts, description="How often the containers in this pod were restarted."),
    AGE,
    wide("IP", _address),
    wide("Node", field("spec.nodeName", NONE)),
    wide("Nominated Node", field("status.nominatedNodeName", NONE)),
    wide("Readiness Gates", _gates),
)
