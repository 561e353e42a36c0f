"""The pod network of a cluster of two hosts: pods, Services and the API server reach each other; guests cannot lie."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import name_cases
import policy_cases
import pytest
from conftest import wait_for
from local_cluster import Cluster, running_cluster

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.root,
    pytest.mark.net_admin,
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nft", path="/usr/sbin:/sbin:/usr/bin") is None, reason="needs nftables"),
]
RANGES = ("--pod-cidr", "10.201.0.0/16,fd20:1::/56", "--service-cidr", "10.202.0.0/16,fd20:2::/112")
GET = 'printf "GET / HTTP/1.0\\r\\n\\r\\n" | nc -w 10 {} {}'
IN_CLUSTER = """
import json, ssl, sys, urllib.error, urllib.request
account = "/var/run/secrets/kubernetes.io/serviceaccount"
import os
base = f"https://{os.environ['KUBERNETES_SERVICE_HOST']}:{os.environ['KUBERNETES_SERVICE_PORT']}"
trust = ssl.create_default_context(cafile=account + "/ca.crt")
token = open(account + "/token").read()
for namespace in sys.argv[1:]:
    url = f"{base}/api/v1/namespaces/{namespace}/pods"
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(request, context=trust, timeout=30) as answer:
            print(len(json.load(answer)["items"]))
    except urllib.error.HTTPError as error:
        print(error.code)
