"""LimitRanger: what containers of a namespace get unasked, and what they may ask for.

Source: Kubernetes, "Limit Ranges".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from hypervisor.kube import meta
from hypervisor.kube.errors import forbidden
from hypervisor.kube.resources import LIMIT_RANGES, PODS
from hypervisor.master.admission.plugin import AdmissionRequest, Object, Operation
from hypervisor.master.auth.views import ObjectView
from hypervisor.master.scheduler.requests import amount, pod_limit, pod_request


class LimitRanger:
    """Completes pods, then checks them."""

    operations: frozenset[Operation] = frozenset(("CREATE",))
    plurals = frozenset((PODS.qualified,))

    def __init__(self, view: ObjectView) -> None:
        self._view = view

    async def admit(self, request: AdmissionRequest) -> None:
        """:raises ApiError: Forbidden: with all that is out of range"""
        if request.subresource:
            return
        ranges = list(self._view.list(LIMIT_RANGES, request.namespace))
        rows = [row for r in ranges for row in meta.get(r, "spec", "limits", default=())]
        spec = request.object["spec"]
        for row in (row for row in rows if row.get("type") == "Container"):
            for key in ("containers", "initContainers"):
                for container in spec.get(key) or ():
                    _complete(container, row)
        wrong = [why for row in rows for why in _wrong(request.object, row)]
        if wrong:
            text = wrong[0] if len(wrong) == 1 else f"[{', '.join(wrong)}]"
            raise forbidden("", PODS.plural, request.name, text)


def _complete(container: Object, row: Mapping[str, Any]) -> None:
    resources = container.setdefault("resources", {})
    given = {**(resources.get("limits") or {}), **(resources.get("requests") or {})}
    requests = {**row.get("default", {}), **row.get("defaultRequest", {})}
    for field, defaults in (("limits", row.get("default") or {}), ("requests", requests)):
        for name, value in defaults.items():
            known = resources.get(field) or {}
            if name not in known and not (field == "requests" and name in given):
                resources.setdefault(field, {})[name] = value


def _wrong(pod: Object, row: Mapping[str, Any]) -> Iterator[str]:
    kind = row.get("type")
    if kind == "Container":
        for key in ("containers", "initContainers"):
            for container in pod["spec"].get(key) or ():
                resources = container.get("resources") or {}
                asked, most = (_amounts(resources.get(f) or {}) for f in ("requests", "limits"))
                yield from _checked("Container", row, asked, most)
    elif kind == "Pod":
        yield from _checked("Pod", row, pod_request(pod), pod_limit(pod))


def _amounts(listed: Mapping[str, Any]) -> dict[str, int]:
    return {name: amount(name, value) for name, value in listed.items()}


def _checked(what: str, row: Mapping[str, Any], asked: Mapping[str, int], most: Mapping[str, int]) -> Iterator[str]:
    for name, value in (row.get("min") or {}).items():
        yield from _below(what, name, value, asked)
    for name, value in (row.get("max") or {}).items():
        limit = amount(name, value)
        if name not in most:
            yield f"maximum {name} usage per {what} is {value}. No limit is specified"
        elif max(most[name], asked.get(name, 0)) > limit:
            yield f"maximum {name} usage per {what} is {value}, but limit is more"
    for name, value in (row.get("maxLimitRequestRatio") or {}).items():
        if name not in most or not asked.get(name):
            yield f"{name} max limit to request ratio per {what} is {value}, but no request or limit is specified"
        elif most[name] > asked[name] * amount("", value):
            yield f"{name} max limit to request ratio per {what} is {value}, but provided ratio is more"


def _below(what: str, name: str, value: Any, asked: Mapping[str, int]) -> Iterable[str]:
    if name not in asked:
        yield f"minimum {name} usage per {what} is {value}. No request is specified"
    elif asked[name] < amount(name, value):
        yield f"minimum {name} usage per {what} is {value}, but request is less"
