"""What objects count for in quotas, and whether a quota is about them. Source: Kubernetes, "Resource Quotas"."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from hypervisor.kube import meta
from hypervisor.kube.quantity import format_bytes, format_cpu_millis
from hypervisor.kube.resources import PODS, SERVICES, Resource
from hypervisor.master.scheduler.requests import Amounts, amount, pod_limit, pod_request

Object = Mapping[str, Any]
_PLAIN = frozenset(
    ("configmaps", "persistentvolumeclaims", "replicationcontrollers", "resourcequotas", "secrets", "services")
)
"""Kinds that a quota may name without ``count/``."""
_COMPUTE = ("cpu", "memory", "ephemeral-storage")
_ENDED = ("Succeeded", "Failed")


def usage_of(resource: Resource, obj: Object) -> Amounts:
    """What one object counts for."""
    found: Amounts = {f"count/{resource.qualified}": 1}
    if resource == PODS:
        return found | _pod(obj)
    if resource.qualified in _PLAIN:
        found[resource.plural] = 1
    if resource == SERVICES:
        kind = meta.get(obj, "spec", "type", default="ClusterIP")
        ports = meta.get(obj, "spec", "ports", default=())
        found["services.loadbalancers"] = int(kind == "LoadBalancer")
        found["services.nodeports"] = sum(1 for p in ports if p.get("nodePort")) if kind != "ClusterIP" else 0
    return found


def _pod(pod: Object) -> Amounts:
    if meta.get(pod, "status", "phase", default="") in _ENDED:
        return {}
    asked, most = pod_request(pod), pod_limit(pod)
    found = {"pods": 1}
    for name in {*asked, *most} - {"pods"}:
        found[f"requests.{name}"] = asked.get(name, 0)
        found[f"limits.{name}"] = most.get(name, 0)
    return found | {name: asked[name] for name in _COMPUTE if name in asked}


def unsaid(hard: Iterable[str], pod: Object) -> list[str]:
    """What a quota limits and containers of a pod do not say, which they must."""
    found = []
    for key in sorted(hard):
        prefix, _, name = key.rpartition(".")
        if name not in ("cpu", "memory") or prefix not in ("", "limits", "requests"):
            continue
        field = "limits" if prefix == "limits" else "requests"
        containers = meta.get(pod, "spec", "containers", default=())
        lacking = [str(c.get("name")) for c in containers if not meta.get(c, "resources", field, name)]
        found += [f"{key} for: {','.join(lacking)}"] if lacking else []
    return found


def concerns(quota: Object, resource: Resource, obj: Object) -> bool:
    """Whether its scopes take in an object; quotas with scopes are about pods alone."""
    scopes = list(meta.get(quota, "spec", "scopes", default=()))
    selectors = list(meta.get(quota, "spec", "scopeSelector", "matchExpressions", default=()))
    if not scopes and not selectors:
        return True
    if resource != PODS:
        return False
    return all(_in_scope(s, obj) for s in scopes) and all(_selected(s, obj) for s in selectors)


def _in_scope(scope: str, pod: Object) -> bool:
    ends = meta.get(pod, "spec", "activeDeadlineSeconds") is not None
    best_effort = not any(
        meta.get(c, "resources", f) for c in pod["spec"]["containers"] for f in ("limits", "requests")
    )
    answers = {
        "Terminating": ends,
        "NotTerminating": not ends,
        "BestEffort": best_effort,
        "NotBestEffort": not best_effort,
        "PriorityClass": bool(meta.get(pod, "spec", "priorityClassName")),
    }
    return answers.get(scope, False)


def _selected(rule: Object, pod: Object) -> bool:
    name, how = str(rule.get("scopeName")), rule.get("operator")
    if name != "PriorityClass":
        return _in_scope(name, pod)
    value = meta.get(pod, "spec", "priorityClassName", default="")
    if how in ("In", "NotIn"):
        return bool((value in (rule.get("values") or ())) == (how == "In"))
    return bool(value) == (how == "Exists")


def hard_of(quota: Object) -> Amounts:
    """What it allows."""
    return {
        key: amount(key.rpartition(".")[2], value) for key, value in meta.get(quota, "spec", "hard", default={}).items()
    }


def shown(key: str, count: int) -> str:
    """An amount as a quantity."""
    name = key.rpartition(".")[2]
    if name == "cpu":
        return format_cpu_millis(count)
    return format_bytes(count) if name in ("memory", "ephemeral-storage") else str(count)
