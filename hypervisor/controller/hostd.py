"""The host's daemon: owns pods and images, serves them over HTTP on loopback.

Theory of operation
-------------------
::

    lock --> zygote, image store --> pods of an earlier daemon taken over --> listen --> host.json --> (serving)
                                                                                             |
    lock released <-- zygote ended <-- pods let go (VMs run on) <-- listening ends <-- SIGTERM, SIGINT or host/stop

Killed at any point it leaves VMs that run, folders that say what they are, and a lock that the kernel has released: the
next daemon goes on from there. ``host.json`` may then name a process that has gone; clients see that nobody listens.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import structlog
from aiohttp import web

from hypervisor.controller import hostfiles, logs
from hypervisor.controller.api import Host, make_app
from hypervisor.controller.images import StoredImages
from hypervisor.controller.node.config import NodeConfig
from hypervisor.controller.node.node import check as check_node
from hypervisor.controller.node.node import run_node
from hypervisor.controller.node.objects import ClusterObjects
from hypervisor.controller.node.register import Facts
from hypervisor.controller.paths import HostPaths, state_directory
from hypervisor.controller.podobjects import HostObjects
from hypervisor.controller.pods import Pods
from hypervisor.controller.services import Services, Times
from hypervisor.controller.sizing import MemoryLedger
from hypervisor.controller.static_pods import StaticPods
from hypervisor.controller.vmhost import VmHost, open_vm_host
from hypervisor.errors import InvalidInput, Unavailable
from hypervisor.images.store import ImageStore
from hypervisor.introspect.agent import AgentClient
from hypervisor.introspect.kept import KeptConnections
from hypervisor.net.devices import enable_forwarding
from hypervisor.net.network import HostNetwork, parse_ranges
from hypervisor.version import __version__
from hypervisor.vmm.config import AcceleratorWish

DRAIN_S = 1.0
"""How long requests that are under way may go on after the daemon was asked to end."""
MAX_REQUEST_LINE = 8 * 1024 * 1024
"""Bytes: exec's command line is in the URL, Linux takes 2 MiB of it, and a quoted byte has three characters."""
STARTS_PER_CPU = 2


@dataclass(frozen=True, slots=True)
class HostConfig:
    """How a daemon is run.

    :ivar port: 0 lets the kernel choose one
    :ivar starts: VMs that may be starting at the same time
    :ivar warm: VMs that are kept ready for pods
    :ivar node: how it takes part in a cluster; None: it stands alone
    :ivar pod_network: pods have addresses of their own, which the host routes; else QEMU's user-mode network
    :ivar pod_cidrs: the host's ranges; empty: those that its Node is given
    :ivar cluster_cidrs: ranges of other hosts' pods and of services
    """

    paths: HostPaths
    address: str = "127.0.0.1"
    port: int = 0
    accelerator: AcceleratorWish = "auto"
    starts: int = field(default_factory=lambda: STARTS_PER_CPU * (os.cpu_count() or 1))
    times: Times = field(default_factory=Times)
    node: NodeConfig | None = None
    warm: int = 0
    pod_network: bool = False
    pod_cidrs: tuple[str, ...] = ()
    cluster_cidrs: tuple[str, ...] = ()


def main(
    state_dir: str | os.PathLike[str] | None = None, node: NodeConfig | None = None, *, warm: int = 0,
    pod_network: bool = False, pod_cidrs: tuple[str, ...] = (), cluster_cidrs: tuple[str, ...] = (),
) -> int:  # fmt: skip
    """Runs a daemon in the foreground until a signal or ``hv host stop`` ends it.

    :raises HvError: it cannot run here; nothing was changed that the next start would not mend
    """
    config = HostConfig(
        state_directory(Path(state_dir) if state_dir else None), node=node, warm=warm,
        pod_network=pod_network or bool(pod_cidrs), pod_cidrs=pod_cidrs, cluster_cidrs=cluster_cidrs,
    )  # fmt: skip
    if config.pod_network and node is None and not pod_cidrs:
        raise InvalidInput("a host that is in no cluster needs --pod-cidr for its pod network")
    if pod_cidrs:
        parse_ranges(pod_cidrs, cluster_cidrs)
    if node is not None:
        check_node(node)
    asyncio.run(serve(config))
    return 0


