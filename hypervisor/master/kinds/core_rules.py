"""What must hold of kinds that run nothing: configuration, services, rights, nodes, leases, signing requests.

Source: Kubernetes API reference; wording as upstream's validation.
"""

from __future__ import annotations

import base64
import ipaddress
from collections.abc import Mapping
from typing import Any

from hypervisor.kube.selectors import label_key_error, label_value_error
from hypervisor.master.kinds.container_rules import PROTOCOLS, port_number, resource_list
from hypervisor.master.kinds.rules import (
    Causes,
    View,
    at_least,
    between,
    config_key,
    dns_label,
    dns_subdomain,
    duplicate,
    forbidden,
    invalid,
    labels,
    named,
    one_of,
    path_segment,
    required,
    too_long,
    unchanged,
    unsupported,
)

DATA_MAX = 1024 * 1024
RBAC = "rbac.authorization.k8s.io"
_IMMUTABLE = "field is immutable when `immutable` is set"
# What a secret of a type must have in its data.
SECRET_KEYS = {
    "kubernetes.io/dockercfg": (".dockercfg",),
    "kubernetes.io/dockerconfigjson": (".dockerconfigjson",),
    "kubernetes.io/ssh-auth": ("ssh-privatekey",),
    "kubernetes.io/tls": ("tls.crt", "tls.key"),
}

# ---- configuration ---------------------------------------------------------------------------------------------------


def config_map(obj: View) -> Causes:
    """A ConfigMap."""
    data, binary = obj.get("data") or {}, obj.get("binaryData") or {}
    yield from _keys("data", data)
    yield from _keys("binaryData", binary)
    for key in data.keys() & binary.keys():
        yield invalid(f"data[{key}]", key, "duplicate of key present in binaryData")
    if sum(len(value.encode()) for value in data.values()) + _decoded(binary) > DATA_MAX:
        yield too_long("", DATA_MAX)


def _keys(path: str, data: Mapping[str, Any]) -> Causes:
    for key in data:
        if why := config_key(key):
            yield invalid(f"{path}[{key}]", key, why)


