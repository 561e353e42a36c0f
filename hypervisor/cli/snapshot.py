"""``hv suspend`` and ``hv resume``: a pod's VM goes into files, and comes back out of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import click

from hypervisor.cli import complete
from hypervisor.cli.app import Settings, pass_settings
from hypervisor.cli.rest import Connection
from hypervisor.cli.stop import each


@click.command("suspend")
@click.argument("pods", nargs=-1, required=True, metavar="POD...", shell_complete=complete.pod_names)
@pass_settings
def suspend(settings: Settings, pods: Sequence[str]) -> int:
    """Put running pods into files; hv resume brings them back.

    A pod's memory, devices and disk are written, and its VM's processes end: it uses neither CPU nor memory. It stays
    listed, as Suspended. Its connections to the outside do not outlive a long suspension. A VM that was started cold
    cannot be suspended.
    """
    return each(settings, pods, functools.partial(_post, "suspend"))


@click.command("resume")
@click.argument("pods", nargs=-1, required=True, metavar="POD...", shell_complete=complete.pod_names)
@pass_settings
def resume(settings: Settings, pods: Sequence[str]) -> int:
    """Have suspended pods go on where they were.

    Memory is loaded as it is touched. The same QEMU, CPU model and guest image are needed as when the pod was
    suspended; where they differ, the command says in what, and the pod stays suspended.
    """
    return each(settings, pods, functools.partial(_post, "resume"))


def _post(verb: str, connection: Connection, namespace: str, name: str) -> None:
    connection.post("hv", "v1", "pods", namespace, name, verb).read()