async def serve(config: HostConfig) -> None:
    """Serves a host until it is asked to end; pods run on.

    :raises Conflict: another daemon serves this state directory
    :raises HostUnfit: this machine cannot run VMs
    """
    paths = config.paths
    await asyncio.to_thread(hostfiles.prepare, paths)
    with hostfiles.only_daemon(paths):
        logs.set_up(paths.log)
        log = structlog.get_logger()
        log.info("hostd starts", version=__version__, pid=os.getpid(), state=str(paths.root))
        store = await ImageStore.open(paths.images)
        ledger = MemoryLedger()
        network = HostNetwork(paths.network) if config.pod_network else None
        if network is not None and config.pod_cidrs:
            network.set_ranges(config.pod_cidrs, config.cluster_cidrs)
        if network is not None and config.node is not None:
            network.hold()
        prefix = network.tap_prefix if network is not None else ""
        async with open_vm_host(paths, config.accelerator, ledger, warm=config.warm, tap_prefix=prefix) as machines:
            found = machines.capabilities
            kvm = found.kvm_unusable or "usable"
            log.info("host", kvm=kvm, vsock=found.vsock, qemu=".".join(map(str, found.qemu_version)))
            async with _networked(network):
                await _serve_pods(config, store, machines, ledger, network)
        log.info("hostd has ended; its pods run on")


@asynccontextmanager
async def _networked(network: HostNetwork | None) -> AsyncIterator[None]:
    """While it is open the kernel is kept as the pod network needs it."""
    if network is None:
        yield
        return
    enable_forwarding()
    keeping = asyncio.create_task(network.run(), name="pod network")
    try:
        yield
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)


async def _serve_pods(
    config: HostConfig, store: ImageStore, machines: VmHost, ledger: MemoryLedger, network: HostNetwork | None
) -> None:
    objects = ClusterObjects()
    kept = KeptConnections()
    services = Services(
        machines=machines,
        images=StoredImages(store),
        ledger=ledger,
        starts=asyncio.Semaphore(config.starts),
        times=config.times,
        objects=objects if config.node else HostObjects(),
        network=network,
        connect=partial(AgentClient, kept=kept),
    )
    pods = Pods(config.paths, services)
    try:
        await pods.load()
        if network is not None:
            network.keep_only({pod.stored.uid for pod in pods})
        static = StaticPods(config.paths.manifests, pods)
        stopping = _Stopping()
        token = await asyncio.to_thread(hostfiles.token, config.paths)
        host = Host(token, str(config.paths.root), pods, static, store, stopping.ask)
        async with _in_cluster(config, machines, pods, store, objects, network):
            await _listen(config, make_app(host), static, stopping)
    finally:
        await pods.close()
        kept.close()


@asynccontextmanager
async def _in_cluster(
    config: HostConfig, machines: VmHost, pods: Pods, store: ImageStore, objects: ClusterObjects,
    network: HostNetwork | None,
) -> AsyncIterator[None]:  # fmt: skip
    """While it is open this host is a node, where it is to be one."""
    if config.node is None:
        yield
        return
    found = machines.capabilities
    runtime = f"podvisor://{__version__}"
    facts = Facts(found.choose_accelerator(config.accelerator), runtime, config.paths.root)
    node = asyncio.create_task(run_node(config.node, facts, pods, store, objects, network=network), name="node")
    try:
        yield
    finally:
        node.cancel()
        await asyncio.gather(node, return_exceptions=True)


class _Stopping:
    """Signals and ``host/stop`` end the daemon through this."""

    def __init__(self) -> None:
        self.closing = asyncio.Event()
        self.ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self.ask, False)

    def ask(self, pods_first: bool) -> None:
        """The daemon is to end; with `pods_first` only no static pod is started any more, until it is asked again."""
        self.closing.set()
        if not pods_first:
            self.ended.set()


async def _listen(config: HostConfig, app: web.Application, static: StaticPods, stopping: _Stopping) -> None:
    runner = web.AppRunner(
        app, handler_cancellation=True, access_log=None, shutdown_timeout=DRAIN_S, max_line_size=MAX_REQUEST_LINE
    )
    await runner.setup()
    watching = asyncio.create_task(_watch(static, stopping), name="static pods")
    try:
        site = web.TCPSite(runner, config.address, config.port, backlog=1024)
        try:
            await site.start()
        except OSError as e:
            raise Unavailable(f"cannot listen on {config.address} port {config.port}: {e.strerror}") from e
        address, port = runner.addresses[0][:2]
        await asyncio.to_thread(hostfiles.announce, config.paths, address, port)
        structlog.get_logger().info("listening", address=address, port=port)
        await stopping.ended.wait()
    finally:
        hostfiles.withdraw(config.paths)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await runner.cleanup()


async def _watch(static: StaticPods, stopping: _Stopping) -> None:
    watching = asyncio.create_task(static.run())
    try:
        await stopping.closing.wait()
    finally:
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
