"""What the API server is told of a pod: its status, the smallest patch that brings it up to date, and its Events.

Pure functions of what the host knows (`PodRecord`, `podstatus`) and of what the server has. Source: Kubernetes
documentation, "Pod Lifecycle".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hypervisor.controller.record import ContainerRecord, PodRecord, Running, Terminated, Waiting
from hypervisor.controller.spec import PodSpec
from hypervisor.kube.client import Object
from hypervisor.kube.events import EventType
from hypervisor.kube.meta import get, now

OWN_CONDITIONS = ("PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled")
_REASONS = {
    "ContainersNotReady": "containers with unready status",
    "ContainersNotInitialized": "containers with incomplete status",
}
_MERGED_BY_KEY = {"podIPs": "ip", "hostIPs": "ip"}
"""Lists that a strategic patch would merge, and that are meant to be replaced."""


# ---- status ----------------------------------------------------------------------------------------------------------


def status_of(
    view: Mapping[str, Any], uid: str, address: str, server: Mapping[str, Any], gates: Sequence[str] = ()
) -> Object:
    """``status`` of a pod of this host.

    :param view: the pod as the host shows it (`PodVm.view`)
    :param address: the node's
    :param server: the status that the server has: its transition times and others' conditions stay
    :param gates: others' conditions without which the pod is not Ready
    """
    status = dict(view["status"])
    status |= {"hostIP": address, "hostIPs": [{"ip": address}]}
    if get(server, "startTime"):
        status["startTime"] = server["startTime"]
    known = get(server, "conditions", default=())
    status["conditions"] = _conditions(status | {"conditions": _gated(status["conditions"], known, gates)}, known)
    for group in ("containerStatuses", "initContainerStatuses"):
        if group in status:
            status[group] = [_container(c, uid) for c in status[group]]
    return status


def _container(status: Mapping[str, Any], uid: str) -> Object:
    """With the id of the instance that runs, or ran last: its start time names it."""
    for state in (status["state"], status["lastState"]):
        began = next((s.get("startedAt") for s in state.values() if s.get("startedAt")), None)
        if began:
            return dict(status) | {"containerID": f"podvisor://{uid}/{status['name']}/{status['restartCount']}"}
    return dict(status)


def _gated(
    conditions: Sequence[Mapping[str, Any]], known: Sequence[Mapping[str, Any]], gates: Sequence[str]
) -> list[Mapping[str, Any]]:
    """A pod whose containers are ready is so only when all its gates are open."""
    said = {c["type"]: c.get("status") for c in known}
    closed = [
        f'the status of pod readiness gate "{g}" is not "True", but {said.get(g, "False")}'
        for g in gates
        if said.get(g) != "True"
    ]
    shut = {"status": "False", "reason": "ReadinessGatesNotReady", "message": "; ".join(closed)}
    return [dict(c) | shut if closed and c["type"] == "Ready" and c["status"] == "True" else c for c in conditions]


def _conditions(status: Mapping[str, Any], known: Sequence[Mapping[str, Any]]) -> list[Object]:
    before = {c["type"]: c for c in known}
    gone = status["phase"] in ("Succeeded", "Failed")
    unready = [c["name"] for c in status.get("containerStatuses", ()) if not c["ready"]]
    conditions = []
    for condition in status["conditions"]:
        new = dict(condition)
        if new["status"] != "True" and gone and new["type"] in ("Ready", "ContainersReady"):
            new["reason"] = "PodCompleted" if status["phase"] == "Succeeded" else "PodFailed"
        if new.get("reason") in _REASONS:
            new["message"] = f"{_REASONS[new['reason']]}: [{' '.join(unready)}]"
        old = before.get(new["type"])
        same = old is not None and old.get("status") == new["status"]
        new["lastTransitionTime"] = old["lastTransitionTime"] if same and old is not None else now()
        conditions.append(new)
    return conditions


def rejected(reason: str, message: str, server: Mapping[str, Any]) -> Object:
    """``status`` of a pod that this host does not take."""
    said = f"Pod was rejected: {message}"
    return {"phase": "Failed", "reason": reason, "message": said} | (
        {} if get(server, "startTime") else {"startTime": now()}
    )


def status_patch(wanted: Mapping[str, Any], sent: Mapping[str, Any], uid: str) -> Object | None:
    """A strategic patch of ``pods/status`` that makes `sent` `wanted`; None when nothing differs.

    Others' conditions are left alone. The uid is a precondition: another pod of that name is not touched.
    """
    change: Object = {key: value for key, value in wanted.items() if sent.get(key) != value}
    if "conditions" in change:
        before = {c["type"]: c for c in sent.get("conditions") or ()}
        differ = [c for c in change["conditions"] if before.get(c["type"]) != c]
        # Merged by type, field by field: what the old one had and the new one has not must be taken away by name.
        change["conditions"] = [dict.fromkeys(before.get(c["type"], {})) | c for c in differ]
        if not change["conditions"]:
            del change["conditions"]
    for key, merge_key in _MERGED_BY_KEY.items():
        stale = {i[merge_key] for i in sent.get(key) or ()} - {i[merge_key] for i in change.get(key, ())}
        if key in change and stale:
            change[key] = [*({"$patch": "delete", merge_key: value} for value in sorted(stale)), *change[key]]
    for key in ("reason", "message"):
        if key in sent and key not in wanted:
            change[key] = None
    return {"metadata": {"uid": uid}, "status": change} if change else None


# ---- events ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PodEvent:
    """One Event to be. `container` is empty for one of the pod as a whole."""

    kind: EventType
    reason: str
    message: str
    container: str = ""
    init: bool = False

    @property
    def field_path(self) -> str:
        """Of the container in the pod's spec, as ``ObjectReference`` has it."""
        group = "initContainers" if self.init else "containers"
        return f"spec.{group}{{{self.container}}}" if self.container else ""


