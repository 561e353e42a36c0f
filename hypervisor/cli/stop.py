"""``hv stop`` and ``hv rm``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import click

from hypervisor.cli import complete
from hypervisor.cli.app import Settings, pass_settings
from hypervisor.cli.output import note
from hypervisor.cli.pods import name_of
from hypervisor.cli.rest import Connection, target
from hypervisor.cli.state import pod_reference
from hypervisor.errors import HvError, InvalidInput


@click.command("stop")
@click.argument("pods", nargs=-1, required=True, metavar="POD...", shell_complete=complete.pod_names)
@click.option("-t", "--time", "seconds", type=click.IntRange(min=0), metavar="SECONDS", help="Grace period.")
@pass_settings
def stop(settings: Settings, pods: Sequence[str], seconds: int | None) -> int:
    """Stop pods; their logs stay until hv rm.

    Each container gets its stop signal (SIGTERM, unless its image says otherwise), then the grace period (default:
    the pod's terminationGracePeriodSeconds, 30), then SIGKILL. Then the VM is switched off.
    """
    query = [("gracePeriodSeconds", str(seconds))] if seconds is not None else []

    def one(connection: Connection, namespace: str, name: str) -> None:
        connection.post("hv", "v1", "pods", namespace, name, "stop", query=query).read()

    return each(settings, pods, one)


@click.command("rm")
@click.argument("pods", nargs=-1, required=True, metavar="POD...", shell_complete=complete.pod_names)
@click.option("-f", "--force", is_flag=True, help="Also a running pod: it is killed, without a grace period.")
@pass_settings
def rm(settings: Settings, pods: Sequence[str], force: bool) -> int:
    """Remove pods and everything that belongs to them.

    Their writable disks, volumes and logs are gone for good. A running pod is refused without --force: stop it first.
    """

    def one(connection: Connection, namespace: str, name: str) -> None:
        if not force:
            _refuse_running(connection.get("hv", "v1", "pods", namespace, name))
        query = [("gracePeriodSeconds", "0"), ("wait", "1")]
        connection.call("DELETE", target(("hv", "v1", "pods", namespace, name), query)).read()

    return each(settings, pods, one)


def _refuse_running(pod: dict[str, object]) -> None:
    status = pod.get("status")
    phase = status.get("phase") if isinstance(status, dict) else None
    if phase not in ("Succeeded", "Failed"):
        name = name_of(pod)
        raise InvalidInput(f"pod {name} is {str(phase).lower()}; run: hv stop {name}, or add --force")


def each(settings: Settings, pods: Sequence[str], do: Callable[[Connection, str, str], None]) -> int:
    """Does it to each pod, goes on after a failure, prints each pod that is done; 1 if any failed."""
    failed = 0
    for pod in pods:
        try:
            namespace, name = pod_reference(pod)
            with settings.connect_any(None) as connection:
                do(connection, namespace, name)
            click.echo(pod)
        except HvError as e:
            note(str(e))
            failed = 1
    return failed
