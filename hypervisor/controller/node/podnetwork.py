"""What the cluster tells a host's pod network: the host's ranges of addresses, and which Services there are."""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import structlog

from hypervisor.errors import HvError, InvalidInput
from hypervisor.kube.client import ApiClient, Object
from hypervisor.kube.informer import Handler, Informer
from hypervisor.kube.meta import get
from hypervisor.kube.resources import ENDPOINT_SLICES, NODES, SERVICES
from hypervisor.net.network import HostNetwork
from hypervisor.net.ruleset import Endpoint, ServicePort

ASK_S = 1.0
"""Between two looks at whether the Node has its ranges."""
GATHER_S = 0.05
"""Changes of Services that come within so long are told together."""
SERVICE_NAME = "kubernetes.io/service-name"

log = structlog.get_logger(__name__)


async def follow_cluster(client: ApiClient, node: str, network: HostNetwork, cluster: tuple[str, ...]) -> None:
    """Tells the network what the cluster says, for ever.

    :param cluster: ranges of all pods and all Services
    """
    changed = asyncio.Event()
    services, slices = Informer(client, SERVICES), Informer(client, ENDPOINT_SLICES)
    for informer in (services, slices):
        informer.add_handler(
            Handler(added=lambda _: changed.set(), updated=lambda *_: changed.set(), deleted=lambda _: changed.set())
        )
    async with asyncio.TaskGroup() as group:
        group.create_task(services.run(), name="network's services")
        group.create_task(slices.run(), name="network's endpoints")
        group.create_task(_ranges(client, node, network, cluster), name="network's ranges")
        await services.wait_synced()
        await slices.wait_synced()
        while True:
            changed.clear()
            network.set_services(tuple(service_ports(services.store, slices.store)))
            await changed.wait()
            await asyncio.sleep(GATHER_S)


async def _ranges(client: ApiClient, node: str, network: HostNetwork, cluster: tuple[str, ...]) -> None:
    while True:
        try:
            found = await client.get(NODES, node)
            ranges = get(found, "spec", "podCIDRs", default=())
            if ranges:
                network.set_ranges(ranges, cluster)
                return
        except InvalidInput as error:
            log.error("the node's ranges cannot be used", reason=str(error))
        except HvError as error:
            log.info("the node's ranges are not known yet", reason=str(error))
        await asyncio.sleep(ASK_S)


def service_ports(services: Iterable[Object], slices: Iterable[Object]) -> Iterator[ServicePort]:
    """Every port of every Service that has an address, with the endpoints that are ready."""
    by_service: dict[tuple[str, str], list[Object]] = defaultdict(list)
    for piece in slices:
        name = get(piece, "metadata", "labels", SERVICE_NAME, default="")
        by_service[str(get(piece, "metadata", "namespace")), str(name)].append(piece)
    for service in services:
        key = (str(get(service, "metadata", "namespace")), str(get(service, "metadata", "name")))
        addresses = tuple(
            ipaddress.ip_address(a) for a in get(service, "spec", "clusterIPs", default=()) if a != "None"
        )
        for port in get(service, "spec", "ports", default=()) if addresses else ():
            yield _service_port(service, key, port, addresses, by_service[key])


def _service_port(
    service: Object, key: tuple[str, str], port: Mapping[str, Any], addresses: tuple[Any, ...], slices: list[Object]
) -> ServicePort:
    name = str(port.get("name") or "")
    affinity = 0
    if get(service, "spec", "sessionAffinity", default="None") == "ClientIP":
        affinity = int(get(service, "spec", "sessionAffinityConfig", "clientIP", "timeoutSeconds", default=10800))
    return ServicePort(
        chain_name(*key, f"{port['port']}{port.get('protocol', 'TCP')}"),
        addresses,
        str(port.get("protocol") or "TCP").lower(),
        int(port["port"]),
        tuple(_endpoints(slices, name)),
        int(port.get("nodePort") or 0),
        affinity,
    )


def _endpoints(slices: list[Object], name: str) -> Iterator[Endpoint]:
    for piece in slices:
        ports = [p for p in piece.get("ports") or () if str(p.get("name") or "") == name and p.get("port")]
        for endpoint in piece.get("endpoints") or () if ports else ():
            if get(endpoint, "conditions", "ready", default=True):
                for address in endpoint.get("addresses") or ():
                    yield Endpoint(ipaddress.ip_address(address), int(ports[0]["port"]))


def chain_name(namespace: str, name: str, port: str) -> str:
    """A name that nft takes (letters, digits, '-'; not too long), and no two ports share."""
    digest = hashlib.sha256(f"{namespace}/{name}/{port}".encode()).hexdigest()[:12]
    return f"{namespace[:24]}-{name[:48]}-{digest}".replace(".", "-")
