"""The master: API server, scheduler and controllers over one store.

Theory of operation
-------------------
::

    state folder -> store (locked by its owner) -> registry in memory -> keys and roles -> listen -> system namespaces
                                                                                                -> controllers (serving)
    store closed <- registry <- controllers end <- streams end, requests under way are answered <- SIGTERM or SIGINT

It keeps nothing outside the store and its keys: killed at any point, the next one goes on from there.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import functools
import gc
import hashlib
import os
import signal
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

from hypervisor.errors import Conflict, InvalidInput, Unavailable
from hypervisor.kube import kubeconfig
from hypervisor.kube.client import ApiClient
from hypervisor.kube.errors import ApiError
from hypervisor.kube.resources import NAMESPACES
from hypervisor.master import listening, logs
from hypervisor.master.admission.chain import plugins
from hypervisor.master.admission.plugin import Chain
from hypervisor.master.admission.quota import ResourceQuota
from hypervisor.master.admission.service_addresses import ServiceAddresses
from hypervisor.master.api.audit import Audit
from hypervisor.master.api.inside import Inside
from hypervisor.master.api.kubelet import Kubelets
from hypervisor.master.api.local import LocalClient
from hypervisor.master.api.managed import Managed
from hypervisor.master.api.metrics import Metrics
from hypervisor.master.api.objects import Objects
from hypervisor.master.api.server import Server
from hypervisor.master.api.view import RegistryView
from hypervisor.master.auth import bootstrap, parties
from hypervisor.master.auth.ca import client_context, server_context
from hypervisor.master.auth.certificates import CertificateController
from hypervisor.master.auth.stack import Auth, open_auth
from hypervisor.master.controllers.leader import Leadership
from hypervisor.master.controllers.nodelifecycle import GRACE_S
from hypervisor.master.controllers.run import run_control_loops
from hypervisor.master.custom.catalog import Catalog
from hypervisor.master.kinds.table import KINDS, Kinds
from hypervisor.master.network import own_service
from hypervisor.master.network.pools import Pools
from hypervisor.master.network.ranges import Ranges, first_address
from hypervisor.master.registry.registry import Registry
from hypervisor.master.schema.load import Schema
from hypervisor.master.store.base import Store
from hypervisor.master.store.etcd_tls import EtcdTls
from hypervisor.master.store.sqlite import SqliteStore
from hypervisor.version import __version__

SYSTEM_NAMESPACES = ("default", "kube-system", "kube-public", "kube-node-lease")
DEFAULT_PORT = 6443


@dataclass(frozen=True, slots=True)
class MasterConfig:
    """How a master is run.

    :ivar state: folder of the store and the keys; made if it is not there
    :ivar port: 0 lets the kernel choose one
    :ivar store: ``sqlite``, or ``etcd:`` followed by endpoints with commas between
    :ivar names: other host names and addresses by which clients call this server
    :ivar controllers: False: objects are kept and nothing acts on them
    :ivar node_grace_s: without a sign of life for so long a node is taken for lost
    :ivar approve_serving: False: somebody has to approve the serving certificates of nodes, as upstream has it
    :ivar etcd_tls: how it proves to etcd who it is
    :ivar ranges: of the addresses of Services, of node ports and of nodes' pods
    """

    state: Path
    address: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    store: str = "sqlite"
    names: tuple[str, ...] = ()
    controllers: bool = True
    node_grace_s: float = GRACE_S
    ranges: Ranges = field(default_factory=Ranges.parse)
    etcd_tls: EtcdTls = field(default_factory=EtcdTls)
    approve_serving: bool = True

    @property
    def pki(self) -> Path:
        """Keys and certificates."""
        return self.state / "pki"


@dataclass(frozen=True, slots=True)
class Master:
    """A master that serves.

    :ivar port: where it listens
    """

    config: MasterConfig
    inside: Inside
    auth: Auth
    client: ApiClient
    port: int


def main(config: MasterConfig, ready: Callable[[Master], None] | None = None) -> int:
    """Runs a master in the foreground until SIGTERM or SIGINT.

    :param ready: called once clients are answered
    :raises HvError: it cannot run here
    """
    import uvloop  # its TLS connections take a third of the memory of asyncio's, and less time

    logs.set_up(config.state)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(config, ready))
    return 0


async def serve(config: MasterConfig, ready: Callable[[Master], None] | None = None) -> None:
    """Serves until a signal comes.

    :param ready: called once clients are answered
    """
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    async with running(config) as master:
        if ready is not None:
            ready(master)
        await stopping.wait()
        structlog.get_logger().info("master ends")


@asynccontextmanager
async def running(config: MasterConfig) -> AsyncIterator[Master]:
    """A master that serves; leaving ends it.

    :raises Unavailable: the address is taken
    :raises InvalidInput: the configuration, or damaged keys
    """
    log = structlog.get_logger()
    await asyncio.to_thread(_private, config.state)
    async with AsyncExitStack() as stack:
        stack.enter_context(_full_disk_is_told(config.state))
        stack.enter_context(_locked(config.state))
        store = await _open_store(config)
        stack.push_async_callback(store.close)
        kept = [k for k in KINDS if k.stored and k.kept_as is None]
        registry = await Registry.open(store, kept)
        stack.push_async_callback(registry.close)
        bound = stack.enter_context(listening.bound(config.address, config.port))
        port = int(bound.getsockname()[1])
        kinds = Kinds(KINDS)
        inside, auth = await asyncio.to_thread(_make_inside, config, kinds, registry, port)
        inside.audit.start()
        stack.push_async_callback(inside.audit.close)
        stack.push_async_callback(inside.kubelets.close)
        client = LocalClient(inside)
        await _prepare(client)
        await stack.enter_async_context(_custom_kinds(client, kinds, registry))
        await own_service.ensure(client, config.ranges, config.address, port)
        _settle_memory()
        tls = await asyncio.to_thread(_server_tls, config, auth)
        await stack.enter_async_context(listening.served(bound, Server(inside), tls))
        await asyncio.to_thread(_write_kubeconfig, config, auth, port)
        if config.controllers:
            await stack.enter_async_context(_control_loops(client, auth, registry, config))
        log.info("master serves", version=__version__, pid=os.getpid(), address=config.address, port=port)
        yield Master(config, inside, auth, client, port)


@asynccontextmanager
async def _custom_kinds(client: ApiClient, kinds: Kinds, registry: Registry) -> AsyncIterator[None]:
    """Kinds that users have defined are served, and so are those that they define later."""
    catalog = Catalog(client, kinds, registry)
    await catalog.start()
    async with _running(catalog.run(), "custom kinds"):
        yield


def _identity(config: MasterConfig) -> str:
    """The same for each process of this master; its lock makes sure that there is one at a time."""
    where = hashlib.sha256(str(config.state.resolve()).encode()).hexdigest()[:12]
    return f"{socket.gethostname()}_{where}"


@contextmanager
def _locked(state: Path) -> Iterator[None]:
    fd = os.open(state / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(f"{state} is in use by another master: stop that one first") from None
        yield
    finally:
        os.close(fd)


@asynccontextmanager
async def _running(work: Coroutine[Any, Any, None], name: str) -> AsyncIterator[None]:
    task = asyncio.create_task(work, name=name)
    task.add_done_callback(_report_end)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def _control_loops(
    client: ApiClient, auth: Auth, registry: Registry, config: MasterConfig
) -> AsyncIterator[None]:
    """Scheduler and controllers, until the context is left."""
    view = RegistryView(KINDS, registry)
    certificates = CertificateController(client, auth.ca, auth.authorizer, view, approve_serving=config.approve_serving)
    loops = functools.partial(
        run_control_loops,
        client,
        ca_pem=auth.ca.pem.decode(),
        collected=[k.resource for k in KINDS if k.stored and k.kept_as is None],
        node_grace_s=config.node_grace_s,
        pod_networks=config.ranges.pods,
        more=(certificates,),
    )
    # SQLite's file has one master, by its lock; of those on one etcd one at a time acts.
    alone = config.store == "sqlite"
    work = loops() if alone else Leadership(client, _identity(config)).run(loops)
    async with _running(work, "control loops"):
        yield


def _report_end(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        structlog.get_logger().error("the master has lost a part", part=task.get_name(), exc_info=task.exception())


@contextmanager
def _full_disk_is_told(state: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        if e.errno != errno.ENOSPC:
            raise
        raise Unavailable(f"the disk of {state} is full; make room, then start the master again") from e


def _private(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)


async def _open_store(config: MasterConfig) -> Store:
    if config.store == "sqlite":
        return await SqliteStore.open(config.state / "store.db")
    scheme, _, endpoints = config.store.partition(":")
    if scheme == "etcd" and endpoints:
        from hypervisor.master.store.etcd import EtcdStore

        tls = await asyncio.to_thread(config.etcd_tls.context)
        return await EtcdStore.connect(tuple(map(_url, endpoints.split(","))), tls=tls)
    raise InvalidInput('write "sqlite" or "etcd:HOST:PORT[,HOST:PORT...]"', where="store")


def _url(endpoint: str) -> str:
    return endpoint if "://" in endpoint else f"http://{endpoint}"


def _make_inside(config: MasterConfig, kinds: Kinds, registry: Registry, port: int) -> tuple[Inside, Auth]:
    view = RegistryView(kinds, registry)
    auth = open_auth(config.pki, view)
    schema = Schema.load()
    schema.preload(*(kind.schema for kind in KINDS))
    addresses = ServiceAddresses(config.ranges, Pools(view, lambda: registry.revision))
    quota = ResourceQuota(view, lambda: registry.revision)
    admission = Chain((*plugins(view), addresses, *auth.plugins, quota))
    objects = Objects(kinds, registry, schema, admission, Managed(schema))
    metrics = Metrics()
    metrics.gauge("apiserver_store_revision", "Newest revision in memory.", lambda: registry.revision)
    inside = Inside(
        objects,
        auth.authenticator,
        auth.authorizer,
        auth.rbac,
        auth.tokens,
        Kubelets(client_context(parties.kubelet_client(auth.ca), auth.ca.certificate_file)),
        Audit(config.state / "audit.log"),
        metrics,
        f"https://{_reachable(config.address)}:{port}",
    )
    return inside, auth


async def _prepare(client: LocalClient) -> None:
    """What every cluster has from its first moment."""
    for name in SYSTEM_NAMESPACES:
        try:
            await client.create(NAMESPACES, {"metadata": {"name": name}})
        except ApiError as e:
            if e.reason != "AlreadyExists":
                raise
    await bootstrap.reconcile(client)


def _server_tls(config: MasterConfig, auth: Auth) -> ssl.SSLContext:
    services = [first_address(network) for network in config.ranges.services]
    pair = parties.api_server(auth.ca, (config.address, *config.names, *services))
    return server_context(pair, auth.ca.certificate_file)


def _write_kubeconfig(config: MasterConfig, auth: Auth, port: int) -> None:
    """For the administrator: everything in one file, to be copied where it is needed."""
    pair = parties.admin(auth.ca).read_bytes()
    key_at = pair.index(b"-----BEGIN PRIVATE KEY")
    server = f"https://{_reachable(config.address)}:{port}"
    certificate, key = pair[:key_at], pair[key_at:]
    made = kubeconfig.render(server=server, ca=auth.ca.pem, user=parties.ADMIN, certificate=certificate, key=key)
    kubeconfig.write(config.state / "admin.kubeconfig", made)


def _reachable(address: str) -> str:
    """How a client on this machine calls a server that listens there."""
    if address in ("0.0.0.0", "::"):
        return "127.0.0.1" if address == "0.0.0.0" else "[::1]"
    return f"[{address}]" if ":" in address else address


def _settle_memory() -> None:
    """What is there by now stays: the collector need not look at it again, and looks less often at the rest."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
