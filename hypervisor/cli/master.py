"""``hv master``: the API server with its scheduler and controllers, in the foreground."""

from __future__ import annotations

from pathlib import Path

import click

from hypervisor.cli import cluster_networks
from hypervisor.cli.cluster_networks import Networks

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command("master")
@click.option("--state-dir", "state", metavar="DIR", required=True, help="Where the store and the keys are.")
@click.option("--address", metavar="IP", default="127.0.0.1", show_default=True, help="Where to listen.")
@click.option("--port", metavar="PORT", type=click.IntRange(0, 65535), default=6443, show_default=True)
@click.option(
    "--store",
    metavar="STORE",
    default="sqlite",
    show_default=True,
    help="Where objects are kept: sqlite, or etcd:HOST:PORT[,HOST:PORT...].",
)
@click.option(
    "--node-grace-seconds",
    "node_grace",
    metavar="SECONDS",
    type=click.FloatRange(1),
    default=40.0,
    show_default=True,
    help="Without a sign of life for so long, a node is taken for lost.",
)
@click.option("--name", "names", metavar="NAME", multiple=True, help="Another name or address of this server. Repeat.")
@click.option(
    "--approve-serving/--no-approve-serving",
    default=True,
    show_default=True,
    help="Approve nodes' serving certificates unasked. Upstream waits for: kubectl certificate approve.",
)
@click.option("--etcd-cafile", metavar="FILE", type=_FILE, help="The authority of etcd's certificates.")
@click.option("--etcd-certfile", metavar="FILE", type=_FILE, help="The certificate that this server shows to etcd.")
@click.option("--etcd-keyfile", metavar="FILE", type=_FILE, help="Its key.")
@cluster_networks.options(Networks())
def master(
    state: str,
    address: str,
    port: int,
    store: str,
    node_grace: float,
    names: tuple[str, ...],
    approve_serving: bool,
    etcd_cafile: Path | None,
    etcd_certfile: Path | None,
    etcd_keyfile: Path | None,
    services: str,
    pods: str,
    node_ports: str,
) -> int:
    """Run a cluster's master in the foreground: API server, scheduler, controllers.

    SIGTERM ends it; no pod stops for that. The state folder holds the store (unless --store names etcd), the cluster's
    certificate authority and admin.kubeconfig; nobody but its owner can read it.
    """
    from hypervisor.master.daemon import MasterConfig, main
    from hypervisor.master.network.ranges import Ranges
    from hypervisor.master.store.etcd_tls import EtcdTls

    ranges, etcd = Ranges.parse(services, pods, node_ports), EtcdTls(etcd_cafile, etcd_certfile, etcd_keyfile)
    config = MasterConfig(
        Path(state),
        address,
        port,
        store,
        names,
        node_grace_s=node_grace,
        ranges=ranges,
        etcd_tls=etcd,
        approve_serving=approve_serving,
    )
    return main(config)
