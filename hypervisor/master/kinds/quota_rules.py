"""What ResourceQuotas and LimitRanges must be. Source: Kubernetes API reference; wording as upstream's validation."""

from __future__ import annotations

from typing import Any

from hypervisor.errors import InvalidInput
from hypervisor.kube.quantity import parse_quantity
from hypervisor.master.kinds.kind import Object
from hypervisor.master.kinds.rules import Causes, View, duplicate, forbidden, invalid, one_of, required, unsupported

_SCOPES = ("BestEffort", "NotBestEffort", "NotTerminating", "PriorityClass", "Terminating")
_TYPES = ("Container", "PersistentVolumeClaim", "Pod")


def _amounts(path: str, listed: Any) -> Causes:
    for name, value in (listed or {}).items():
        try:
            parse_quantity(value)
        except InvalidInput as error:
            yield invalid(f"{path}[{name}]", value, str(error))


def resource_quota(obj: View) -> Causes:
    """A ResourceQuota."""
    spec = obj.get("spec") or {}
    yield from _amounts("spec.hard", spec.get("hard"))
    for index, scope in enumerate(spec.get("scopes") or ()):
        if scope not in _SCOPES:
            yield unsupported(f"spec.scopes[{index}]", scope, _SCOPES)
    for index, rule in enumerate((spec.get("scopeSelector") or {}).get("matchExpressions") or ()):
        path = f"spec.scopeSelector.matchExpressions[{index}]"
        yield from one_of(f"{path}.scopeName", rule.get("scopeName"), _SCOPES)
        yield from one_of(f"{path}.operator", rule.get("operator"), ("DoesNotExist", "Exists", "In", "NotIn"))
        if rule.get("operator") in ("In", "NotIn") and not rule.get("values"):
            yield required(f"{path}.values", "must be at least one value when `operator` is 'In' or 'NotIn'")


def limit_range_defaults(obj: Object) -> None:
    """A container's maximum is its limit unasked, and that its request."""
    for row in (obj.get("spec") or {}).get("limits") or ():
        if row.get("type") != "Container":
            continue
        most, least = row.get("max") or {}, row.get("min") or {}
        limits = {**most, **(row.get("default") or {})}
        if limits:
            row["default"] = limits
        requests = {**limits, **least, **(row.get("defaultRequest") or {})}
        if requests:
            row["defaultRequest"] = requests


def limit_range(obj: View) -> Causes:
    """A LimitRange."""
    seen: set[str] = set()
    for index, row in enumerate((obj.get("spec") or {}).get("limits") or ()):
        path, kind = f"spec.limits[{index}]", str(row.get("type") or "")
        yield from one_of(f"{path}.type", kind, _TYPES)
        if kind in seen:
            yield duplicate(f"{path}.type", kind)
        seen.add(kind)
        for name in ("min", "max", "default", "defaultRequest", "maxLimitRequestRatio"):
            yield from _amounts(f"{path}.{name}", row.get(name))
        if kind == "Pod":
            for name in ("default", "defaultRequest"):
                if row.get(name):
                    yield forbidden(f"{path}.{name}", "may not be specified when `type` is 'Pod'")
        yield from _ordered(path, row)


def _ordered(path: str, row: View) -> Causes:
    """min <= defaultRequest <= default <= max, as far as they are given."""
    for low, high in (("min", "max"), ("min", "default"), ("default", "max"), ("defaultRequest", "default")):
        for name, value in (row.get(low) or {}).items():
            other = (row.get(high) or {}).get(name)
            try:
                wrong = other is not None and parse_quantity(value) > parse_quantity(other)
            except InvalidInput:
                continue  # told already
            if wrong:
                why = f"{low} value {value} is greater than {high} value {other}"
                yield invalid(f"{path}.{low}[{name}]", value, why)
