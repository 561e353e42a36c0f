"""``hv hostd`` and ``hv host``: the daemon that owns this host's pods."""

from __future__ import annotations

import os
import select
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hypervisor.cli import output
from hypervisor.cli.app import CONTEXT, Settings, pass_settings
from hypervisor.cli.rest import QUICK, Connection
from hypervisor.errors import Conflict, InvalidInput, Timeout

if TYPE_CHECKING:
    from hypervisor.controller.node.config import NodeConfig

WARM = click.IntRange(0, 1000)
STOP_TIMEOUT = 120.0  # seconds, pods with their grace periods included


@click.command("hostd")
@click.option("--kubeconfig", metavar="FILE", help="Take part in the cluster of this API server, as a node of it.")
@click.option("--node-name", metavar="NAME", help="The node's name. Default: the machine's.")
@click.option(
    "--node-address",
    metavar="IP",
    help="Where the API server reaches this node. Default: the address by which this machine reaches the API server.",
)
@click.option("--node-port", metavar="PORT", type=click.IntRange(1, 65535), default=10250, help="Default: 10250.")
@click.option("--node-label", metavar="KEY=VALUE", multiple=True, help="A label of the node; may be given again.")
@click.option("--node-cpus", metavar="N", type=click.IntRange(1), help="CPUs to offer. Default: all.")
@click.option("--node-memory", metavar="SIZE", help="Memory to offer, as 4Gi. Default: all but what the host needs.")
@click.option("--max-pods", metavar="N", type=click.IntRange(1), default=110, help="Pods to take. Default: 110.")
@click.option("--client-ca", metavar="FILE", help="CA of callers of the node's server. Default: the kubeconfig's.")
@click.option("--warm", metavar="N", type=WARM, default=0, help="VMs to keep ready for pods. Default: 0.")
@click.option("--pod-network", is_flag=True, help="Give pods addresses that others reach; the node's ranges are used.")
@click.option("--pod-cidr", metavar="CIDR", multiple=True, help="The same, with this range; one of IPv4, one of IPv6.")
@click.option("--cluster-cidr", metavar="CIDR", multiple=True, help="Of all pods and Services; may be given again.")
@pass_settings
def hostd(
    settings: Settings,
    /,
    kubeconfig: str | None,
    warm: int,
    pod_network: bool,
    pod_cidr: tuple[str, ...],
    cluster_cidr: tuple[str, ...],
    **node: Any,
) -> int:
    """Run the host's daemon in the foreground.

    Commands that need it start it in the background by themselves. SIGTERM ends it and leaves its pods running; the
    next one finds them again. A second one on the same state folder is refused.

    With --warm it keeps VMs that are through their start: a pod that sets no limits takes one at once. Each uses
    memory all the time; they are given up when a pod needs it.

    With --kubeconfig it is a node of a Kubernetes cluster, too; the other options say what kind of node.
    """
    from hypervisor.controller.hostd import main

    config = _node(kubeconfig, cluster_cidrs=cluster_cidr, **node) if kubeconfig else None
    network: dict[str, Any] = {"pod_network": pod_network, "pod_cidrs": pod_cidr, "cluster_cidrs": cluster_cidr}
    code = main(settings.state, config, warm=warm, **network)
    return int(code or 0)


def _node(
    kubeconfig: str,
    *,
    node_name: str | None,
    node_address: str | None,
    node_port: int,
    node_label: tuple[str, ...],
    node_cpus: int | None,
    node_memory: str | None,
    max_pods: int,
    client_ca: str | None,
    cluster_cidrs: tuple[str, ...],
) -> NodeConfig:
    from hypervisor.controller.node.config import NodeConfig
    from hypervisor.kube.quantity import parse_bytes

    path = Path(kubeconfig).absolute()
    return NodeConfig(
        name=node_name or socket.gethostname().lower(),
        kubeconfig=path,
        address=node_address or _address_towards(path),
        port=node_port,
        labels=tuple(_label(text) for text in node_label),
        cpus=node_cpus,
        memory_bytes=None if node_memory is None else parse_bytes(node_memory, where="--node-memory"),
        max_pods=max_pods,
        client_ca=Path(client_ca).absolute() if client_ca else None,
        cluster_cidrs=cluster_cidrs,
    )


