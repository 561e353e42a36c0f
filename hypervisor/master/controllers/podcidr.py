"""Each node's part of the cluster's pod addresses: ``spec.podCIDR`` and ``spec.podCIDRs``.

A node keeps its part as long as its Node object is there; a part is free again when that is gone. One turn at a time
chooses, from a list that has every acknowledged write, so that no two nodes can get parts that overlap.
Source: Kubernetes, "Nodes" (node controller, CIDR assignment).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from ipaddress import ip_network
from typing import Any

from hypervisor.kube import meta
from hypervisor.kube.meta import Key
from hypervisor.kube.resources import NODES
from hypervisor.master.controllers.base import Context, own_key, unless_gone
from hypervisor.master.network.ranges import Network, free_subnet

AGAIN_S = 60.0
"""Seconds until it is tried again when no part is left."""


class PodCidrController:
    """Gives a part to each Node that has none."""

    name = "podcidr"

    def __init__(self, context: Context, networks: Sequence[Network]) -> None:
        self._context = context
        self._networks = tuple(networks)
        self._one_at_a_time = asyncio.Lock()
        self.watches = {NODES: own_key}

    async def sync(self, key: Key) -> float | None:
        """One turn for one Node."""
        node = self._context.cached(NODES, *key)
        if not self._networks or node is None or meta.is_deleting(node) or cidrs_of(node):
            return None
        async with self._one_at_a_time:
            return await self._give(key[1])

    async def _give(self, name: str) -> float | None:
        nodes = (await self._context.client.list(NODES)).items
        node = next((n for n in nodes if meta.key_of(n)[1] == name), None)
        if node is None or cidrs_of(node):
            return None
        taken = [network for other in nodes for network in _networks(other)]
        parts = [str(p) for n in self._networks if (p := free_subnet(n, taken)) is not None]
        if len(parts) < len(self._networks):
            why = f"no part of {', '.join(map(str, self._networks))} is left for the node's pods"
            self._context.events.record(node, "Warning", "CIDRNotAvailable", why)
            return AGAIN_S
        body = {
            "metadata": {"resourceVersion": meta.version_of(node)},
            "spec": {"podCIDR": parts[0], "podCIDRs": parts},
        }
        done = await unless_gone(self._context.client.patch(NODES, name, None, body))
        return None if done is not None else 0.1


def cidrs_of(node: Mapping[str, Any]) -> Sequence[str]:
    """A Node's parts, as it says."""
    spec = node.get("spec") or {}
    return tuple(spec.get("podCIDRs") or ([spec["podCIDR"]] if spec.get("podCIDR") else ()))


def _networks(node: Mapping[str, Any]) -> Iterator[Network]:
    for text in cidrs_of(node):
        try:
            yield ip_network(text, strict=False)
        except ValueError:
            continue  # somebody wrote nonsense into the Node: it takes no addresses
