"""``hv logs``: what a container wrote."""

from __future__ import annotations

import re
import sys
from datetime import datetime

import click

from hypervisor.cli import complete
from hypervisor.cli.app import Settings, pass_settings
from hypervisor.cli.execute import first_container
from hypervisor.cli.rest import target
from hypervisor.cli.state import pod_reference

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smhd])")


def since_query(text: str) -> tuple[str, str]:
    """``5m``, ``1h30m``, ``90`` (seconds) or an RFC 3339 time as a query pair.

    :raises click.BadParameter: neither
    """
    if text.isdecimal():
        text += "s"
    parts = _DURATION.findall(text)
    if parts and "".join(n + u for n, u in parts) == text:
        seconds = sum(float(n) * _UNITS[u] for n, u in parts)
        return "sinceSeconds", str(max(1, round(seconds)))
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise click.BadParameter(
            f"{text!r} is no duration such as 90s, 5m, 1h30m, and no time such as 2026-01-31T12:00:00Z"
        ) from None
    return "sinceTime", (moment if moment.tzinfo else moment.astimezone()).isoformat()


def _since(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[str, str] | None:
    return None if value is None else since_query(value)


@click.command("logs")
@click.argument("pod", shell_complete=complete.pod_names)
@click.option(
    "-c", "--container", metavar="NAME", shell_complete=complete.container_names, help="Default: the pod's first."
)
@click.option("-f", "--follow", is_flag=True, help="Go on with what is written from now on, until the container ends.")
@click.option("-n", "--tail", type=click.IntRange(min=0), metavar="N", help="Only the last N lines.")
@click.option("--since", callback=_since, metavar="WHEN", help="Only what is newer: 90s, 5m, 1h30m, or a time.")
@click.option("-p", "--previous", is_flag=True, help="Of the container's previous instance, before it was restarted.")
@click.option("--timestamps", is_flag=True, help="Begin each line with its time.")
@click.option("--limit-bytes", type=click.IntRange(min=1), metavar="N", help="At most N bytes.")
@pass_settings
def logs(
    settings: Settings,
    pod: str,
    container: str | None,
    follow: bool,
    tail: int | None,
    since: tuple[str, str] | None,
    previous: bool,
    timestamps: bool,
    limit_bytes: int | None,
) -> None:
    """Print what a container wrote to its standard output and error.

    Both streams, in the order in which they were written. Works for pods that have ended, until they are removed.
    """
    flags = {"follow": follow, "previous": previous, "timestamps": timestamps}
    query = [(name, "true") for name, wanted in flags.items() if wanted]
    query += [(n, str(v)) for n, v in (("tailLines", tail), ("limitBytes", limit_bytes)) if v is not None]
    query += [since] if since else []
    namespace, name = pod_reference(pod)
    with settings.connect_any(None) as connection:
        container = container or first_container(connection, namespace, name)
        response = connection.call("GET", target(("containerLogs", namespace, name, container), query))
        for data in response.chunks():
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
