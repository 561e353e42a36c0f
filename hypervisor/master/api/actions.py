"""What is posted below an object and makes something happen: binding, eviction, tokens. Without HTTP."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any

from hypervisor.kube import meta
from hypervisor.kube.client import Object
from hypervisor.kube.errors import ApiError, bad_request, conflict
from hypervisor.kube.resources import POD_DISRUPTION_BUDGETS
from hypervisor.kube.selectors import LabelSelector
from hypervisor.master.api import encode
from hypervisor.master.api.call import Call
from hypervisor.master.api.inside import Inside
from hypervisor.master.api.verbs import delete_options
from hypervisor.master.registry.registry import Registry

Action = Callable[[Inside, Call, Object], Awaitable[Mapping[str, Any]]]
_ENDED = frozenset(("Succeeded", "Failed"))
_RETRY_S = 10


async def bind(inside: Inside, call: Call, body: Object) -> Mapping[str, Any]:
    """Gives a pod its node, once: upstream's ``Binding``, annotations and labels taken over."""
    target = meta.get(body, "target", "name", default="")
    if not target or meta.get(body, "target", "kind", default="Node") not in ("", "Node"):
        raise bad_request("a Binding needs a target of kind Node with a name")
    wanted_uid = meta.get(body, "metadata", "uid", default="")

    def change(pod: Object) -> Object:
        if wanted_uid and wanted_uid != pod["metadata"]["uid"]:
            raise conflict("", "pods", call.name, "the uid in the Binding is not the pod's")
        _check_unbound(call, pod)
        pod["spec"]["nodeName"] = target
        extra = meta.get(body, "metadata", "annotations", default={})
        if extra:
            pod["metadata"]["annotations"] = {**pod["metadata"].get("annotations", {}), **extra}
        scheduled = {"type": "PodScheduled", "status": "True"}
        status = pod.setdefault("status", {})
        status["conditions"] = meta.with_condition(status.get("conditions", ()), scheduled)
        return pod

    await inside.objects.registry.update(call.kind, call.namespace, call.name, change, dry_run=call.dry_run)
    return encode.success(code=201)


def _check_unbound(call: Call, pod: Object) -> None:
    if meta.is_deleting(pod):
        raise conflict("", "pods", call.name, f"pod {call.name} is being deleted, cannot be assigned to a host")
    node = meta.get(pod, "spec", "nodeName", default="")
    if node:
        raise conflict("", "pods", call.name, f"pod {call.name} is already assigned to node {node!r}")
    if meta.get(pod, "spec", "schedulingGates"):
        raise conflict("", "pods", call.name, f"pod {call.name} has non-empty .spec.schedulingGates")


async def evict(inside: Inside, call: Call, body: Object) -> Mapping[str, Any]:
    """Deletes a pod if its disruption budgets allow it.

    :raises ApiError: TooManyRequests: not now
    """
    kind = body.get("kind", "Eviction")
    if kind != "Eviction":
        raise bad_request(f'the kind in the data ("{kind}") does not match the expected one ("Eviction")')
    registry = inside.objects.registry
    pod = await registry.get(call.kind, call.namespace, call.name)
    options = delete_options(dict(body.get("deleteOptions") or {}), dry=call.dry_run)
    if not _free_to_go(pod):
        await _spend(inside, registry, call, pod, dry_run=options.dry_run)
    await inside.objects.delete(replace(call, subresource=""), options)
    return encode.success(code=201)


def _free_to_go(pod: Mapping[str, Any]) -> bool:
    """A pod that has ended, is going or has no node yet disrupts nothing."""
    phase = meta.get(pod, "status", "phase")
    return phase in _ENDED or meta.is_deleting(pod) or not meta.get(pod, "spec", "nodeName")


async def _spend(inside: Inside, registry: Registry, call: Call, pod: Object, *, dry_run: bool) -> None:
    """Takes one of the budget's allowed disruptions, so that two evictions cannot have the same one."""
    budgets = inside.kinds.of(POD_DISRUPTION_BUDGETS)
    listing = await registry.list(budgets, call.namespace)
    fitting = [b for b in listing.items if LabelSelector.of(b["spec"].get("selector")).matches_object(pod)]
    if len(fitting) > 1:
        raise ApiError("InternalError", "this pod has more than one PodDisruptionBudget, which eviction does not allow")
    for budget in fitting:
        if not meta.is_true(pod, "Ready") and _unhealthy_may_go(budget):
            continue
        name = budget["metadata"]["name"]
        await registry.update(budgets, call.namespace, name, lambda b: _spent(b, call.name), dry_run=dry_run)


def _unhealthy_may_go(budget: Mapping[str, Any]) -> bool:
    if meta.get(budget, "spec", "unhealthyPodEvictionPolicy") == "AlwaysAllow":
        return True
    healthy = meta.get(budget, "status", "currentHealthy", default=0)
    desired = meta.get(budget, "status", "desiredHealthy", default=0)
    return bool(desired and healthy >= desired)


def _spent(budget: Object, pod: str) -> Object:
    status, name = budget.setdefault("status", {}), budget["metadata"]["name"]
    observed = status.get("observedGeneration", 0) >= budget["metadata"].get("generation", 0)
    allowed = int(status.get("disruptionsAllowed", 0))
    if not observed or allowed <= 0:
        healthy, desired = status.get("currentHealthy", 0), status.get("desiredHealthy", 0)
        cause = {
            "reason": "DisruptionBudget",
            "message": f"The disruption budget {name} needs {desired} healthy pods and has {healthy} currently",
        }
        raise ApiError(
            "TooManyRequests",
            "Cannot evict pod as it would violate the pod's disruption budget.",
            details={"causes": [cause], "retryAfterSeconds": 0 if observed else _RETRY_S},
        )
    status["disruptionsAllowed"] = allowed - 1
    status["disruptedPods"] = {**(status.get("disruptedPods") or {}), pod: meta.now()}
    return budget


async def issue_token(inside: Inside, call: Call, body: Object) -> Mapping[str, Any]:
    """A ``TokenRequest``."""
    kind = body.get("kind", "TokenRequest")
    if kind != "TokenRequest":
        raise bad_request(f'the kind in the data ("{kind}") does not match the expected one ("TokenRequest")')
    await inside.objects.admit_action(call, body)
    await inside.objects.registry.entry(call.kind, call.namespace, call.name)  # as new as this server's last answer
    return inside.tokens.request(call.namespace, call.name, body)


ACTIONS: Mapping[tuple[str, str], Action] = {
    ("pods", "binding"): bind,
    ("pods", "eviction"): evict,
    ("serviceaccounts", "token"): issue_token,
}
"""By kind and subresource."""
