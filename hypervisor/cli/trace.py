"""``hv trace``: what happens around a pod's VM, as a file for Perfetto and Chrome."""

from __future__ import annotations

from pathlib import Path

import click

from hypervisor.cli import complete
from hypervisor.cli.app import Settings, pass_settings
from hypervisor.cli.output import note
from hypervisor.cli.rest import target
from hypervisor.cli.state import pod_reference
from hypervisor.errors import InvalidInput


@click.command("trace")
@click.argument("pod", shell_complete=complete.pod_names)
@click.option("--hypervisor", is_flag=True, help="Of the VM's device process; there is no other trace yet.")
@click.option("-s", "--seconds", type=click.IntRange(1, 60), default=5, show_default=True, help="How long.")
@click.option("-f", "--file", "path", type=click.Path(dir_okay=False, path_type=Path), default=Path("trace.json"),
              show_default=True, help="Where to write it.")  # fmt: skip
@pass_settings
def trace(settings: Settings, pod: str, hypervisor: bool, seconds: int, path: Path) -> None:
    """Record what the hypervisor does for a pod, event by event.

    Page faults served, turns of the vsock device and block requests, each with its time, thread and CPU: the newest
    8192 of each CPU, merged by time. The file is a Chrome trace; open it in ui.perfetto.dev or chrome://tracing.
    """
    if not hypervisor:
        raise InvalidInput("say --hypervisor: what happens inside of the guest cannot be traced yet")
    where = target(("hv", "v1", "pods", *pod_reference(pod), "trace"), [("seconds", str(seconds))])
    with settings.connect_any(None) as connection:
        data = b"".join(connection.call("GET", where).chunks())
    path.write_bytes(data)
    events = data.count(b'"name"')
    note(f"{path}: {events} events in {seconds} s")