def _label(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise click.BadParameter(f"{text!r} is not KEY=VALUE", param_hint="--node-label")
    return key, value


def _address_towards(kubeconfig: Path) -> str:
    """This machine's address on the way to the API server; nothing is sent."""
    from urllib.parse import urlsplit

    from hypervisor.kube.kubeconfig import load

    server = urlsplit(load(kubeconfig).server)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((server.hostname or "", server.port or 443))
        except OSError as e:
            raise InvalidInput(f"no way to {server.hostname}: {e.strerror}", where="--node-address") from e
        return str(probe.getsockname()[0])


@click.group("host", context_settings=CONTEXT)
def host() -> None:
    """Start, stop and inspect the host's daemon."""


@host.command("start")
@click.option("--warm", metavar="N", type=WARM, help="VMs to keep ready for pods; see hv hostd. Default: 0.")
@pass_settings
def start(settings: Settings, warm: int | None) -> None:
    """Start the daemon in the background, if it does not run yet.

    Its output goes to hostd.log in the state folder.
    """
    from hypervisor.cli.starter import start_host

    running = settings.connect_running() if warm is not None else None
    if running is not None:
        running.close()
        raise Conflict("hostd runs already; end it (hv host stop, its pods go on running) to start it with --warm")
    connection = settings.connect() if warm is None else start_host(settings.state, QUICK, ("--warm", str(warm)))
    with connection:
        connection.get("hv", "v1", "version")
    click.echo(f"hostd runs; its state is in {settings.state}")


@host.command("stop")
@click.option("--pods", is_flag=True, help="Stop and remove all pods first. Without it they go on running.")
@pass_settings
def stop(settings: Settings, pods: bool) -> None:
    """Stop the daemon. Harmless when it does not run.

    With --pods a daemon that does not run is started first if it left pods, since only it can find and stop them.
    """
    connection = settings.connect_running(None)
    if connection is None and pods and _has_vms(settings.state):
        connection = settings.connect(None)
    if connection is None:
        click.echo("hostd does not run")
        return
    with connection:
        stop_host(connection, pods=pods)
    click.echo("hostd stopped" + (", no pod is left" if pods else "; its pods go on running"))


def _has_vms(state: str) -> bool:
    """Whether a daemon left pods, or one that was killed a warm pool."""
    return any(folder.is_dir() and any(folder.iterdir()) for folder in (Path(state, "pods"), Path(state, "warm")))


def stop_host(connection: Connection, *, pods: bool) -> None:
    """Asks the daemon to end and waits until it has.

    :raises Timeout: it has not within `STOP_TIMEOUT`
    """
    pid = connection.endpoint.pid
    try:
        fd = os.pidfd_open(pid)
    except OSError:
        fd = -1
    connection.post("hv", "v1", "host", "stop", query=[("pods", "1")] if pods else []).read()
    if fd < 0:
        return
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        if not poll.poll(STOP_TIMEOUT * 1000):
            raise Timeout(f"hostd (process {pid}) has not ended after {STOP_TIMEOUT:g} s; see its log")
    finally:
        os.close(fd)


@host.command("status")
@output.format_option("table", "json", "yaml")
@pass_settings
def status(settings: Settings, output: str) -> int:
    """Say whether the daemon runs, where, and what it has. Exit code: 0 if it runs, else 1."""
    connection = settings.connect_running()
    found: dict[str, Any] = {"running": connection is not None, "state": settings.state}
    if connection is not None:
        with connection:
            found |= _details(connection)
    print_status(found, output)
    return 0 if found["running"] else 1


def _details(connection: Connection) -> dict[str, Any]:
    endpoint = connection.endpoint
    listed = connection.get("hv", "v1", "pods").get("items") or []
    return {
        "pid": endpoint.pid,
        "address": f"{endpoint.address}:{endpoint.port}",
        "log": f"{endpoint.state}/hostd.log",
        "pods": len(listed),
    }


def print_status(found: dict[str, Any], fmt: str) -> None:
    """Prints it in a format."""
    words = {True: "yes", False: "no"}
    rows = [[key, words[value] if isinstance(value, bool) else str(value)] for key, value in found.items()]
    output.show(found, fmt, names=(), header=("WHAT", "VALUE"), rows=rows)
