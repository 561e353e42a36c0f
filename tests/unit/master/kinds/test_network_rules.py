"""NetworkPolicies: what they must be, and what they are filled in with."""

from __future__ import annotations

from typing import Any

import pytest
from objects_of_kinds import KINDS, causes, made, new

from hypervisor.kube.resources import NETWORK_POLICIES


def policy(**spec: Any) -> dict[str, Any]:
    return new(NETWORK_POLICIES, spec={"podSelector": {}} | spec)


def one_port(**port: Any) -> dict[str, Any]:
    return policy(ingress=[{"ports": [port]}])


def one_peer(**peer: Any) -> dict[str, Any]:
    return policy(egress=[{"to": [peer]}])


PORT, PEER = "spec.ingress[0].ports[0]", "spec.egress[0].to[0]"
WRONG = [
    (one_port(port=0), f"{PORT}.port: Invalid value: 0: must be between 1 and 65535"),
    (one_port(port=80, endPort=79), f"{PORT}.endPort: Invalid value: 79: must be greater than or equal to `port`"),
    (one_port(port=80, endPort=70000), f"{PORT}.endPort: Invalid value: 70000: must be between 1 and 65535"),
    (one_port(endPort=80), f"{PORT}.port: Required value: must be specified when `endPort` is specified"),
    (one_port(port="http", endPort=80), "may not be specified when `port` is non-numeric"),
    (one_port(port="A_B"), "must contain only alpha-numeric characters"),
    (one_port(port="1234"), "must contain at least one letter"),
    (one_port(port="a" * 16), "must be no more than 15 characters"),
    (one_port(protocol="ICMP"), f"{PORT}.protocol: Unsupported value"),
    (one_peer(), f"{PEER}: Required value: must specify a peer"),
    (one_peer(ipBlock={"cidr": "10.0.0.0/8"}, podSelector={}), "may not specify both ipBlock and another peer"),
    (one_peer(ipBlock={"cidr": "10.0.0.0"}), f"{PEER}.ipBlock.cidr: Invalid value"),
    (one_peer(ipBlock={"cidr": "10.0.0.0/8", "except": ["11.0.0.0/9"]}), "must be a strict subset of `cidr`"),
    (one_peer(ipBlock={"cidr": "10.0.0.0/8", "except": ["10.0.0.0/8"]}), "must be a strict subset of `cidr`"),
    (one_peer(ipBlock={"cidr": "10.0.0.0/8", "except": ["fd00::/9"]}), "must be a strict subset of `cidr`"),
    (one_peer(podSelector={"matchLabels": {"a b": "c"}}), f"{PEER}.podSelector.matchLabels: Invalid value"),
    (policy(policyTypes=["Both"]), "spec.policyTypes[0]: Unsupported value"),
]


@pytest.mark.parametrize(("obj", "expected"), WRONG, ids=[text[:50] for _, text in WRONG])
def test_what_they_may_not_be(obj: dict[str, Any], expected: str) -> None:
    assert expected in "\n".join(causes(NETWORK_POLICIES, obj))


def test_a_good_one_with_everything() -> None:
    block = {"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}}
    ports = [{"port": 80}, {"port": 1000, "endPort": 2000, "protocol": "UDP"}, {"port": "http"}, {}]
    both = {"podSelector": {"matchLabels": {"a": "b"}}, "namespaceSelector": {}}
    obj = policy(ingress=[{"from": [block, both], "ports": ports}, {}], egress=[{"to": [{"podSelector": {}}]}])
    assert causes(NETWORK_POLICIES, obj) == []


def test_what_they_are_filled_in_with() -> None:
    assert made(NETWORK_POLICIES)["spec"]["policyTypes"] == ["Ingress"]
    obj = made(NETWORK_POLICIES, spec={"podSelector": {}, "egress": [{"ports": [{"port": 53}]}]})
    assert obj["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert obj["spec"]["egress"][0]["ports"][0]["protocol"] == "TCP"


def test_what_kubectl_shows() -> None:
    obj = made(NETWORK_POLICIES, spec={"podSelector": {"matchLabels": {"app": "web"}}})
    cells = {column.name: column.value(obj) for column in KINDS.of(NETWORK_POLICIES).columns}
    assert cells["Pod-Selector"] == "app=web"
