"""This host as a node: its parts, started together and ended together. Whatever happens to them, pods run on."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import structlog

from hypervisor.controller.node.callers import Callers
from hypervisor.controller.node.certificate import ServingCertificate
from hypervisor.controller.node.client_certificate import ClientCertificate
from hypervisor.controller.node.config import Beats, NodeConfig
from hypervisor.controller.node.kubelet import kubelet_app, serve_kubelet
from hypervisor.controller.node.objects import ClusterObjects
from hypervisor.controller.node.podnetwork import follow_cluster
from hypervisor.controller.node.podsync import PodSync
from hypervisor.controller.node.register import Facts, NodeObject
from hypervisor.controller.pods import Pods
from hypervisor.errors import InvalidInput
from hypervisor.images.store import ImageStore
from hypervisor.kube import kubeconfig
from hypervisor.kube.events import EventRecorder
from hypervisor.kube.http import HttpApiClient
from hypervisor.net.network import HostNetwork
from hypervisor.version import __version__
from hypervisor.vmm.templates.store import TemplateStore

AGENT = f"podvisor-hostd/{__version__}"
AGAIN_S = 5.0
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")


def check(config: NodeConfig) -> kubeconfig.KubeConfig:
    """The kubeconfig of a node.

    :raises InvalidInput: the name cannot be a node's, or the kubeconfig cannot be used
    :raises NotFound: there is no kubeconfig
    """
    if not _NAME.fullmatch(config.name):
        raise InvalidInput(
            f"{config.name!r} is no node's name: lower case letters, digits, '-' and '.'", where="--node"
        )
    found = kubeconfig.load(config.kubeconfig)
    found.tls()
    return found


async def run_node(
    config: NodeConfig,
    facts: Facts,
    pods: Pods,
    images: ImageStore,
    objects: ClusterObjects,
    *,
    beats: Beats | None = None,
    network: HostNetwork | None = None,
) -> None:
    """Takes part in the cluster, for ever. After a bug in it all of it is started anew.

    :param objects: gets its volumes' contents through this node's connection
    :param network: is told the node's addresses and the cluster's Services
    """
    log = structlog.get_logger().bind(node=config.name)
    while True:
        try:
            await _run(config, facts, pods, images, objects, beats or Beats(), network)
        except Exception:
            log.exception("the node's side failed; it is started again", after_s=AGAIN_S)
            await asyncio.sleep(AGAIN_S)


async def _run(
    config: NodeConfig, facts: Facts, pods: Pods, images: ImageStore, objects: ClusterObjects, beats: Beats,
    network: HostNetwork | None,
) -> None:  # fmt: skip
    access = await asyncio.to_thread(check, config)
    ca = await asyncio.to_thread(_callers_ca, config, access)
    async with HttpApiClient(access, agent=AGENT) as client:
        with objects.through(client) as services:
            async with asyncio.TaskGroup() as group:
                group.create_task(services.run(), name="services")
                if network is not None:
                    following = follow_cluster(client, config.name, network, config.cluster_cidrs)
                    group.create_task(following, name="pod network")
                group.create_task(_parts(config, facts, pods, images, client, ca, beats), name="parts")


async def _parts(
    config: NodeConfig,
    facts: Facts,
    pods: Pods,
    images: ImageStore,
    client: HttpApiClient,
    ca: bytes,
    beats: Beats,
) -> None:
    events = EventRecorder(client, "kubelet", config.name)
    templates = TemplateStore(facts.state_dir / "templates").sizes
    node = NodeObject(client, config, facts, lambda: images_status(images), beats, templates)
    certificate = ServingCertificate(client, config.name, config.address, _certificate_file(facts.state_dir))
    own = ClientCertificate(client, config.name, config.kubeconfig)
    app = kubelet_app(pods, Callers(client, config.name), config.name, facts.state_dir)
    async with asyncio.TaskGroup() as group:
        group.create_task(node.run(), name="node")
        group.create_task(events.run(), name="events")
        group.create_task(PodSync(client, pods, config, events, beats).run(), name="pod sync")
        group.create_task(certificate.run(), name="serving certificate")
        group.create_task(own.run(), name="client certificate")
        group.create_task(serve_kubelet(app, config, certificate, ca), name="kubelet's server")


def _callers_ca(config: NodeConfig, access: kubeconfig.KubeConfig) -> bytes:
    if config.client_ca is None:
        return access.ca.read()
    return kubeconfig.Source(path=config.client_ca).read()


def _certificate_file(state_dir: Path) -> Path:
    return state_dir / "node-serving.pem"


def images_status(images: ImageStore) -> Sequence[Mapping[str, Any]]:
    """The stored images, largest first, as a Node's status lists them."""
    listed = [{"names": list(image.names), "sizeBytes": image.size_bytes} for image in images.list() if image.names]
    return sorted(listed, key=lambda i: i["sizeBytes"], reverse=True)
