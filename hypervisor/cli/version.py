"""``hv version``."""

from __future__ import annotations

import platform

import click

from hypervisor.cli import output
from hypervisor.cli.app import Settings, pass_settings
from hypervisor.version import __version__


@click.command("version")
@output.format_option("table", "json", "yaml")
@pass_settings
def version(settings: Settings, output: str) -> None:
    """Print the versions of hv and of the running daemon.

    Starts no daemon.
    """
    found: dict[str, object] = {"hv": __version__, "python": platform.python_version(), "hostd": None}
    connection = settings.connect_running()
    if connection is not None:
        with connection:
            found["hostd"] = connection.get("hv", "v1", "version")
    print_version(found, output)


def print_version(found: dict[str, object], fmt: str) -> None:
    """Prints it in a format."""
    hostd = found["hostd"]
    rows = [["hv", str(found["hv"])], ["python", str(found["python"])]]
    if isinstance(hostd, dict):
        rows.append(["hostd", str(hostd.get("version", "?"))])
    else:
        rows.append(["hostd", "not running"])
    output.show(found, fmt, names=(), header=("WHAT", "VERSION"), rows=rows)
