"""``hv console``: the console of a pod's VM."""

from __future__ import annotations

import sys

import click

from hypervisor.cli import complete
from hypervisor.cli.app import Settings, pass_settings
from hypervisor.cli.output import note
from hypervisor.cli.rest import target
from hypervisor.cli.state import pod_reference


@click.command("console")
@click.argument("pod", shell_complete=complete.pod_names)
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes, until the VM is off.")
@click.option("-n", "--tail", type=click.IntRange(min=0), metavar="N", help="Only the last N lines.")
@pass_settings
def console(settings: Settings, pod: str, follow: bool, tail: int | None) -> None:
    """Print the console of a pod's VM: kernel and agent messages.

    This is the place to look when a pod does not come up. What containers write is in hv logs.
    """
    query = [("follow", "1")] if follow else []
    query += [("tail", str(tail))] if tail is not None else []
    with settings.connect_any(None) as connection:
        where = target(("hv", "v1", "pods", *pod_reference(pod), "console"), query)
        printed = False
        for data in connection.call("GET", where).chunks():
            printed = printed or bool(data)
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
    if not printed and tail != 0:
        note("the VM has printed nothing; one that was cloned from a template has booted before (hv run --cold boots)")
