"""``hv hostd`` and ``hv host``: the daemon that owns this host's pods."""

from __future__ import annotations

import os
import select
from pathlib import Path
from typing import Any

import click

from hypervisor.cli import output
from hypervisor.cli.app import CONTEXT, Settings, pass_settings
from hypervisor.cli.rest import Connection
from hypervisor.errors import Timeout

STOP_TIMEOUT = 120.0  # seconds, pods with their grace periods included


@click.command("hostd")
@pass_settings
def hostd(settings: Settings) -> int:
    """Run the host's daemon in the foreground.

    Commands that need it start it in the background by themselves. SIGTERM ends it and leaves its pods running; the
    next one finds them again. A second one on the same state folder is refused.
    """
    from hypervisor.controller.hostd import main

    code = main(settings.state)
    return int(code or 0)


@click.group("host", context_settings=CONTEXT)
def host() -> None:
    """Start, stop and inspect the host's daemon."""


@host.command("start")
@pass_settings
def start(settings: Settings) -> None:
    """Start the daemon in the background, if it does not run yet.

    Its output goes to hostd.log in the state folder.
    """
    with settings.connect() as connection:
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
    if connection is None and pods and _has_pods(settings.state):
        connection = settings.connect(None)
    if connection is None:
        click.echo("hostd does not run")
        return
    with connection:
        stop_host(connection, pods=pods)
    click.echo("hostd stopped" + (", no pod is left" if pods else "; its pods go on running"))


def _has_pods(state: str) -> bool:
    folder = Path(state, "pods")
    return folder.is_dir() and any(folder.iterdir())


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
