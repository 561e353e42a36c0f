"""Pods, as the network knows them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hypervisor.net.addresses import Address
from hypervisor.net.limits import UNLIMITED, Limits
from hypervisor.net.services import HostPort


@dataclass(frozen=True)
class PodFacts:
    """What the network must know of a pod.

    :ivar labels: with its namespace what selectors of policies look at
    :ivar host_ports: ports of the host that lead to it
    :ivar limits: of its bandwidth
    """

    namespace: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    host_ports: tuple[HostPort, ...] = ()
    limits: Limits = UNLIMITED


@dataclass(frozen=True)
class ConnectedPod:
    """A pod of this host that has a tap."""

    uid: str
    tap: str
    mac: str
    addresses: tuple[Address, ...]
    facts: PodFacts
