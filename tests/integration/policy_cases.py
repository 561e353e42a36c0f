"""A table of NetworkPolicies, and who reaches whom under them: in the manner of upstream's conformance tests.

Pods: web-1 and web-2 (app=web) serve port 8080, named http; client (app=client) and reader (app=reader) are in their
namespace, stranger (app=client) is in the namespace other (team=other). Everything is asked over IPv4 and IPv6.
"""

from __future__ import annotations

import json
import subprocess
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from conftest import wait_for
from local_cluster import Cluster

from hypervisor.cli.kubeapi import KubeApi
from hypervisor.controller.node.policies import policy_name
from hypervisor.kube.resources import NETWORK_POLICIES, PODS

Obj = dict[str, Any]
WEB, CLIENT = {"matchLabels": {"app": "web"}}, {"matchLabels": {"app": "client"}}
READER = {"matchLabels": {"app": "reader"}}
DNS = {"namespaceSelector": {}, "podSelector": {"matchLabels": {"k8s-app": "kube-dns"}}}
OTHER = {"matchLabels": {"team": "other"}}
HOST = "the host"
NOBODY_S, SOMEBODY_S = 1, 60
"""How long to wait for a connection that must not come to be, and for one that must."""


Visit = tuple[str, str, bool]


@dataclass(frozen=True)
class Case:
    """Policies, and who reaches whom: ``client>web-1``; one that must not is ``client!web-1``.

    :ivar specs: texts like ``@web-1/4`` stand for that pod's address with its full length
    """

    name: str
    specs: tuple[Obj, ...]
    visits: str


def ingress(*rules: Obj, pods: Obj = WEB) -> Obj:
    return {"podSelector": pods, "policyTypes": ["Ingress"], "ingress": list(rules)}


def egress(*rules: Obj, pods: Obj = CLIENT) -> Obj:
    return {"podSelector": pods, "policyTypes": ["Egress"], "egress": list(rules)}


def peers(*found: Obj, **more: Any) -> Obj:
    return {"from": list(found), **more}


def to(*found: Obj, **more: Any) -> Obj:
    return {"to": list(found), **more}


def pods(selector: Obj) -> Obj:
    return {"podSelector": selector}


def namespaces(selector: Obj) -> Obj:
    return {"namespaceSelector": selector}


CLIENT_BLOCKS = [{"ipBlock": {"cidr": f"@client/{v}"}} for v in (4, 6)]
ALL_BUT_CLIENT = [
    {"ipBlock": {"cidr": "0.0.0.0/0", "except": ["@client/4"]}},
    {"ipBlock": {"cidr": "::/0", "except": ["@client/6"]}},
]
BLOCKED = [{"ipBlock": {"cidr": c, "except": [f"@web-1/{v}"]}} for v, c in ((4, "0.0.0.0/0"), (6, "::/0"))]
CASES = (
    Case("nothing comes in", (ingress(pods={}),), "client!web-1 reader!web-2 stranger!web-1 the host>web-1"),
    Case("everything comes in", (ingress({}),), "client>web-1 stranger>web-2"),
    Case("who is selected", (ingress(peers(pods(CLIENT))),), "client>web-1 client>web-2 reader!web-1 stranger!web-1"),
    Case("another namespace", (ingress(peers(namespaces(OTHER))),), "stranger>web-1 stranger>web-2 client!web-1"),
    Case(
        "selected of a namespace",
        (ingress(peers(namespaces({}) | pods(CLIENT))),),
        "client>web-1 stranger>web-1 reader!web-1",
    ),
    Case("one port", (ingress({"ports": [{"port": 8080}]}),), "client>web-1 stranger>web-1"),
    Case("another port", (ingress({"ports": [{"port": 8081}, {"port": 8080, "protocol": "UDP"}]}),), "client!web-1"),
    Case("a range of ports", (ingress({"ports": [{"port": 8000, "endPort": 8100}]}),), "client>web-1 reader>web-2"),
    Case("a port by its name", (ingress(peers(pods(CLIENT), ports=[{"port": "http"}])),), "client>web-1 reader!web-1"),
    Case("a range of addresses", (ingress(peers(*CLIENT_BLOCKS)),), "client>web-2 reader!web-2 stranger!web-1"),
    Case("a range without some", (ingress(peers(*ALL_BUT_CLIENT)),), "client!web-2 reader>web-1 stranger>web-2"),
    Case(
        "two policies", (ingress(peers(pods(CLIENT))), ingress(peers(namespaces(OTHER)))), "client>web-1 reader!web-1"
    ),
    Case("nothing goes out", (egress(pods={}),), "client!web-1 reader!web-1 stranger>web-1 the host>web-1"),
    Case("out to who is selected", (egress(to(pods(WEB))),), "client>web-1 client>web-2 reader>web-1"),
    Case("out to another namespace only", (egress(to(namespaces(OTHER))),), "client!web-1 reader>web-2"),
    Case("out to a port by its name", (egress({"ports": [{"port": "http"}]}),), "client>web-1 client>web-2"),
    Case("out to all but one", (egress(to(*BLOCKED)),), "client!web-1 client>web-2"),
    Case("out, and not in", (egress(to(pods(WEB))), ingress(peers(namespaces(OTHER)))), "client!web-1 stranger>web-1"),
)


NAMES = (
    (egress(pods=READER), False),
    (egress(to(DNS, ports=[{"port": 53}]), pods=READER), False),  # TCP
    (egress(to(DNS, ports=[{"port": 53, "protocol": "UDP"}]), pods=READER), True),
)
"""Policies, and whether names are resolved under them."""