def _decoded(data: Mapping[str, str]) -> int:
    return sum(len(value) * 3 // 4 - value[-2:].count("=") for value in data.values())


def secret(obj: View) -> Causes:
    """A Secret."""
    data = obj.get("data") or {}
    yield from _keys("data", data)
    if _decoded(data) > DATA_MAX:
        yield too_long("data", DATA_MAX)
    kind = str(obj.get("type") or "")
    for key in SECRET_KEYS.get(kind, ()):
        if key not in data:
            yield required(f"data[{key}]")
    if kind == "kubernetes.io/basic-auth" and not {"username", "password"} & data.keys():
        yield required("data[username]")
        yield required("data[password]")
    if kind == "kubernetes.io/service-account-token":
        annotations = (obj.get("metadata") or {}).get("annotations") or {}
        if not annotations.get("kubernetes.io/service-account.name"):
            yield required("metadata.annotations[kubernetes.io/service-account.name]")


def config_update(new: View, old: View) -> Causes:
    """A ConfigMap or Secret that was declared immutable is."""
    if not old.get("immutable"):
        return
    if not new.get("immutable"):
        yield forbidden("immutable", _IMMUTABLE)
    for name in ("data", "binaryData"):
        if (new.get(name) or {}) != (old.get(name) or {}):
            yield forbidden(name, _IMMUTABLE)


def secret_update(new: View, old: View) -> Causes:
    """A Secret keeps its type."""
    yield from unchanged("type", new.get("type"), old.get("type"))
    yield from config_update(new, old)


# ---- nodes, namespaces, leases, events -------------------------------------------------------------------------------


def node(obj: View) -> Causes:
    """A Node."""
    spec, seen = obj.get("spec") or {}, set()
    for index, taint in enumerate(spec.get("taints") or ()):
        here, key = f"spec.taints[{index}]", str(taint.get("key") or "")
        if why := label_key_error(key):
            yield invalid(f"{here}.key", key, why)
        if taint.get("value") and (why := label_value_error(taint["value"])):
            yield invalid(f"{here}.value", taint["value"], why)
        yield from one_of(f"{here}.effect", taint.get("effect"), ("NoSchedule", "PreferNoSchedule", "NoExecute"))
        if (key, taint.get("effect")) in seen:
            yield duplicate(here, dict(taint))
        seen.add((key, taint.get("effect")))
    status = obj.get("status") or {}
    for name in ("capacity", "allocatable"):
        yield from resource_list(f"status.{name}", status.get(name) or {})


def node_update(new: View, old: View) -> Causes:
    """A Node keeps the address range and provider that it was once given."""
    for name in ("podCIDR", "providerID"):
        was, now = (old.get("spec") or {}).get(name), (new.get("spec") or {}).get(name)
        if was and now != was:
            yield forbidden(f"spec.{name}", "node updates may not change " + name + ' except from "" to valid')


def lease(obj: View) -> Causes:
    """A Lease."""
    spec = obj.get("spec") or {}
    duration = spec.get("leaseDurationSeconds")
    if isinstance(duration, int) and duration <= 0:
        yield invalid("spec.leaseDurationSeconds", duration, "must be greater than 0")
    yield from at_least("spec.leaseTransitions", spec.get("leaseTransitions"))


def event(obj: View) -> Causes:
    """An Event: it is in the namespace of what it is about, or in ``default`` when that has none."""
    namespace = (obj.get("metadata") or {}).get("namespace", "")
    about = (obj.get("involvedObject") or {}).get("namespace", "")
    if (about and about != namespace) or (not about and namespace not in ("", "default", "kube-system")):
        yield invalid("involvedObject.namespace", about, "does not match event.namespace")


def priority_class(obj: View) -> Causes:
    """A PriorityClass: the highest values are the system's."""
    name, value = (obj.get("metadata") or {}).get("name", ""), obj.get("value", 0)
    system = {"system-cluster-critical": 2_000_000_000, "system-node-critical": 2_000_001_000}
    if name.startswith("system-") and system.get(name) != value:
        yield forbidden("metadata.name", "priority class names with 'system-' prefix are reserved for system use only")
    if value > 1_000_000_000 and name not in system:
        yield forbidden("value", "maximum allowed value of a user defined priority is 1000000000")
    yield from one_of("preemptionPolicy", obj.get("preemptionPolicy"), ("PreemptLowerPriority", "Never"))


def priority_class_update(new: View, old: View) -> Causes:
    """A PriorityClass keeps its value and policy."""
    if new.get("value") != old.get("value"):
        yield forbidden("value", "may not be changed in an update.")
    yield from unchanged("preemptionPolicy", new.get("preemptionPolicy"), old.get("preemptionPolicy"))


# ---- services --------------------------------------------------------------------------------------------------------

SERVICE_TYPES = ("ClusterIP", "ExternalName", "LoadBalancer", "NodePort")


def service(obj: View) -> Causes:
    """A Service."""
    spec = obj.get("spec") or {}
    yield from one_of("spec.type", spec.get("type"), SERVICE_TYPES)
    yield from one_of("spec.sessionAffinity", spec.get("sessionAffinity"), ("ClientIP", "None"))
    yield from labels("spec.selector", spec.get("selector"))
    address = spec.get("clusterIP")
    if spec.get("type") == "ExternalName":
        if address not in (None, "", "None"):
            yield forbidden("spec.clusterIPs[0]", "may not be set for ExternalName services")
        yield from named("spec.externalName", spec.get("externalName"), dns_subdomain)
    elif not spec.get("ports") and address != "None":
        yield required("spec.ports")
    if address == "None" and spec.get("type") in ("NodePort", "LoadBalancer"):
        yield invalid("spec.clusterIPs[0]", "None", f"may not be set to 'None' for {spec['type']} services")
    if address and address != "None":
        yield from ip("spec.clusterIPs[0]", address)
    yield from _service_ports("spec.ports", spec)


def _service_ports(path: str, spec: View) -> Causes:
    ports, names, taken = spec.get("ports") or (), set(), set()
    for index, port in enumerate(ports):
        here, name = f"{path}[{index}]", port.get("name")
        if name:
            yield from named(f"{here}.name", name, dns_label)
        elif len(ports) > 1:
            yield required(f"{here}.name")
        if name and name in names:
            yield duplicate(f"{here}.name", name)
        names.add(name)
        yield from between(f"{here}.port", port.get("port", 0), 1, 65535)
        yield from one_of(f"{here}.protocol", port.get("protocol"), PROTOCOLS)
        yield from port_number(f"{here}.targetPort", port.get("targetPort"))
        if (port.get("protocol"), port.get("port")) in taken:
            yield duplicate(here, {"port": port.get("port"), "protocol": port.get("protocol")})
        taken.add((port.get("protocol"), port.get("port")))
        if port.get("nodePort") and spec.get("type") in ("ClusterIP", "ExternalName"):
            yield forbidden(f"{here}.nodePort", "may not be used when `type` is 'ClusterIP'")


def ip(path: str, address: Any) -> Causes:
    """An IP address."""
    try:
        ipaddress.ip_address(address)
    except ValueError:
        yield invalid(path, address, "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)")


def service_update(new: View, old: View) -> Causes:
    """A Service keeps its cluster address, as long as it has a type that has one."""
    before, after = old.get("spec") or {}, new.get("spec") or {}
    if "ExternalName" in (before.get("type"), after.get("type")) or not before.get("clusterIP"):
        return
    if after.get("clusterIP") != before["clusterIP"]:
        yield invalid("spec.clusterIPs[0]", after.get("clusterIP") or "", "may not change once set")


def endpoints(obj: View) -> Causes:
    """Endpoints."""
    for index, subset in enumerate(obj.get("subsets") or ()):
        here = f"subsets[{index}]"
        if not subset.get("addresses") and not subset.get("notReadyAddresses"):
            yield required(here, "must specify `addresses` or `notReadyAddresses`")
        for name in ("addresses", "notReadyAddresses"):
            for place, address in enumerate(subset.get(name) or ()):
                yield from ip(f"{here}.{name}[{place}].ip", address.get("ip"))
        for place, port in enumerate(subset.get("ports") or ()):
            yield from between(f"{here}.ports[{place}].port", port.get("port", 0), 1, 65535)


def endpoint_slice(obj: View) -> Causes:
    """An EndpointSlice."""
    kind = obj.get("addressType")
    yield from one_of("addressType", kind, ("IPv4", "IPv6", "FQDN"))
    for index, endpoint in enumerate(obj.get("endpoints") or ()):
        if not endpoint.get("addresses"):
            yield required(f"endpoints[{index}].addresses", "must contain at least 1 address")
        for place, address in enumerate(endpoint.get("addresses") or ()):
            if kind in ("IPv4", "IPv6"):
                yield from ip(f"endpoints[{index}].addresses[{place}]", address)
    names = set()
    for index, port in enumerate(obj.get("ports") or ()):
        if port.get("name") in names:
            yield duplicate(f"ports[{index}].name", port.get("name"))
        names.add(port.get("name"))


def endpoint_slice_update(new: View, old: View) -> Causes:
    """An EndpointSlice keeps its kind of addresses."""
    yield from unchanged("addressType", new.get("addressType"), old.get("addressType"))


# ---- rights ----------------------------------------------------------------------------------------------------------


def role(obj: View) -> Causes:
    """A Role."""
    yield from _rules(obj, namespaced=True)


def cluster_role(obj: View) -> Causes:
    """A ClusterRole, whose rules may name URLs."""
    yield from _rules(obj, namespaced=False)


def _rules(obj: View, *, namespaced: bool) -> Causes:
    for index, rule in enumerate(obj.get("rules") or ()):
        here = f"rules[{index}]"
        if not rule.get("verbs"):
            yield required(f"{here}.verbs", "verbs must contain at least one value")
        urls = rule.get("nonResourceURLs")
        if urls:
            if namespaced:
                yield invalid(f"{here}.nonResourceURLs", urls, "namespaced rules cannot apply to non-resource URLs")
            if any(rule.get(name) for name in ("apiGroups", "resources", "resourceNames")):
                why = "rules cannot apply to both regular resources and non-resource URLs"
                yield invalid(f"{here}.nonResourceURLs", urls, why)
            continue
        if not rule.get("apiGroups"):
            yield required(f"{here}.apiGroups", "resource rules must supply at least one api group")
        if not rule.get("resources"):
            yield required(f"{here}.resources", "resource rules must supply at least one resource")


def role_binding(obj: View) -> Causes:
    """A RoleBinding."""
    yield from _binding(obj, ("Role", "ClusterRole"))


def cluster_role_binding(obj: View) -> Causes:
    """A ClusterRoleBinding."""
    yield from _binding(obj, ("ClusterRole",))


def _binding(obj: View, kinds: tuple[str, ...]) -> Causes:
    reference = obj.get("roleRef") or {}
    if reference.get("apiGroup") != RBAC:
        yield unsupported("roleRef.apiGroup", reference.get("apiGroup"), [RBAC])
    if reference.get("kind") not in kinds:
        yield unsupported("roleRef.kind", reference.get("kind"), kinds)
    yield from named("roleRef.name", reference.get("name"), path_segment)
    for index, subject in enumerate(obj.get("subjects") or ()):
        yield from _subject(f"subjects[{index}]", subject, needs_namespace=len(kinds) == 1)


def _subject(path: str, subject: View, *, needs_namespace: bool) -> Causes:
    kind, group = subject.get("kind"), subject.get("apiGroup", "")
    if not subject.get("name"):
        yield required(f"{path}.name")
    if kind == "ServiceAccount":
        if group:
            yield unsupported(f"{path}.apiGroup", group, [""])
        if subject.get("name"):
            yield from named(f"{path}.name", subject["name"], dns_subdomain)
        if needs_namespace and not subject.get("namespace"):
            yield required(f"{path}.namespace")
    elif kind in ("User", "Group"):
        if group != RBAC:
            yield unsupported(f"{path}.apiGroup", group, [RBAC])
    else:
        yield unsupported(f"{path}.kind", kind, ("ServiceAccount", "User", "Group"))


def binding_update(new: View, old: View) -> Causes:
    """A binding keeps its role."""
    yield from unchanged("roleRef", new.get("roleRef"), old.get("roleRef"), "cannot change roleRef")


# ---- signing requests ------------------------------------------------------------------------------------------------


def csr(obj: View) -> Causes:
    """A CertificateSigningRequest. What is in the request itself its approver and signer look at."""
    spec = obj.get("spec") or {}
    request = spec.get("request")
    if not request:
        yield required("spec.request")
    elif not base64.b64decode(request).lstrip().startswith(b"-----BEGIN CERTIFICATE REQUEST-----"):
        yield invalid("spec.request", "...", "PEM block type must be CERTIFICATE REQUEST")
    if not spec.get("usages"):
        yield required("spec.usages")
    domain, slash, path = str(spec.get("signerName") or "").partition("/")
    if not slash or not path or dns_subdomain(domain) or "." not in domain:
        why = "must be a fully qualified domain and path of the form 'example.com/signer-name'"
        yield invalid("spec.signerName", spec.get("signerName", ""), why)
    seconds = spec.get("expirationSeconds")
    if isinstance(seconds, int) and seconds < 600:
        yield invalid(
            "spec.expirationSeconds", seconds, "may not specify a duration less than 600 seconds (10 minutes)"
        )
    kinds = {c.get("type") for c in (obj.get("status") or {}).get("conditions") or ()}
    if {"Approved", "Denied"} <= kinds:
        yield invalid("status.conditions", "Denied", "Approved and Denied conditions are mutually exclusive")


def csr_update(new: View, old: View) -> Causes:
    """A signing request is what it was; a decision on it is not taken back."""
    yield from unchanged("spec", new.get("spec"), old.get("spec"))
    after = [c.get("type") for c in (new.get("status") or {}).get("conditions") or ()]
    for condition in (old.get("status") or {}).get("conditions") or ():
        if condition.get("type") in ("Approved", "Denied", "Failed") and condition.get("type") not in after:
            yield forbidden("status.conditions", f'updates may not remove a condition of type "{condition["type"]}"')
