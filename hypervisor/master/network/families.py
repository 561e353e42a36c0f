"""Which IP versions a Service has, from what its author said and what the cluster has.

Source: Kubernetes, "IPv4/IPv6 dual-stack" (Services).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from ipaddress import ip_address
from typing import Any

from hypervisor.kube.errors import Cause
from hypervisor.master.kinds import rules
from hypervisor.master.network.ranges import family_of

Spec = dict[str, Any]
NONE = "None"
FIELDS = ("clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy")
POLICIES = ("PreferDualStack", "RequireDualStack", "SingleStack")
_OTHER = {"IPv4": "IPv6", "IPv6": "IPv4"}


def has_address(spec: Mapping[str, Any]) -> bool:
    """Its type is one that has an address in the cluster (or says that it wants none)."""
    return str(spec.get("type", "ClusterIP")) != "ExternalName"


def normalize(spec: Spec) -> list[Cause]:
    """Brings ``clusterIP`` and ``clusterIPs`` together, in place; what is wrong with them."""
    one, several = spec.get("clusterIP") or "", spec.get("clusterIPs") or []
    if not one and several:
        return [rules.invalid("spec.clusterIPs", several, "must be empty when `clusterIP` is not specified")]
    if one and not several:
        spec["clusterIPs"] = several = [one]
    if not one:
        spec.pop("clusterIPs", None)
        return []
    if several[0] != one:
        return [rules.invalid("spec.clusterIPs", several, "first value must match `clusterIP`")]
    return _well_formed(several)


def _well_formed(addresses: Sequence[str]) -> list[Cause]:
    if addresses[0] == NONE:
        why = "must be a single value when `clusterIP` is 'None'"
        return [rules.invalid("spec.clusterIPs", addresses, why)] if len(addresses) > 1 else []
    for index, address in enumerate(addresses):
        try:
            ip_address(address)
        except ValueError:
            why = "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)"
            return [rules.invalid(f"spec.clusterIPs[{index}]", address, why)]
    if len(addresses) > 2 or len({family_of(a) for a in addresses}) != len(addresses):
        why = "may only hold up to 2 values, one of each IP family"
        return [rules.invalid("spec.clusterIPs", addresses, why)]
    return []


def choose(spec: Spec, before: Mapping[str, Any], cluster: Sequence[str]) -> list[Cause]:
    """Completes ``ipFamilies`` and ``ipFamilyPolicy``, in place; what is wrong with them.

    :param spec: normalized
    :param before: as it is stored; empty for a new one
    :param cluster: the cluster's own, the usual one first
    """
    addresses = [a for a in spec.get("clusterIPs") or () if a != NONE]
    families = list(spec.get("ipFamilies") or ())
    policy = spec.get("ipFamilyPolicy") or _policy(spec, addresses, families)
    causes = _wrong(families, policy, addresses)
    if causes:
        return causes
    headless = spec.get("clusterIP") == NONE
    free = headless and not spec.get("selector")  # its endpoints are somebody else's business, of whatever version
    for address in addresses[len(families) :]:
        families.append(family_of(address))
    if not families:
        families = [cluster[0]]
    unknown = [f for f in families if f not in cluster]
    if unknown and not free:
        index = families.index(unknown[0])
        return [rules.invalid(f"spec.ipFamilies[{index}]", unknown[0], "not configured on this cluster")]
    if policy != "SingleStack" and len(families) == 1:
        families += [f for f in (_OTHER[families[0]],) if f in cluster or free]
    if policy == "RequireDualStack" and len(families) < 2:
        return [rules.invalid("spec.ipFamilyPolicy", policy, "Cluster is not configured for dual-stack services")]
    if policy == "SingleStack" and len(families) > 1:
        if before.get("ipFamilyPolicy") in (None, "SingleStack"):
            return [rules.invalid("spec.ipFamilies", families, "may only hold one value with SingleStack")]
        families, addresses = families[:1], addresses[:1]  # from two versions back to one
        if addresses:
            spec["clusterIPs"] = addresses
    spec["ipFamilies"], spec["ipFamilyPolicy"] = families, policy
    return []


def _policy(spec: Mapping[str, Any], addresses: Sequence[str], families: Sequence[str]) -> str:
    free = spec.get("clusterIP") == NONE and not spec.get("selector")
    return "RequireDualStack" if len(addresses) == 2 or len(families) == 2 or free else "SingleStack"


def _wrong(families: Sequence[str], policy: str, addresses: Sequence[str]) -> list[Cause]:
    if policy not in POLICIES:
        return [rules.unsupported("spec.ipFamilyPolicy", policy, POLICIES)]
    for index, family in enumerate(families):
        if family not in _OTHER:
            return [rules.unsupported(f"spec.ipFamilies[{index}]", family, sorted(_OTHER))]
        if index < len(addresses) and family_of(addresses[index]) != family:
            why = f"expected an {family} value as indicated by `ipFamilies[{index}]`"
            return [rules.invalid(f"spec.clusterIPs[{index}]", addresses[index], why)]
    if len(set(families)) != len(families):
        return [rules.duplicate(f"spec.ipFamilies[{len(families) - 1}]", families[-1])]
    return []
