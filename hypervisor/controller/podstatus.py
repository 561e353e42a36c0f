"""A pod as clients see it: the ``v1`` Pod object with its status, and the phase that container states add up to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from hypervisor.controller.eviction import EVICTED
from hypervisor.controller.manifest import TIMING_ANNOTATION
from hypervisor.controller.record import NS, ContainerRecord, Phase, PodRecord, Running, State, Terminated, Waiting
from hypervisor.controller.spec import ContainerSpec, PodSpec, Resources, RestartPolicy

PENDING_INIT = "PodInitializing"
"""Why containers of a pod with init containers wait that have not run yet, as kubelets say it."""


def rfc3339(seconds: float) -> str:
    """A time in seconds since the epoch as Kubernetes writes it."""
    return datetime.fromtimestamp(int(seconds), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def phase_of(record: PodRecord, policy: RestartPolicy) -> Phase:
    """The phase that the containers' states add up to, by the kubelet's rules."""
    if not record.initialized:
        own = [c.state for c in record.init_containers if not c.sidecar]
        failed = any(isinstance(state, Terminated) and not state.succeeded for state in own)
        if failed and any(c.sidecar and isinstance(c.state, Running) for c in record.init_containers):
            return "Pending"  # sidecars are yet to be ended
        return "Failed" if failed and policy == "Never" else "Pending"
    states = [c.state for c in record.containers]
    if any(isinstance(c.state, Waiting) and c.last is None for c in record.containers):
        return "Pending"
    if any(isinstance(state, Running) for state in states) or policy == "Always":
        return "Running"
    if any(c.sidecar and isinstance(c.state, Running) for c in record.init_containers):
        return "Running"  # it is about to be ended
    ended = [state for state in states if isinstance(state, Terminated)]
    if len(ended) < len(states):
        return "Running"  # one waits for its back-off to end
    if all(state.succeeded for state in ended):
        return "Succeeded"
    return "Failed" if policy == "Never" else "Running"


def pod_object(
    manifest: Mapping[str, Any], spec: PodSpec, uid: str, created: float, record: PodRecord
) -> dict[str, Any]:
    """The ``v1`` Pod: the manifest as it was given, what a server adds to it, and the status."""
    metadata = dict(manifest.get("metadata") or {})
    annotations = dict(metadata.get("annotations") or {})
    annotations.pop(TIMING_ANNOTATION, None)
    if record.timing:
        annotations[TIMING_ANNOTATION] = json.dumps(record.timing)
    metadata |= {"name": spec.name, "namespace": spec.namespace, "uid": uid, "creationTimestamp": rfc3339(created)}
    if annotations:
        metadata["annotations"] = annotations
    if record.intent.kind == "delete":
        metadata["deletionTimestamp"] = rfc3339(record.intent.at + record.intent.grace_s)
        metadata["deletionGracePeriodSeconds"] = int(record.intent.grace_s)
    shown = dict(manifest.get("spec") or {})
    shown.setdefault("restartPolicy", spec.restart_policy)
    shown.setdefault("terminationGracePeriodSeconds", spec.grace_s)
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": metadata,
        "spec": shown,
        "status": _status(spec, created, record),
    }


def _status(spec: PodSpec, created: float, record: PodRecord) -> dict[str, Any]:
    status: dict[str, Any] = {
        "phase": record.phase,
        "conditions": _conditions(record, created),
        "startTime": rfc3339(created),
        "hostIP": spec.host_address,
        "hostIPs": [{"ip": spec.host_address}],
        "qosClass": qos_class(spec),
        "containerStatuses": [_container(spec, spec.container(c.name), c) for c in record.containers],
    }
    if record.init_containers:
        status["initContainerStatuses"] = [_container(spec, spec.container(c.name), c) for c in record.init_containers]
    addresses = spec.network.addresses
    if record.vm_up and addresses:
        status |= {"podIP": addresses[0], "podIPs": [{"ip": address} for address in addresses]}
    if record.reason:
        status["reason"] = record.reason
    if record.message:
        status["message"] = record.message
    return status


def qos_class(spec: PodSpec) -> str:
    """Kubernetes' class of a pod by its requests and limits; here only shown, since nothing is ever evicted."""
    resources = [c.resources for c in (*spec.init_containers, *spec.containers)]
    if all(r == Resources(disk_limit=r.disk_limit) for r in resources):
        return "BestEffort"

    def guaranteed(r: Resources) -> bool:
        cpu = r.cpu_limit_millis is not None and r.cpu_request_millis in (None, r.cpu_limit_millis)
        return cpu and r.memory_limit is not None and r.memory_request in (None, r.memory_limit)

    return "Guaranteed" if all(map(guaranteed, resources)) else "Burstable"


def _conditions(record: PodRecord, created: float) -> list[dict[str, Any]]:
    done = "PodCompleted" if record.phase == "Succeeded" else "ContainersNotReady"
    return [
        _condition("PodReadyToStartContainers", record.vm_up, "VmNotReady", record.vm_up_at or created),
        _condition("Initialized", record.initialized, "ContainersNotInitialized", created)
        | ({"reason": done} if record.phase == "Succeeded" else {}),
        _condition("Ready", record.ready, done, record.ready_at or created),
        _condition("ContainersReady", record.ready, done, record.ready_at or created),
        _condition("PodScheduled", True, "", created),
        *([_evicted(record, created)] if record.reason == EVICTED else []),
    ]


def _evicted(record: PodRecord, created: float) -> dict[str, Any]:
    condition = _condition("DisruptionTarget", True, "", record.intent.at or created)
    return condition | {"reason": "TerminationByKubelet", "message": record.message}


def _condition(kind: str, met: bool, why_not: str, since: float) -> dict[str, Any]:
    condition = {"type": kind, "status": "True" if met else "False", "lastTransitionTime": rfc3339(since)}
    return condition if met or not why_not else condition | {"reason": why_not}


def _container(pod: PodSpec, spec: ContainerSpec, record: ContainerRecord) -> dict[str, Any]:
    init = any(c.name == record.name and not c.sidecar for c in pod.init_containers)
    return {
        "name": record.name,
        "image": spec.image,
        "imageID": f"sha256:{record.image_id}" if record.image_id else "",
        "ready": record.ready or (init and isinstance(record.state, Terminated) and record.state.succeeded),
        "started": record.started,
        "restartCount": record.restarts,
        "state": _state(record.state, initializing=bool(pod.init_containers)),
        "lastState": _state(record.last) if record.last else {},
    }


def _state(state: State, *, initializing: bool = False) -> dict[str, Any]:
    match state:
        case Waiting(reason, message):
            reason = PENDING_INIT if initializing and reason == Waiting().reason else reason
            return {"waiting": {"reason": reason} | ({"message": message} if message else {})}
        case Running(started_ns):
            return {"running": {"startedAt": rfc3339(started_ns / NS)}}
        case Terminated():
            ended: dict[str, Any] = {"exitCode": state.exit_code, "reason": state.reason}
            ended |= {"message": state.message} if state.message else {}
            ended |= {"signal": state.signal} if state.signal else {}
            ended |= {"startedAt": rfc3339(state.started_ns / NS)} if state.started_ns else {}
            return {
                "terminated": ended | ({"finishedAt": rfc3339(state.finished_ns / NS)} if state.finished_ns else {})
            }