"""


def pod(name: str, image: str, host: str, *command: str, labels: dict[str, str] | None = None) -> dict[str, Any]:
    container: dict[str, Any] = {"name": "c", "image": f"localhost/podvisor/{image}", "imagePullPolicy": "Never"}
    if image == "web":
        container["ports"] = [{"name": "http", "containerPort": 8080, "hostPort": 18080}]  # at each host's own address
    if command:
        container["command"] = list(command)
    spec = {"nodeName": host, "containers": [container], "terminationGracePeriodSeconds": 0}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": labels or {}}, "spec": spec}


OTHER = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "other", "labels": {"team": "other"}}}


def in_other(obj: dict[str, Any]) -> dict[str, Any]:
    return obj | {"metadata": obj["metadata"] | {"namespace": "other"}}


WEB_SERVICE = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {"name": "web"},
    "spec": {
        "selector": {"app": "web"},
        "type": "NodePort",
        "ipFamilyPolicy": "RequireDualStack",
        "ports": [{"port": 80, "targetPort": 8080}],
    },
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster(("busybox", "python", "web"), "--pod-network", *RANGES) as made:
        items = [
            pod("web-1", "web", "host-1", labels={"app": "web"}),
            pod("web-2", "web", "host-2", labels={"app": "web"}),
            pod("client", "busybox", "host-1", "sleep", "3600", labels={"app": "client"}),
            pod("reader", "python", "host-2", "sleep", "3600", labels={"app": "reader"}),
            WEB_SERVICE,
            in_other(pod("stranger", "busybox", "host-2", "sleep", "3600", labels={"app": "client"})),
        ]
        made.kubectl("apply", "-f", "-", stdin=json.dumps(OTHER))
        accounts = ("get", "serviceaccounts", "-n", "other", "-o", "name")
        wait_for(lambda: "default" in made.kubectl(*accounts), "the namespace has its service account")
        made.kubectl("apply", "-f", "-", stdin="\n---\n".join(map(json.dumps, items)))
        made.kubectl("wait", "--for=condition=Ready", "pod", "--all", "--all-namespaces", "--timeout=300s", timeout=310)
        wait_for(lambda: len(endpoints(made)) == 4, "both pods are endpoints in both families")
        yield made
    left = subprocess.run(["ip", "route"], capture_output=True, text=True, check=True).stdout
    assert "10.201." not in left


def endpoints(cluster: Cluster) -> list[str]:
    path = "jsonpath={.items[*].endpoints[*].addresses[0]}"
    return cluster.kubectl("get", "endpointslices", "-l", "kubernetes.io/service-name=web", "-o", path).split()


def addresses(cluster: Cluster, name: str) -> list[str]:
    return cluster.kubectl("get", "pod", name, "-o", "jsonpath={.status.podIPs[*].ip}").split()


def from_client(cluster: Cluster, script: str) -> str:
    return cluster.kubectl("exec", "client", "--", "sh", "-c", script)


def test_every_pod_reaches_every_other(cluster: Cluster) -> None:
    found = {name: addresses(cluster, name) for name in ("web-1", "web-2", "client")}
    assert len({address for own in found.values() for address in own}) == 6
    for name in ("web-1", "web-2"):  # on its own host, and on the other one
        for address in found[name]:
            assert "It works" in from_client(cluster, GET.format(address, 8080)), f"{name} at {address}"
            host = f"[{address}]" if ":" in address else address
            page = subprocess.run(
                ["curl", "-sS", "--max-time", "30", f"http://{host}:8080/"], capture_output=True, text=True, check=True
            ).stdout
            assert "It works" in page


def test_a_service_by_its_addresses_and_node_ports(cluster: Cluster) -> None:
    service = json.loads(cluster.kubectl("get", "service", "web", "-o", "json"))["spec"]
    assert len(service["clusterIPs"]) == 2
    for address in service["clusterIPs"]:
        assert "It works" in from_client(cluster, GET.format(address, 80))
    port = service["ports"][0]["nodePort"]
    page = subprocess.run(
        ["curl", "-sS", "--max-time", "30", f"http://127.0.0.2:{port}/"], capture_output=True, text=True, check=True
    ).stdout
    assert "It works" in page
    asked = GET.format(service["clusterIP"], 80)
    assert "It works" in cluster.kubectl("exec", "web-1", "--", "sh", "-c", f"{asked}; {asked}; {asked}")  # itself, too


def test_names_of_the_cluster(cluster: Cluster) -> None:
    name_cases.check_names(cluster, addresses(cluster, "web-1") + addresses(cluster, "web-2"))


def test_a_service_without_endpoints_refuses_at_once(cluster: Cluster) -> None:
    spec = {"selector": {"app": "nobody"}, "ports": [{"port": 80}]}
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "none"}, "spec": spec}
    cluster.kubectl("apply", "-f", "-", stdin=json.dumps(service))
    address = cluster.kubectl("get", "service", "none", "-o", "jsonpath={.spec.clusterIP}")
    script = f"for i in $(seq 100); do nc -w 5 {address} 80 </dev/null 2>&1 | grep -q refused && echo yes && exit; done"
    assert from_client(cluster, script) == "yes\n"


def test_an_in_cluster_client_sees_its_own_namespace_only(cluster: Cluster) -> None:
    cluster.kubectl("create", "role", "reader", "--verb=list", "--resource=pods")
    cluster.kubectl("create", "rolebinding", "reader", "--role=reader", "--serviceaccount=default:default")
    answer = cluster.kubectl("exec", "reader", "--", "python3", "-c", IN_CLUSTER, "default", "kube-system")
    assert answer.split() == ["4", "403"]


def test_a_guest_has_its_own_address_only_and_no_way_to_the_hosts_ports(cluster: Cluster) -> None:
    own = addresses(cluster, "client")[0]
    port = cluster.paths.load().port  # type: ignore[union-attr]
    dropped = from_client(cluster, f"nc -w 3 169.254.1.1 {port} </dev/null; echo $?")
    assert dropped.split()[-1] == "1"
    rules = json.loads(subprocess.run(["nft", "-j", "list", "ruleset"], capture_output=True, check=True).stdout)
    pairs = [str(e["set"].get("elem", "")) for e in rules["nftables"] if "set" in e and e["set"]["name"] == "pods4"]
    assert any(own in text for text in pairs)


def test_what_is_flushed_by_hand_comes_back(cluster: Cluster) -> None:
    listed = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=True).stdout
    tables = [line.split()[-1] for line in listed.splitlines() if "podvisor-" in line]
    ours = [t for t in tables if addresses(cluster, "client")[0] in nft_table(t)]
    assert len(ours) == 1
    subprocess.run(["nft", "delete", "table", "inet", ours[0]], check=True)
    wait_for(lambda: addresses(cluster, "client")[0] in nft_table(ours[0]), "the packet filter is back")


def nft_table(name: str) -> str:
    done = subprocess.run(["nft", "list", "table", "inet", name], capture_output=True, text=True, check=False)
    return done.stdout


def test_ports_of_the_hosts_and_counters(cluster: Cluster) -> None:
    for name in ("web-1", "web-2"):
        host = cluster.kubectl("get", "pod", name, "-o", "jsonpath={.status.hostIP}")
        before = received(cluster, name)
        page = subprocess.run(
            ["curl", "-sS", "--max-time", "30", f"http://{host}:18080/"], capture_output=True, text=True, check=True
        ).stdout
        assert "It works" in page
        wait_for(lambda name=name, before=before: received(cluster, name) > before, "it is counted")  # type: ignore[misc]


def received(cluster: Cluster, name: str) -> int:
    host = cluster.kubectl("get", "pod", name, "-o", "jsonpath={.spec.nodeName}")
    summary = json.loads(cluster.kubectl("get", "--raw", f"/api/v1/nodes/{host}/proxy/stats/summary"))
    return next(int(pod["network"]["rxBytes"]) for pod in summary["pods"] if pod["podRef"]["name"] == name)


@pytest.mark.parametrize("case", policy_cases.CASES, ids=lambda case: case.name)
def test_policies(cluster: Cluster, case: policy_cases.Case) -> None:
    policy_cases.check(cluster, case)


def test_names_under_policies(cluster: Cluster) -> None:
    policy_cases.check_names(cluster)


def test_a_daemon_that_was_killed_finds_the_addresses(cluster: Cluster) -> None:
    before = addresses(cluster, "client")
    process = cluster.paths.process("host-1")
    assert process is not None
    process.kill()
    cluster.hv("cluster", "up")
    cluster.kubectl("wait", "--for=condition=Ready", "pod/client", "--timeout=60s")
    assert addresses(cluster, "client") == before
    assert "It works" in from_client(cluster, GET.format(addresses(cluster, "web-2")[0], 8080))


def test_addresses_are_taken_back(cluster: Cluster) -> None:
    address = addresses(cluster, "web-1")[0]
    cluster.kubectl("delete", "pod", "web-1", "--now")
    wait_for(lambda: address not in endpoints(cluster), "it is no endpoint")
    routes = subprocess.run(["ip", "route"], capture_output=True, text=True, check=True).stdout
    assert f"{address} " not in routes
