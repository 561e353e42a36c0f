"""Limits of pods' bandwidth, on the tap, outside of the guest: what is too much is dropped, and senders slow down."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from hypervisor.net.expressions import DROP, IIFNAME, OIFNAME, vmap
from hypervisor.net.table import Chain, Expression, Hook, Key, Set

BURST = 64 * 1024
"""Beside what a second may bring, which the kernel always lets through at once: a full-sized segment must fit."""


@dataclass(frozen=True)
class Limits:
    """Bytes a second; 0: no limit.

    :ivar incoming: to the pod
    :ivar outgoing: from the pod
    """

    incoming: int = 0
    outgoing: int = 0


UNLIMITED = Limits()
_SIDES = (("in", OIFNAME, Hook("filter", "postrouting", 90)), ("out", IIFNAME, Hook("filter", "prerouting", -290)))


def limit_sets(limits: Mapping[str, Limits]) -> Iterator[tuple[str, Set]]:
    """The maps from a tap to its chain.

    :param limits: by tap
    """
    for side, _, _ in _SIDES:
        limited: dict[Key, str | None] = {(tap,): _chain(side, tap) for tap, own in limits.items() if _rate(own, side)}
        yield f"speed-{side}", Set(("ifname",), limited, verdicts=True)


def limit_chains(limits: Mapping[str, Limits]) -> Iterator[tuple[str, Chain]]:
    """A chain for each limited tap and direction, and those that lead there."""
    for side, tap_of, hook in _SIDES:
        yield f"speeds-{side}", Chain(((vmap(tap_of, f"speed-{side}"),),), hook)
        for tap, own in limits.items():
            if rate := _rate(own, side):
                yield _chain(side, tap), Chain(((_over(rate), DROP),))


def _rate(limits: Limits, side: str) -> int:
    return limits.incoming if side == "in" else limits.outgoing


def _chain(side: str, tap: str) -> str:
    return f"speed-{side}-{tap}"


def _over(rate: int) -> Expression:
    units = {"rate_unit": "bytes", "per": "second", "burst": BURST, "burst_unit": "bytes"}
    return {"limit": {"rate": rate, **units, "inv": True}}
