"""Names of Services, endpoints and pods, as Kubernetes' DNS specification has them."""

from __future__ import annotations

import ipaddress
from typing import Any

import pytest

from hypervisor.controller.node.clusternames import INDEXERS, ClusterNames, reversed_address
from hypervisor.kube.informer import Store
from hypervisor.kube.resources import ENDPOINT_SLICES, NAMESPACES, PODS, SERVICES

Obj = dict[str, Any]


def service(name: str, **spec: Any) -> Obj:
    return {"metadata": {"namespace": "default", "name": name}, "spec": spec}


def piece(service: str, *endpoints: Obj, number: int = 0) -> Obj:
    labels = {"kubernetes.io/service-name": service}
    metadata = {"namespace": "default", "name": f"{service}-{number}", "labels": labels}
    return {"metadata": metadata, "endpoints": list(endpoints), "ports": [{"name": "http", "port": 8080}]}


def endpoint(address: str, hostname: str = "", ready: bool = True) -> Obj:
    named = {"hostname": hostname} if hostname else {}
    return {"addresses": [address], "conditions": {"ready": ready}} | named


@pytest.fixture
def names() -> ClusterNames:
    objects = {
        NAMESPACES: [{"metadata": {"name": name}} for name in ("default", "empty")],
        SERVICES: [
            service("web", clusterIPs=["10.96.0.5", "fd96::5"], ports=[{"name": "http", "port": 80}, {"port": 81}]),
            service("each", clusterIPs=["None"], ports=[{"name": "http", "port": 80}]),
            service("none", clusterIPs=["None"], ports=[{"name": "http", "port": 80}]),
            service("out", type="ExternalName", externalName="example.org"),
        ],
        ENDPOINT_SLICES: [
            piece("each", endpoint("10.88.0.1", "db-0"), endpoint("10.88.0.2"), endpoint("10.88.0.3", "x", False)),
            piece("each", endpoint("fd88::1", "db-0"), number=1),
            piece("web", endpoint("10.88.0.9", "x")),
        ],
        PODS: [
            {
                "metadata": {"namespace": "default", "name": "p"},
                "status": {"podIPs": [{"ip": "10.88.0.7"}, {"ip": "fd88::7"}]},
            }
        ],
    }  # fmt: skip
    stores = {resource: Store(INDEXERS.get(resource)) for resource in objects}
    for resource, listed in objects.items():
        for obj in listed:
            stores[resource].put(obj)
    return ClusterNames(stores, "cluster.local")


FULL = "web.default.svc.cluster.local"
CASES = [
    (FULL, ["A 10.96.0.5", "AAAA fd96::5"]),
    (f"_http._tcp.{FULL}", [f"SRV 0 100 80 {FULL}."]),
    (f"_tcp.{FULL}", []),
    (f"_udp.{FULL}", None),
    (f"_http._udp.{FULL}", None),
    (f"_https._tcp.{FULL}", None),
    (f"x.{FULL}", None),
    ("each.default.svc.cluster.local", ["A 10.88.0.1", "A 10.88.0.2", "AAAA fd88::1"]),
    ("db-0.each.default.svc.cluster.local", ["A 10.88.0.1", "AAAA fd88::1"]),
    ("10-88-0-2.each.default.svc.cluster.local", ["A 10.88.0.2"]),
    ("x.each.default.svc.cluster.local", None),
    (
        "_http._tcp.each.default.svc.cluster.local",
        [f"SRV 0 100 8080 {name}.each.default.svc.cluster.local." for name in ("10-88-0-2", "db-0")],
    ),
    ("none.default.svc.cluster.local", []),
    ("out.default.svc.cluster.local", ["CNAME example.org."]),
    ("10-88-0-7.default.pod.cluster.local", ["A 10.88.0.7"]),
    ("fd88--7.default.pod.cluster.local", ["AAAA fd88::7"]),
    ("10-88-0-7.empty.pod.cluster.local", None),
    ("10-88-0-8.default.pod.cluster.local", None),
    ("nobody.default.svc.cluster.local", None),
    ("web.empty.svc.cluster.local", None),
    ("default.svc.cluster.local", []),
    ("nowhere.svc.cluster.local", None),
    ("svc.cluster.local", []),
    ("cluster.local", []),
    ("more.cluster.local", None),
    ("a..cluster.local", None),
    ("dns-version.cluster.local", ['TXT "1.1.0"']),
    ("5.0.96.10.in-addr.arpa", [f"PTR {FULL}."]),
    ("1.0.88.10.in-addr.arpa", ["PTR db-0.each.default.svc.cluster.local."]),
    ("9.0.88.10.in-addr.arpa", []),
]  # fmt: skip


@pytest.mark.parametrize(("name", "expected"), CASES, ids=[name for name, _ in CASES])
def test_names(names: ClusterNames, name: str, expected: list[str] | None) -> None:
    found = names.lookup(name)
    assert (None if found is None else sorted(f"{r.type} {r.data}" for r in found)) == expected


def test_whose_names_they_are(names: ClusterNames) -> None:
    six = ipaddress.ip_address("fd96::5").reverse_pointer
    for name in ("cluster.local", "x.cluster.local", "5.0.96.10.in-addr.arpa", six):
        assert names.is_own(name)
    for name in ("example.org", "notcluster.local", "9.0.88.10.in-addr.arpa", "", "1.1.1.1.in-addr.arpa"):
        assert not names.is_own(name)


@pytest.mark.parametrize(
    "name", ["in-addr.arpa", "1.in-addr.arpa", "x.1.2.3.in-addr.arpa", "1.ip6.arpa", "example.org"]
)
def test_what_is_no_reverse_name(name: str) -> None:
    assert reversed_address(name) is None
