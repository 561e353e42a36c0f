"""What NetworkPolicies must be. Source: Kubernetes API reference; wording as upstream's validation."""

from __future__ import annotations

import ipaddress
import re
from typing import Any

from hypervisor.master.kinds.kind import Object
from hypervisor.master.kinds.rules import Causes, View, forbidden, invalid, label_selector, one_of, required

_PROTOCOLS = ("SCTP", "TCP", "UDP")
_PORT_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_PORT_NAME_MAX = 15


def network_policy_defaults(obj: Object) -> None:
    """Ports are TCP's; a policy is about ingress always, and about egress where it has rules for that."""
    spec = obj.get("spec") or {}
    for direction in ("ingress", "egress"):
        for rule in spec.get(direction) or ():
            for port in rule.get("ports") or ():
                port.setdefault("protocol", "TCP")
    if not spec.get("policyTypes"):
        spec["policyTypes"] = ["Ingress", "Egress"] if spec.get("egress") else ["Ingress"]


def network_policy(obj: View) -> Causes:
    """A NetworkPolicy."""
    spec = obj.get("spec") or {}
    yield from label_selector("spec.podSelector", spec.get("podSelector"))
    for direction, side in (("ingress", "from"), ("egress", "to")):
        for index, rule in enumerate(spec.get(direction) or ()):
            path = f"spec.{direction}[{index}]"
            for number, port in enumerate(rule.get("ports") or ()):
                yield from _port(f"{path}.ports[{number}]", port)
            for number, peer in enumerate(rule.get(side) or ()):
                yield from _peer(f"{path}.{side}[{number}]", peer)
    types = spec.get("policyTypes") or ()
    if len(types) > 2:
        yield invalid("spec.policyTypes", types, "may not specify more than two policyTypes")
        return
    for index, kind in enumerate(types):
        yield from one_of(f"spec.policyTypes[{index}]", kind, ("Egress", "Ingress"))


def _port(path: str, port: View) -> Causes:
    yield from one_of(f"{path}.protocol", port.get("protocol"), _PROTOCOLS)
    first, last = port.get("port"), port.get("endPort")
    if isinstance(first, int):
        if not 1 <= first <= 65535:
            yield invalid(f"{path}.port", first, "must be between 1 and 65535, inclusive")
        if last is not None and last < first:
            yield invalid(f"{path}.endPort", last, "must be greater than or equal to `port`")
        if last is not None and not 1 <= last <= 65535:
            yield invalid(f"{path}.endPort", last, "must be between 1 and 65535, inclusive")
        return
    if last is not None:
        yield _stray_end(path, last, first)
    if first is not None and (why := _port_name_error(str(first))):
        yield invalid(f"{path}.port", first, why)


def _stray_end(path: str, last: Any, first: Any) -> Any:
    if first is None:
        return required(f"{path}.port", "must be specified when `endPort` is specified")
    return invalid(f"{path}.endPort", last, "may not be specified when `port` is non-numeric")


def _port_name_error(name: str) -> str | None:
    if len(name) > _PORT_NAME_MAX:
        return f"must be no more than {_PORT_NAME_MAX} characters"
    if not _PORT_NAME.fullmatch(name) or "--" in name:
        return "must contain only alpha-numeric characters (a-z, 0-9), and hyphens (-)"
    return None if any(char.isalpha() for char in name) else "must contain at least one letter (a-z)"


def _peer(path: str, peer: View) -> Causes:
    selectors = [name for name in ("podSelector", "namespaceSelector") if peer.get(name) is not None]
    for name in selectors:
        yield from label_selector(f"{path}.{name}", peer[name])
    block = peer.get("ipBlock")
    if block is None:
        if not selectors:
            yield required(path, "must specify a peer")
        return
    if selectors:
        yield forbidden(path, "may not specify both ipBlock and another peer")
    yield from _block(f"{path}.ipBlock", block)


def _block(path: str, block: View) -> Causes:
    if not block.get("cidr"):
        yield required(f"{path}.cidr")
        return
    outer = _network(str(block["cidr"]))
    if outer is None:
        yield invalid(f"{path}.cidr", block["cidr"], "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)")
    for index, text in enumerate(block.get("except") or ()):
        inner, here = _network(str(text)), f"{path}.except[{index}]"
        if inner is None:
            yield invalid(here, text, "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)")
        elif outer is not None and not _strictly_within(inner, outer):
            yield invalid(here, text, "must be a strict subset of `cidr`")


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    try:
        return ipaddress.ip_network(text, strict=False) if "/" in text else None
    except ValueError:
        return None


def _strictly_within(inner: Any, outer: Any) -> bool:
    return bool(inner.version == outer.version and inner != outer and inner.subnet_of(outer))
