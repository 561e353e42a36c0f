"""``hv port-forward`` for click: help, ports and mistakes. What it does is in `hypervisor.cli.forwarding`."""

from __future__ import annotations

import ipaddress

import click

from hypervisor.cli import complete
from hypervisor.cli.app import Settings, pass_settings

Ports = tuple[tuple[int, int], ...]


def parse_ports(text: str) -> tuple[int, int]:
    """``REMOTE``, ``LOCAL:REMOTE`` or ``:REMOTE`` as (local port, port in the pod); 0 is any free one.

    :raises click.BadParameter: something else
    """
    local, colon, remote = text.rpartition(":")
    if not colon:
        local = remote
    try:
        return _number(local or "0", 0), _number(remote, 1)
    except ValueError:
        raise click.BadParameter(f"{text!r} is not [LOCAL:]REMOTE; ports are 1 to 65535") from None


def _number(text: str, low: int) -> int:
    if not (text.isascii() and text.isdigit() and low <= int(text[:6]) < 65536):
        raise ValueError(text)
    return int(text)


def _ports(_ctx: click.Context, _parameter: click.Parameter, texts: tuple[str, ...]) -> Ports:
    return tuple(map(parse_ports, texts))


def _address(_ctx: click.Context, _parameter: click.Parameter, text: str) -> str:
    try:
        return "127.0.0.1" if text == "localhost" else str(ipaddress.ip_address(text))
    except ValueError:
        raise click.BadParameter(f"{text!r} is no IP address") from None


@click.command("port-forward")
@click.argument("pod", shell_complete=complete.pod_names)
@click.argument("ports", nargs=-1, required=True, metavar="[LOCAL:]REMOTE...", callback=_ports)
@click.option(
    "--address",
    default="127.0.0.1",
    show_default=True,
    metavar="IP",
    callback=_address,
    help="Where to listen. Whoever reaches it reaches the pod's ports.",
)
@pass_settings
def port_forward(settings: Settings, pod: str, ports: Ports, address: str) -> None:
    """Make ports of a pod reachable on this machine, until Ctrl-C.

    Connections go to 127.0.0.1 in the pod, so that servers which listen there alone are reached too. :REMOTE takes a
    free local port. A connection that the pod refuses is told on standard error and ends; the others go on.

    \b
    hv port-forward web 8080:80
    hv port-forward web :80 5432
    """
    from hypervisor.cli.forwarding import run_forward

    run_forward(settings.state, pod, ports, address)
