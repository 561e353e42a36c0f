"""What the commands read out of v1 Pod objects. Missing fields are nothing unusual: a pod fills up as it starts."""

from __future__ import annotations

from typing import Any

Pod = dict[str, Any]


def name_of(pod: Pod) -> str:
    """How the user names it: without the namespace where that is the default one."""
    metadata = pod.get("metadata") or {}
    namespace = metadata.get("namespace") or "default"
    return str(metadata.get("name")) if namespace == "default" else f"{namespace}/{metadata.get('name')}"


def containers(pod: Pod) -> list[dict[str, Any]]:
    """The containers of its spec."""
    return list((pod.get("spec") or {}).get("containers") or ())


def statuses(pod: Pod) -> list[dict[str, Any]]:
    """Their statuses, as far as there are any."""
    return list((pod.get("status") or {}).get("containerStatuses") or ())


def container_status(pod: Pod, name: str) -> dict[str, Any]:
    """The status of one container; empty before it has one."""
    return next((s for s in statuses(pod) if s.get("name") == name), {})


def state(status: dict[str, Any], kind: str) -> dict[str, Any] | None:
    """The details of a container's state if it is ``waiting``, ``running`` or ``terminated``."""
    found = (status.get("state") or {}).get(kind)
    return found if isinstance(found, dict) else None


def restarts(pod: Pod) -> int:
    """Restarts of all its containers."""
    return sum(int(s.get("restartCount") or 0) for s in statuses(pod))


def describe(pod: Pod) -> str:
    """One or two words on how it fares: a reason if there is one, how it exited, else its phase."""
    if (pod.get("metadata") or {}).get("deletionTimestamp"):
        return "Terminating"
    for status in statuses(pod):
        waiting = state(status, "waiting")
        if waiting and waiting.get("reason"):
            return str(waiting["reason"])
    ended = [t for s in statuses(pod) if (t := state(s, "terminated")) is not None]
    if ended and len(ended) == len(containers(pod)):
        return _describe_exit(next((t for t in ended if t.get("exitCode")), ended[0]))
    status = pod.get("status") or {}
    return str(status.get("reason") or status.get("phase") or "Unknown")


def _describe_exit(ended: dict[str, Any]) -> str:
    reason = str(ended.get("reason") or "")
    word = "Exited" if reason in ("", "Completed", "Error") else reason
    return f"{word} ({ended.get('exitCode', '?')})"


def failure(pod: Pod, container: str) -> str | None:
    """Why the pod or this container cannot run, in a user's words; None while it still may."""
    waiting = state(container_status(pod, container), "waiting") or {}
    reason = str(waiting.get("reason") or "")
    if reason.startswith("Err") or reason.endswith(("Error", "BackOff", "InvalidImageName")):
        return _join(reason, waiting.get("message"))
    status = pod.get("status") or {}
    if status.get("phase") == "Failed" and state(container_status(pod, container), "terminated") is None:
        return _join(str(status.get("reason") or "Failed"), status.get("message"))
    return None


def _join(reason: str, message: object) -> str:
    return f"{reason}: {message}" if message else reason
