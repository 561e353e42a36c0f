"""The expressions that the packet filter's rules are made of, as libnftables' JSON has them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hypervisor.net.addresses import Subnet
from hypervisor.net.table import Expression

ADDRESS_TYPE = {4: "ipv4_addr", 6: "ipv6_addr"}
DPORT: Expression = {"payload": {"protocol": "th", "field": "dport"}}
L4: Expression = {"meta": {"key": "l4proto"}}
IIFNAME: Expression = {"meta": {"key": "iifname"}}
OIFNAME: Expression = {"meta": {"key": "oifname"}}
ACCEPT: Expression = {"accept": None}
DROP: Expression = {"drop": None}
COUNTER: Expression = {"counter": None}
REJECT: Expression = {"reject": {"type": "icmpx", "expr": "port-unreachable"}}


def family_of(version: int) -> str:
    """``ip`` or ``ip6``."""
    return "ip" if version == 4 else "ip6"


def saddr(version: int) -> Expression:
    """A packet's source."""
    return {"payload": {"protocol": family_of(version), "field": "saddr"}}


def daddr(version: int) -> Expression:
    """A packet's destination."""
    return {"payload": {"protocol": family_of(version), "field": "daddr"}}


def concat(*parts: Expression) -> Expression:
    """Several fields as one key."""
    return {"concat": list(parts)}


def match(left: Expression, right: Any, op: str = "==") -> Expression:
    """A condition."""
    return {"match": {"op": op, "left": left, "right": right}}


def one_of(left: Expression, values: Iterable[Any], op: str = "==") -> Expression:
    """A condition on several values; a set of one is no set to nft."""
    listed = list(values)
    return match(left, listed[0] if len(listed) == 1 else {"set": listed}, op)


def vmap(key: Expression, name: str) -> Expression:
    """On to the chain that a map has for the key."""
    return {"vmap": {"key": key, "data": f"@{name}"}}


def prefix(network: Subnet) -> Expression:
    """A range of addresses."""
    return {"prefix": {"addr": str(network.network_address), "len": network.prefixlen}}


def from_taps(taps: str) -> Expression:
    """From one of the links whose names begin so."""
    return match(IIFNAME, f"{taps}*")


ESTABLISHED = match({"ct": {"key": "state"}}, ["established", "related"], "in")
TRANSLATED = match({"ct": {"key": "status"}}, "dnat", "in")
LOCAL = match({"fib": {"result": "type", "flags": ["daddr"]}}, "local")
PING = match(L4, {"set": ["icmp", "ipv6-icmp"]})


def of_family(version: int) -> Expression:
    """Packets of IPv4 or IPv6."""
    return match({"meta": {"key": "nfproto"}}, f"ipv{version}")
