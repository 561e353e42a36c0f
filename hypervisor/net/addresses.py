"""Addresses of pods: each host gives out those of its own part of the cluster's range."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from itertools import chain

from hypervisor.errors import InvalidInput, ResourceExhausted

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Subnet = ipaddress.IPv4Network | ipaddress.IPv6Network

GATEWAY4 = ipaddress.IPv4Address("169.254.1.1")
GATEWAY6 = ipaddress.IPv6Address("fe80::1")
HOST_MAC = "ee:ee:ee:ee:ee:ee"
"""The host's end of every tap: guests have it as a fixed neighbour."""
LONGEST_PREFIX = {4: 30, 6: 126}
"""Fewer addresses than that are no use: the first and the last of a range are never given out."""


def parse_cidr(text: str, *, where: str = "podCIDR") -> Subnet:
    """A range of addresses. Raises `InvalidInput`."""
    try:
        network = ipaddress.ip_network(text)
    except ValueError as error:
        raise InvalidInput(f"{text!r} is no range of addresses, as 10.88.0.0/24: {error}", where=where) from error
    if network.prefixlen > LONGEST_PREFIX[network.version]:
        raise InvalidInput(f"{network} has too few addresses for a host's pods", where=where)
    return network


class Pool:
    """The addresses of one range, and which of them are taken. Not thread-safe; nothing in it blocks.

    Addresses are given out in turn, not the lowest first: one that was just freed is the last to be used again, so that
    a peer which has not noticed yet does not talk to another pod.
    """

    def __init__(self, network: Subnet, taken: Iterable[Address] = ()) -> None:
        self.network = network
        self._taken: set[int] = {int(address) for address in taken if address in network}
        self._next = int(network.network_address) + 1
        self._last = int(network.broadcast_address) - 1

    def allocate(self) -> Address:
        """The next free address. Raises `ResourceExhausted` when all are taken."""
        first = int(self.network.network_address) + 1
        for candidate in chain(range(self._next, self._last + 1), range(first, self._next)):
            if candidate not in self._taken:
                return self._take(candidate)
        count = self._last - first + 1
        raise ResourceExhausted(f"all {count} addresses of {self.network} are taken by pods of this host")

    def _take(self, number: int) -> Address:
        self._taken.add(number)
        self._next = number + 1
        return ipaddress.ip_address(number) if self.network.version == 4 else ipaddress.IPv6Address(number)

    def reserve(self, address: Address) -> None:
        """Takes one that a pod has already. Raises `InvalidInput` when it is another range's or taken twice."""
        if address not in self.network:
            raise InvalidInput(f"{address} is not of this host's range {self.network}")
        if int(address) in self._taken:
            raise InvalidInput(f"{address} is given to two pods")
        self._taken.add(int(address))

    def free(self, address: Address) -> None:
        """Gives one back; harmless for one that is free."""
        self._taken.discard(int(address))

    def __len__(self) -> int:
        """How many are taken."""
        return len(self._taken)
