"""``hv attach``: join a running container's own process."""

from __future__ import annotations

from typing import Any

import click

from hypervisor.cli import complete, follow
from hypervisor.cli.app import Settings, pass_settings
from hypervisor.cli.execute import first_container, usable_tty
from hypervisor.cli.output import note
from hypervisor.cli.pods import containers
from hypervisor.cli.state import pod_reference
from hypervisor.errors import HvError, NotFound


@click.command("attach")
@click.argument("pod", shell_complete=complete.pod_names)
@click.option(
    "-c", "--container", metavar="NAME", shell_complete=complete.container_names, help="Default: the pod's first."
)
@click.option("--no-stdin", is_flag=True, help="Only watch.")
@click.option("--replay", is_flag=True, help="Begin with what the container has written so far.")
@pass_settings
def attach(settings: Settings, pod: str, container: str | None, no_stdin: bool, replay: bool) -> int:
    """Join the standard streams of a container's own process.

    Standard input is sent where the container has one (hv run -i); with a terminal (-t) ctrl-p ctrl-q leaves it
    running. Without a terminal Ctrl-C only ends hv; the container goes on. Exit code: the container's.
    """
    namespace, name = pod_reference(pod)
    with settings.connect_any() as connection:
        container = container or first_container(connection, namespace, name)
        found = connection.get("hv", "v1", "pods", namespace, name)
    spec = _container(found, container)
    stdin = bool(spec.get("stdin")) and not no_stdin
    tty = usable_tty(bool(spec.get("tty")), stdin)
    outcome = follow.join(settings.state, found, container, stdin=stdin, tty=tty, replay=replay)
    if outcome.detached:
        note(f"left {name} running")
        return 0
    if outcome.exit_code is None:
        raise HvError(f"attach to pod {name}: {outcome.message}")
    return outcome.exit_code


def _container(pod: dict[str, Any], name: str) -> dict[str, Any]:
    for container in containers(pod):
        if container.get("name") == name:
            return container
    known = ", ".join(str(c.get("name")) for c in containers(pod))
    raise NotFound(f"the pod has no container {name}; it has {known}")