def events_between(old: PodRecord, new: PodRecord, spec: PodSpec) -> Iterator[PodEvent]:
    """What to say of the change from one record to a later one; states between the two are not known."""
    before = {c.name: c for c in (*old.init_containers, *old.containers)}
    init = {c.name for c in new.init_containers}
    for container in (*new.init_containers, *new.containers):
        was = before.get(container.name, ContainerRecord(container.name))
        for kind, reason, message in _container_events(was, container, new, spec):
            yield PodEvent(kind, reason, message, container.name, container.name in init)
    if new.reason and new.reason != old.reason and new.reason not in ("Stopped",):
        yield PodEvent("Warning", new.reason, new.message)


def _container_events(
    was: ContainerRecord, now_: ContainerRecord, record: PodRecord, spec: PodSpec
) -> Iterator[tuple[EventType, str, str]]:
    image = spec.container(now_.name).image
    match now_.state:
        case Running() if now_.state != was.state:
            yield "Normal", "Created", f"Created container: {now_.name}"
            yield "Normal", "Started", f"Started container {now_.name}"
        case Waiting(reason, message) if now_.state != was.state:
            yield from _waiting_events(now_, reason, message, image)
        case Terminated() if now_.state != was.state and now_.state.reason == "StartError":
            yield "Warning", "Failed", f"Error: {now_.state.message}"
    if record.intent.kind != "run" and isinstance(was.state, Running) and not isinstance(now_.state, Running):
        yield "Normal", "Killing", f"Stopping container {now_.name}"


def _waiting_events(
    container: ContainerRecord, reason: str, message: str, image: str
) -> Iterator[tuple[EventType, str, str]]:
    match reason:
        case "CrashLoopBackOff":
            yield "Warning", "BackOff", f"Back-off restarting failed container {container.name}"
        case "ImagePullBackOff":
            cause = message.partition(f" to pull image {image}: ")[2] or message  # the same each time: it is counted
            yield "Warning", "Failed", f'Failed to pull image "{image}": {cause}'
            yield "Warning", "Failed", "Error: ErrImagePull"
            yield "Normal", "BackOff", f'Back-off pulling image "{image}"'
            yield "Warning", "Failed", "Error: ImagePullBackOff"
        case "InvalidImageName":
            yield "Warning", "InspectFailed", f'Failed to apply default image tag "{image}": {message}'
        case "ErrImageNeverPull" | "CreateContainerConfigError":
            yield "Warning", "Failed" if reason[0] == "C" else reason, f"Error: {message}"
