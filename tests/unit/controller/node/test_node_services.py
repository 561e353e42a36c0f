"""What containers are told of Services."""

from __future__ import annotations

from typing import Any

from node_bench import PODS, Cluster, api_pod

from hypervisor.controller.node.service_environment import service_variables

SERVICES = "/api/v1/services"


def service(name: str, address: str, *ports: dict[str, Any], namespace: str = "default") -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": namespace}, "spec": {"clusterIP": address, "ports": list(ports)}}


KUBERNETES = service("kubernetes", "10.0.0.1", {"name": "https", "port": 443, "protocol": "TCP"})
REDIS = service(
    "redis-primary", "10.0.0.11", {"port": 6379, "protocol": "TCP"}, {"name": "m-x", "port": 9, "protocol": "UDP"}
)


def test_variables_are_those_that_kubernetes_documents() -> None:
    assert service_variables([REDIS], "default", links=True) == {
        "REDIS_PRIMARY_SERVICE_HOST": "10.0.0.11",
        "REDIS_PRIMARY_SERVICE_PORT": "6379",
        "REDIS_PRIMARY_SERVICE_PORT_M_X": "9",
        "REDIS_PRIMARY_PORT": "tcp://10.0.0.11:6379",
        "REDIS_PRIMARY_PORT_6379_TCP": "tcp://10.0.0.11:6379",
        "REDIS_PRIMARY_PORT_6379_TCP_PROTO": "tcp",
        "REDIS_PRIMARY_PORT_6379_TCP_PORT": "6379",
        "REDIS_PRIMARY_PORT_6379_TCP_ADDR": "10.0.0.11",
        "REDIS_PRIMARY_PORT_9_UDP": "udp://10.0.0.11:9",
        "REDIS_PRIMARY_PORT_9_UDP_PROTO": "udp",
        "REDIS_PRIMARY_PORT_9_UDP_PORT": "9",
        "REDIS_PRIMARY_PORT_9_UDP_ADDR": "10.0.0.11",
    }


def test_whose_services_are_told() -> None:
    there = [KUBERNETES, REDIS, service("other", "10.0.0.3", {"port": 1}, namespace="b")]
    headless = [service("none", "None", {"port": 1}), service("bare", "", {"port": 1}), service("no-ports", "10.0.0.9")]

    def hosts(namespace: str, *, links: bool = True) -> set[str]:
        found = service_variables(there + headless, namespace, links=links)
        return {name for name in found if name.endswith("_SERVICE_HOST")}

    assert hosts("default") == {"KUBERNETES_SERVICE_HOST", "REDIS_PRIMARY_SERVICE_HOST"}
    assert hosts("b") == {"KUBERNETES_SERVICE_HOST", "OTHER_SERVICE_HOST"}
    assert hosts("b", links=False) == hosts("c") == {"KUBERNETES_SERVICE_HOST"}


async def test_containers_have_them_and_their_own_come_first(cluster: Cluster) -> None:
    for one in (KUBERNETES, REDIS):
        cluster.server.put(SERVICES, one)
    own = [
        {"name": "KUBERNETES_SERVICE_PORT", "value": "1"},
        {"name": "URL", "value": "https://$(KUBERNETES_SERVICE_HOST)"},
        {"name": "HOST", "valueFrom": {"fieldRef": {"fieldPath": "status.hostIP"}}},
    ]
    pod = api_pod()
    pod["spec"]["containers"][0]["env"] = own
    cluster.server.put(PODS, pod)
    async with cluster.node():
        await cluster.until(lambda: cluster.status().get("phase") == "Running")
    (started,) = [args for name, args in cluster.bench.machines.started[0].calls if name == "container.start"]
    assert {
        "KUBERNETES_SERVICE_HOST=10.0.0.1",
        "KUBERNETES_SERVICE_PORT=1",
        "URL=https://10.0.0.1",
        "HOST=127.0.0.9",
        "REDIS_PRIMARY_SERVICE_HOST=10.0.0.11",
    } <= set(started["env"])
