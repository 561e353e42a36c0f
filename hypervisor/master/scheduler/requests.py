"""What a pod takes of a node, and what a node has to give.

A pod's request is, for each resource, the larger of its containers' sum and its largest init container's (sidecars,
init containers that restart always, count with the containers), and its overhead: what its VM takes beside them.
Source: Kubernetes, "Init Containers: Resource sharing within containers" and "Pod Overhead".
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from typing import Any

from hypervisor.errors import InvalidInput
from hypervisor.kube.quantity import parse_quantity

Amounts = dict[str, int]
"""By resource name: cpu in thousandths, all others in their own unit (bytes, pieces)."""

OVERHEAD_ANNOTATION = "podvisor.dev/pod-overhead-memory"
"""On a Node: memory that each pod's VM takes beside its containers."""
IMPLIED_CPU = 100
IMPLIED_MEMORY = 128 * 1024 * 1024
"""What a container that requests nothing is taken to use, for scores alone (upstream takes 100m and 200 MB)."""


@functools.lru_cache(maxsize=4096)
def _exact(value: object) -> Fraction:
    return parse_quantity(value)


def amount(resource: str, value: object) -> int:
    """A quantity as `Amounts` count it, rounded up; one that cannot be read counts nothing."""
    try:
        exact = _exact(value)
    except InvalidInput:
        return 0
    return _up(exact * 1000 if resource == "cpu" else exact)


def _up(value: Fraction) -> int:
    return -(-value.numerator // value.denominator)


def amounts(listed: Mapping[str, Any] | None) -> Amounts:
    """A ``ResourceList``."""
    return {name: amount(name, value) for name, value in (listed or {}).items()}


def add(into: Amounts, more: Mapping[str, int], sign: int = 1) -> None:
    """Adds (or, with `sign` -1, takes away) in place."""
    for name, value in more.items():
        into[name] = into.get(name, 0) + sign * value


def largest(into: Amounts, other: Mapping[str, int]) -> None:
    """Raises each amount to the other's where that is more, in place."""
    for name, value in other.items():
        into[name] = max(into.get(name, 0), value)


def pod_request(pod: Mapping[str, Any]) -> Amounts:
    """What `pod` asks for, with the overhead in its spec; ``pods`` is 1."""
    return _total(pod, _requests) | {"pods": 1}


def pod_limit(pod: Mapping[str, Any]) -> Amounts:
    """What `pod` may use at most, as far as its containers say, with the overhead."""
    return _total(pod, lambda container: amounts((container.get("resources") or {}).get("limits")))


def _total(pod: Mapping[str, Any], of: Callable[[Mapping[str, Any]], Amounts]) -> Amounts:
    spec = pod["spec"]
    total: Amounts = {}
    for container in spec.get("containers", ()):
        add(total, of(container))
    largest_init: Amounts = {}
    sidecars: Amounts = {}
    for container in spec.get("initContainers") or ():
        if container.get("restartPolicy") == "Always":
            add(sidecars, of(container))
            largest(largest_init, sidecars)
        else:
            peak = dict(sidecars)
            add(peak, of(container))
            largest(largest_init, peak)
    add(total, sidecars)
    largest(total, largest_init)
    add(total, amounts(spec.get("overhead")))
    return total


def _requests(container: Mapping[str, Any]) -> Amounts:
    resources = container.get("resources") or {}
    return amounts(resources.get("limits")) | amounts(resources.get("requests"))


def scored_request(pod: Mapping[str, Any]) -> Amounts:
    """What scores count: something for containers that request nothing, or they would all pile up on one node."""
    request = pod_request(pod)
    containers = len(pod["spec"].get("containers", ()))
    request["cpu"] = request.get("cpu") or IMPLIED_CPU * containers
    request["memory"] = request.get("memory") or IMPLIED_MEMORY * containers
    return request


def host_ports(pods: Iterable[Mapping[str, Any]]) -> set[tuple[str, str, int]]:
    """(protocol, address, port) of the host that containers of `pods` want; the address empty for all."""
    found = set()
    for pod in pods:
        for container in pod["spec"].get("containers", ()):
            for port in container.get("ports") or ():
                if port.get("hostPort"):
                    address = port.get("hostIP") or ""
                    found.add(
                        (port.get("protocol") or "TCP", "" if address == "0.0.0.0" else address, port["hostPort"])
                    )
    return found
