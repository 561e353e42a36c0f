"""``hv host join``: a machine gets the certificate of a node."""

from __future__ import annotations

from pathlib import Path

import click

from hypervisor.cli.nodes import host
from hypervisor.errors import Timeout
from hypervisor.kube import kubeconfig as kubeconfigs
from hypervisor.kube.kubeconfig import KubeConfig

__all__ = ["host"]


@host.command("join")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--node-name", metavar="NAME", required=True, help="The node's name.")
@click.option("--output", "target", metavar="FILE", required=True, type=click.Path(dir_okay=False, path_type=Path))
@click.option("--timeout", metavar="SECONDS", type=float, default=60.0, show_default=True, help="How long to wait.")
def join(file: Path, node_name: str, target: Path, timeout: float) -> None:
    """Get a node's certificate with a file of hv cluster token create --join-file.

    FILE may also be the node's own kubeconfig: its certificate is then renewed. Afterwards run
    hv hostd --node-name NAME --kubeconfig OUTPUT.
    """
    import asyncio

    config = kubeconfigs.load(file)
    try:
        certificate, key = asyncio.run(_certificate(config, node_name, timeout))
    except TimeoutError as error:
        why = "the certificate was not signed in time; somebody may have to approve it: kubectl get csr"
        raise Timeout(why) from error
    user = f"system:node:{node_name}"
    ca = config.ca.read()
    made = kubeconfigs.render(server=config.server, ca=ca, user=user, certificate=certificate, key=key)
    kubeconfigs.write(target, made)
    click.echo(f"{target}: run hv hostd --node-name {node_name} --kubeconfig {target}")


async def _certificate(config: KubeConfig, node: str, timeout: float) -> tuple[bytes, bytes]:
    import asyncio

    from hypervisor.kube.http import HttpApiClient
    from hypervisor.kube.joining import node_certificate

    async with HttpApiClient(config) as client, asyncio.timeout(timeout):
        return await node_certificate(client, node)
