"""What the cluster tells a host's pod network: the host's ranges of addresses, Services, policies."""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import lru_cache
from typing import Any

import structlog

from hypervisor.controller.manifest import CLUSTER_DOMAIN
from hypervisor.controller.node.clusternames import INDEXERS, SERVICE_NAME, ClusterNames
from hypervisor.controller.node.policies import compile_policies, matters, resolver
from hypervisor.errors import HvError, InvalidInput
from hypervisor.kube.client import ApiClient, Object
from hypervisor.kube.informer import Handler, Informer, Store
from hypervisor.kube.meta import get, key_of
from hypervisor.kube.resources import ENDPOINT_SLICES, NAMESPACES, NETWORK_POLICIES, NODES, PODS, SERVICES, Resource
from hypervisor.net.addresses import GATEWAY4, Address
from hypervisor.net.network import HostNetwork
from hypervisor.net.pods import ConnectedPod
from hypervisor.net.policies import Policies
from hypervisor.net.ruleset import Resolver
from hypervisor.net.services import Endpoint, ServicePort

ASK_S = 1.0
"""Between two looks at whether the Node has its ranges."""
GATHER_S = 0.05
"""Changes of Services that come within so long are told together."""
FOLLOWED = (SERVICES, ENDPOINT_SLICES, NETWORK_POLICIES, PODS, NAMESPACES)
DNS_SERVICE = ("kube-system", "kube-dns")

log = structlog.get_logger(__name__)


async def follow_cluster(client: ApiClient, node: str, network: HostNetwork, cluster: tuple[str, ...]) -> None:
    """Tells the network what the cluster says, for ever.

    :param cluster: ranges of all pods and all Services
    """
    followed = {resource: Informer(client, resource, indexers=INDEXERS.get(resource)) for resource in FOLLOWED}
    stores = {resource: informer.store for resource, informer in followed.items()}
    async with _name_server(network, stores) as port, asyncio.TaskGroup() as group:
        group.create_task(_ranges(client, node, network, cluster), name="network's ranges")
        for resource, informer in followed.items():
            group.create_task(informer.run(), name=f"network's {resource.plural}")
        for informer in followed.values():
            await informer.wait_synced()
        group.create_task(_tell_services(network, followed, port), name="network's Services, told")
        group.create_task(_tell_policies(network, followed, stores), name="network's policies, told")


@asynccontextmanager
async def _name_server(network: HostNetwork, stores: Mapping[Resource, Store]) -> AsyncIterator[int]:
    """The host's name server for its pods; its port. 0: it has none, and pods ask elsewhere."""
    from hypervisor.net.dns.answer import Answerer  # the library takes a while to import: only where it is used
    from hypervisor.net.dns.forward import Forwarder
    from hypervisor.net.dns.server import NameServer

    answerer = Answerer(ClusterNames(stores, CLUSTER_DOMAIN), Forwarder())
    async with NameServer.opened(answerer, network.may_ask, str(GATEWAY4)) as server:
        yield server.port


def dns_addresses(services: Store) -> tuple[Address, ...]:
    """Those of the Service of the cluster's name server; empty: it has none."""
    service = services.get(DNS_SERVICE)
    return tuple(_address(a) for a in get(service, "spec", "clusterIPs", default=()) if a != "None")


async def _tell_services(network: HostNetwork, followed: Mapping[Resource, Informer], port: int) -> None:
    services, slices = followed[SERVICES], followed[ENDPOINT_SLICES]
    changed = _changes(lambda *_: True, services, slices)
    while True:
        changed.clear()
        addresses = dns_addresses(services.store)
        network.set_resolver(Resolver(addresses, port) if addresses else None)
        served = (s for s in services.store if key_of(s) != DNS_SERVICE)  # by each host itself
        network.set_services(tuple(service_ports(served, slices.store)))
        await changed.wait()
        await asyncio.sleep(GATHER_S)


async def _tell_policies(
    network: HostNetwork, followed: Mapping[Resource, Informer], stores: Mapping[Resource, Store]
) -> None:
    def source(connected: Sequence[ConnectedPod]) -> Policies:
        dns = resolver(dns_addresses(stores[SERVICES]))
        return compile_policies(stores[NETWORK_POLICIES], stores[PODS], stores[NAMESPACES], connected, dns)

    changed = _changes(matters, followed[NETWORK_POLICIES], followed[PODS], followed[NAMESPACES])
    while True:
        changed.clear()
        network.set_policies(source)
        await changed.wait()
        await asyncio.sleep(GATHER_S)


def _changes(matter: Callable[[Object, Object], bool], *informers: Informer) -> asyncio.Event:
    """Is set by each change of an object that matters."""
    changed = asyncio.Event()

    def updated(old: Object, new: Object) -> None:
        if matter(old, new):
            changed.set()

    for informer in informers:
        informer.add_handler(Handler(added=lambda _: changed.set(), updated=updated, deleted=lambda _: changed.set()))
    return changed


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


@lru_cache(maxsize=65536)
def _address(text: str) -> Address:
    """Parsed once: a change of one endpoint looks at those of all Services."""
    return ipaddress.ip_address(text)


def service_ports(services: Iterable[Object], slices: Iterable[Object]) -> Iterator[ServicePort]:
    """Every port of every Service that has an address, with the endpoints that are ready."""
    by_service: dict[tuple[str, str], list[Object]] = defaultdict(list)
    for piece in slices:
        name = get(piece, "metadata", "labels", SERVICE_NAME, default="")
        by_service[str(get(piece, "metadata", "namespace")), str(name)].append(piece)
    for service in services:
        key = (str(get(service, "metadata", "namespace")), str(get(service, "metadata", "name")))
        addresses = tuple(_address(a) for a in get(service, "spec", "clusterIPs", default=()) if a != "None")
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
                    yield Endpoint(_address(address), int(ports[0]["port"]))


def chain_name(namespace: str, name: str, port: str) -> str:
    """A name that nft takes (letters, digits, '-'; not too long), and no two ports share."""
    digest = hashlib.sha256(f"{namespace}/{name}/{port}".encode()).hexdigest()[:12]
    return f"{namespace[:24]}-{name[:48]}-{digest}".replace(".", "-")
