"""The ranges that a cluster's addresses come from, and how a free one is found in them.

Source: Kubernetes, "Service ClusterIP allocation" and "Service" (node ports): a range's lower end is left to those who
name their address themselves, as long as there is another one.
"""

from __future__ import annotations

import secrets
from collections.abc import Container, Iterable
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import TypeAlias

from hypervisor.errors import InvalidInput

Network: TypeAlias = IPv4Network | IPv6Network
SERVICE_CIDRS = "10.96.0.0/16"
POD_CIDRS = "10.244.0.0/16"
NODE_PORTS = "30000-32767"
NODE_MASKS = {4: 24, 6: 64}
"""Bits of the prefix of a node's part of the cluster's pod addresses, by IP version."""
_LARGEST = 1 << 20
"""Addresses of a service range that are used: of a /64 nobody will miss the rest."""
_TRIES = 32


@dataclass(frozen=True, slots=True)
class Ranges:
    """:ivar services: one, or one of each IP version; the first one's version is what Services get unasked
    :ivar pods: likewise, of which each node gets a part (`NODE_MASKS`)
    """

    services: tuple[Network, ...]
    pods: tuple[Network, ...]
    node_ports: range

    @classmethod
    def parse(cls, services: str = SERVICE_CIDRS, pods: str = POD_CIDRS, node_ports: str = NODE_PORTS) -> Ranges:
        """From what a user writes: ``10.96.0.0/16,fd00:10:96::/112``, ``30000-32767``.

        :raises InvalidInput: naming the option, what is wrong with it and what it looks like
        """
        made = cls(_networks("service-cidr", services), _networks("pod-cidr", pods), _ports(node_ports))
        for network in made.pods:
            if network.prefixlen > NODE_MASKS[network.version]:
                raise InvalidInput(
                    f"{network} has no room for a node's part; its prefix may have {NODE_MASKS[network.version]} "
                    "bits at most",
                    where="pod-cidr",
                )
        clash = [(a, b) for a in made.services for b in made.pods if a.version == b.version and a.overlaps(b)]
        if clash:
            raise InvalidInput(f"{clash[0][0]} and {clash[0][1]} overlap; choose others", where="service-cidr")
        return made


def _networks(where: str, text: str) -> tuple[Network, ...]:
    try:
        found = tuple(ip_network(part.strip()) for part in text.split(","))
    except ValueError as error:
        raise InvalidInput(
            f"{error}; write it as 10.96.0.0/16 or 10.96.0.0/16,fd00:10:96::/112", where=where
        ) from error
    if len({n.version for n in found}) != len(found):
        raise InvalidInput("name one network, or one of IPv4 and one of IPv6", where=where)
    small = [n for n in found if n.num_addresses < 4]
    if small:
        raise InvalidInput(f"{small[0]} is too small", where=where)
    return found


def _ports(text: str) -> range:
    first, dash, last = text.partition("-")
    if dash and first.isdigit() and last.isdigit() and 0 < int(first) <= int(last) < 65536:
        return range(int(first), int(last) + 1)
    raise InvalidInput(f"{text!r} is no range of ports; write it as {NODE_PORTS}", where="node-ports")


def usable(network: Network) -> range:
    """Numbers of the addresses in a range that may be given away: not the first, nor IPv4's broadcast address."""
    size = min(network.num_addresses, _LARGEST)
    return range(1, size - 1 if network.version == 4 and size == network.num_addresses else size)


def first_address(network: Network) -> str:
    """The one that the API server's own Service has."""
    return str(network[1])


def free_address(network: Network, taken: Container[object]) -> str | None:
    """One of those that nobody has; None: there is none."""
    numbers = usable(network)
    reserved = min(max(16, len(numbers) // 16), 256)
    for number in _candidates(numbers, reserved):
        address = str(network[number])
        if number != 1 and address not in taken:
            return address
    return None


def free_port(ports: range, taken: Container[object]) -> int | None:
    """One of those that nobody has; None: there is none."""
    reserved = min(max(16, len(ports) // 32), 128)
    return next((p for p in _candidates(ports, reserved) if p not in taken), None)


def _candidates(numbers: range, reserved: int) -> Iterable[int]:
    """Every number: first some at random above the reserved ones, then all above, then the reserved ones."""
    above = numbers[reserved:] if len(numbers) > 2 * reserved else numbers
    for _ in range(_TRIES):
        yield secrets.choice(above)
    yield from above
    yield from numbers[: reserved if above is not numbers else 0]


def canonical(address: str) -> str:
    """An address as objects carry it.

    :raises ValueError: it is none
    """
    return str(ip_address(address))


def family_of(address: str) -> str:
    """``IPv4`` or ``IPv6``.

    :raises ValueError: it is no address
    """
    return f"IPv{ip_address(address).version}"


def free_subnet(network: Network, taken: Iterable[Network]) -> Network | None:
    """A node's part of a network that overlaps none of `taken`; None: there is none."""
    bits = NODE_MASKS[network.version]
    step, base = 1 << (network.max_prefixlen - bits), int(network.network_address)
    busy = sorted((n for n in taken if n.version == network.version), key=lambda n: int(n.network_address))
    at = base
    for other in busy:
        low, high = int(other.network_address), int(other.broadcast_address)
        if high < at:
            continue
        if low >= at + step:
            break
        at += -(-(high + 1 - at) // step) * step
    if at + step > base + network.num_addresses:
        return None
    return ip_network((at, bits))
