"""How many pods each ReplicaSet of a Deployment should have next. Pure.

At no time are there more than desired + maxSurge pods, nor fewer available ones than desired - maxUnavailable, as far
as the strategy can help it. Source: Kubernetes, "Deployments: Rolling Update Deployment" and "Proportional scaling".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hypervisor.kube import meta

DESIRED = "deployment.kubernetes.io/desired-replicas"
MAX_REPLICAS = "deployment.kubernetes.io/max-replicas"
Sizes = dict[str, int]
"""By ReplicaSet's name: the replicas to be asked for, where they differ from what is asked for now."""


@dataclass(frozen=True)
class Bounds:
    """How many pods there should be, may be at most, and may be unavailable."""

    desired: int
    surge: int
    unavailable: int

    @property
    def most(self) -> int:
        """Pods at any time."""
        return self.desired + self.surge

    @property
    def least(self) -> int:
        """Available pods at any time."""
        return max(0, self.desired - self.unavailable)


def bounds(deployment: Mapping[str, Any]) -> Bounds:
    """A Deployment's, percentages resolved (surge rounded up, unavailable down; not both 0)."""
    desired = int(meta.get(deployment, "spec", "replicas", default=1))
    strategy = meta.get(deployment, "spec", "strategy", default={})
    if strategy.get("type") == "Recreate":
        return Bounds(desired, 0, desired)
    rolling = strategy.get("rollingUpdate") or {}
    surge = resolve(rolling.get("maxSurge", "25%"), desired, up=True)
    unavailable = min(resolve(rolling.get("maxUnavailable", "25%"), desired, up=False), desired)
    if surge == 0 and unavailable == 0:
        unavailable = 1
    return Bounds(desired, surge, unavailable)


def resolve(value: int | str, total: int, *, up: bool) -> int:
    """An ``IntOrString``: a number, or a percentage of `total`."""
    if isinstance(value, str) and value.endswith("%"):
        share = int(value[:-1]) * total / 100
        return math.ceil(share) if up else math.floor(share)
    return int(value)


def by_age(obj: Mapping[str, Any]) -> tuple[str, str]:
    """Sorts the oldest first."""
    return str(meta.get(obj, "metadata", "creationTimestamp", default="")), str(meta.get(obj, "metadata", "name"))


def asked(rs: Mapping[str, Any]) -> int:
    """Replicas that it is asked to have."""
    return int(meta.get(rs, "spec", "replicas", default=1))


def available(rs: Mapping[str, Any]) -> int:
    """Pods of it that are available."""
    return int(meta.get(rs, "status", "availableReplicas", default=0))


def running(rs: Mapping[str, Any]) -> int:
    """Pods of it that are there."""
    return int(meta.get(rs, "status", "replicas", default=0))


def name_of(rs: Mapping[str, Any]) -> str:
    """Its name."""
    return str(rs["metadata"]["name"])


def new_set_size(limits: Bounds, others: Sequence[Mapping[str, Any]], recreate: bool) -> int:
    """Replicas for a ReplicaSet that is about to be made."""
    if recreate:
        return 0 if any(running(o) or asked(o) for o in others) else limits.desired
    room = limits.most - sum(asked(o) for o in others)
    return max(0, min(room, limits.desired))


def rolling_step(limits: Bounds, new: Mapping[str, Any], old: Sequence[Mapping[str, Any]]) -> Sizes:
    """The next step of a rolling update: the new one up as far as the surge allows, else old ones down."""
    total = asked(new) + sum(map(asked, old))
    if asked(new) > limits.desired:
        return {name_of(new): limits.desired}
    if asked(new) < limits.desired and total < limits.most:
        return {name_of(new): asked(new) + min(limits.most - total, limits.desired - asked(new))}
    return _shrink_old(limits, new, old, total)


def _shrink_old(limits: Bounds, new: Mapping[str, Any], old: Sequence[Mapping[str, Any]], total: int) -> Sizes:
    # What the new one was asked for and has not made available yet must be covered by old ones.
    unavailable_new = asked(new) - available(new)
    most_down = total - limits.least - unavailable_new
    sizes: Sizes = {}
    if most_down <= 0:
        return sizes
    left = most_down
    for rs in sorted(old, key=by_age):  # pods that do not answer anyway go first
        broken = min(asked(rs) - available(rs), left)
        if asked(rs) and broken > 0:
            sizes[name_of(rs)] = asked(rs) - broken
            left -= broken
    spare = available(new) + sum(map(available, old)) - limits.least
    for rs in sorted(old, key=by_age):
        now = sizes.get(name_of(rs), asked(rs))
        down = min(now, max(0, min(spare, left)))
        if down > 0:
            sizes[name_of(rs)] = now - down
            spare, left = spare - down, left - down
    return sizes


def recreate_step(limits: Bounds, new: Mapping[str, Any] | None, old: Sequence[Mapping[str, Any]]) -> Sizes:
    """All old ones to nothing; the new one when the last old pod has gone."""
    sizes = {name_of(rs): 0 for rs in old if asked(rs)}
    if not sizes and new is not None and not any(map(running, old)) and asked(new) != limits.desired:
        sizes[name_of(new)] = limits.desired
    return sizes


def resized(limits: Bounds, sets: Sequence[Mapping[str, Any]]) -> bool:
    """The Deployment's size was changed since its active ReplicaSets were last told."""
    told = {
        meta.get(s, "metadata", "annotations", DESIRED)
        for s in sets
        if asked(s) and meta.get(s, "metadata", "annotations", DESIRED) is not None
    }
    return any(text != str(limits.desired) for text in told)


def proportional(limits: Bounds, sets: Sequence[Mapping[str, Any]]) -> Sizes:
    """A change of size in mid-rollout, or while it is paused: each active ReplicaSet gets its share of it."""
    active = [s for s in sets if asked(s)]
    if len(active) <= 1:
        target = active or list(sets)[-1:]
        return {name_of(s): limits.desired for s in target if asked(s) != limits.desired}
    total = sum(map(asked, active))
    allowed = limits.most if limits.desired else 0
    delta = allowed - total
    sizes: Sizes = {}
    left = delta
    for rs in sorted(active, key=lambda s: (-asked(s), by_age(s))):
        share = _share(rs, limits, delta, left)
        if share:
            sizes[name_of(rs)] = max(0, asked(rs) + share)
        left -= share
    if left:
        largest = max(active, key=asked)
        name = name_of(largest)
        sizes[name] = max(0, sizes.get(name, asked(largest)) + left)
    return {n: v for n, v in sizes.items() if v != next(asked(s) for s in active if name_of(s) == n)}


def _share(rs: Mapping[str, Any], limits: Bounds, delta: int, left: int) -> int:
    before = str(meta.get(rs, "metadata", "annotations", MAX_REPLICAS, default="0"))
    total = int(before) if before.isdigit() and int(before) else limits.most or 1
    share = round(asked(rs) * limits.most / total) - asked(rs)
    return min(share, left) if delta > 0 else max(share, left)