def check_names(cluster: Cluster) -> None:
    """Whether the name server is for whom the policies say."""
    with KubeApi(cluster.paths.kubeconfig, timeout=60) as api:
        for spec, expected in NAMES:
            made = policy(spec, {})
            api.create(NETWORK_POLICIES, made, "default")
            wait_for(lambda made=made: in_force(made), "the policy is in force")  # type: ignore[misc]
            try:
                assert resolves(cluster, expected) == expected, spec
            finally:
                api.delete(NETWORK_POLICIES, made["metadata"]["name"], "default")


def check(cluster: Cluster, case: Case) -> None:
    """Puts the case's policies in force, asks, and takes them away."""
    with KubeApi(cluster.paths.kubeconfig, timeout=60) as api:
        found = {name: addresses(api, name) for name in ("web-1", "web-2", "client")}
        made = [policy(spec, found) for spec in case.specs]
        try:
            for one in made:
                api.create(NETWORK_POLICIES, one, "default")
            wait_for(lambda: all(in_force(p) for p in made), "the policies are in force")
            _ask(cluster, [_visit(text) for text in _words(case.visits)], found)
        finally:
            for one in made:
                api.delete(NETWORK_POLICIES, one["metadata"]["name"], "default")


def _ask(cluster: Cluster, visits: list[Visit], found: dict[str, list[str]]) -> None:
    """Everyone at once; those that must get through and those that must not, apart."""
    asked = sorted({(who, yes) for who, _, yes in visits})
    targets = {key: [a for who, whom, yes in visits if (who, yes) == key for a in found[whom]] for key in asked}
    with ThreadPoolExecutor() as threads:
        answers = list(threads.map(lambda key: reached(cluster, key[0], targets[key], key[1]), asked))
    for key, said in zip(asked, answers, strict=True):
        assert said == [key[1]] * len(targets[key]), f"{key[0]} to {targets[key]}: {said}"


def _words(visits: str) -> list[str]:
    return [word.replace("HOST", HOST) for word in visits.replace(HOST, "HOST").split()]


def _visit(text: str) -> Visit:
    yes = ">" in text
    who, whom = text.split(">" if yes else "!")
    return who, whom, yes


def policy(spec: Obj, found: dict[str, list[str]]) -> Obj:
    text = json.dumps(spec)
    for name, own in found.items():
        text = text.replace(f"@{name}/4", f"{own[0]}/32").replace(f"@{name}/6", f"{own[1]}/128")
    metadata = {"name": f"p-{uuid.uuid4()}", "namespace": "default"}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": metadata,
        "spec": json.loads(text),
    }


def addresses(api: KubeApi, name: str) -> list[str]:
    return [entry["ip"] for entry in api.get(PODS, name, "default")["status"]["podIPs"]]


def in_force(policy: Obj) -> bool:
    """Whether each host has it whose pods it is about: the client is on one, the others are on both."""
    hosts = 1 if policy["spec"]["podSelector"] in (CLIENT, READER) else 2
    listed = subprocess.run(["nft", "list", "chains", "inet"], capture_output=True, text=True, check=True).stdout
    return listed.count(f"-{policy_name(policy)} {{") == hosts


def resolves(cluster: Cluster, expected: bool) -> bool:
    """Whether the reader resolves a name; with little patience where it must not."""
    options = "timeout:10 attempts:3" if expected else "timeout:1 attempts:1"
    again = f"sed 's/^options.*/options {options}/' /etc/resolv.conf > /tmp/r && cat /tmp/r > /etc/resolv.conf"
    script = "import socket; print(socket.getaddrinfo('web.default.svc.cluster.local.', 80)[0][4][0])"
    done = f"{again}; python3 -c \"{script}\" >/tmp/said 2>&1; grep -qx '[0-9a-f.:]*' /tmp/said && echo yes || echo no"
    return cluster.kubectl("exec", "reader", "--", "sh", "-c", done).strip() == "yes"


def reached(cluster: Cluster, who: str, targets: list[str], expected: bool) -> list[bool]:
    """Whether each of the addresses answers on port 8080."""
    patience = SOMEBODY_S if expected else NOBODY_S
    if who == HOST:
        urls = [f"http://[{a}]:8080/" if ":" in a else f"http://{a}:8080/" for a in targets]
        return ["works" in subprocess.run(["curl", "-sm", str(patience), url], capture_output=True, text=True,
                                          check=False).stdout for url in urls]  # fmt: skip
    if who == "reader":
        return reached_by_python(cluster, targets, patience)
    ask = "printf 'GET / HTTP/1.0\\r\\n\\r\\n' | nc -w {} {} 8080 >/tmp/$$.{} 2>/dev/null &"
    asks = " ".join(ask.format(patience, a, i) for i, a in enumerate(targets))
    numbers = " ".join(map(str, range(len(targets))))
    script = f"{asks} wait; for i in {numbers}; do grep -q works /tmp/$$.$i && echo yes || echo no; done"
    namespace = "other" if who == "stranger" else "default"
    said = cluster.kubectl("exec", "-n", namespace, who, "--", "sh", "-c", script)
    return [word == "yes" for word in said.split()]


def reached_by_python(cluster: Cluster, targets: list[str], patience: int) -> list[bool]:
    script = """
import socket, sys
for address in sys.argv[2:]:
    try:
        socket.create_connection((address, 8080), timeout=int(sys.argv[1])).close()
        print("yes")
    except OSError:
        print("no")
"""
    said = cluster.kubectl("exec", "reader", "--", "python3", "-c", script, str(patience), *targets)
    return [word == "yes" for word in said.split()]
