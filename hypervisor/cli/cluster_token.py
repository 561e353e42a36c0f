"""``hv cluster token``: what other machines need to join a cluster."""

from __future__ import annotations

import re
import time
from pathlib import Path

import click

from hypervisor.cli import output
from hypervisor.cli.app import CONTEXT, Settings, pass_settings
from hypervisor.cli.cluster import cluster
from hypervisor.cli.nodes import kubeconfig_option, open_api
from hypervisor.errors import InvalidInput, NotFound
from hypervisor.kube import bootstrap_tokens as tokens
from hypervisor.kube import kubeconfig as kubeconfigs
from hypervisor.kube.errors import ApiError
from hypervisor.kube.resources import SECRETS

__all__ = ["cluster"]

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DAY = "24h"


def seconds_of(text: str) -> float | None:
    """A time as users write it: ``90s``, ``24h``, ``1h30m``; None for ``0``, which is for ever.

    :raises InvalidInput: it is none
    """
    if text == "0":
        return None
    parts = re.findall(r"(\d+)([smhd])", text)
    if not parts or "".join(n + u for n, u in parts) != text:
        raise InvalidInput(f"{text!r} is no time; write it as 90s, 30m, 24h or 7d, or 0 for ever", where="--ttl")
    return float(sum(int(number) * _UNITS[unit] for number, unit in parts))


@cluster.group("token", context_settings=CONTEXT)
def token() -> None:
    """Tokens with which other machines join the cluster."""


@token.command("create")
@click.option("--ttl", metavar="TIME", default=_DAY, show_default=True, help="How long it is good; 0: for ever.")
@click.option("--description", metavar="TEXT", default="", help="What it is for.")
@click.option(
    "--join-file", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path), help="Write for hv host join."
)
@kubeconfig_option
@pass_settings
def create(settings: Settings, ttl: str, description: str, join_file: Path | None, kubeconfig: Path | None) -> None:
    """Make a token, and print it.

    With --join-file it goes, with the server's address and certificate authority, into a file (mode 0600) for hv host
    join on the other machine.
    """
    made = tokens.new(seconds_of(ttl), description)
    with open_api(settings, kubeconfig) as api:
        api.create(SECRETS, tokens.secret_of(made), tokens.NAMESPACE)
        if join_file is None:
            click.echo(str(made))
            return
        content = kubeconfigs.render(server=api.server, ca=api.ca(), user="tls-bootstrap-token-user", token=str(made))
    kubeconfigs.write(join_file, content)
    click.echo(f"{join_file}: on the other machine: hv host join {join_file.name} --node-name NAME --output FILE")


@token.command("list")
@output.format_option("table", "json", "yaml")
@kubeconfig_option
@pass_settings
def list_(settings: Settings, output: str, kubeconfig: Path | None) -> None:
    """List the tokens, without their secrets."""
    with open_api(settings, kubeconfig) as api:
        secrets = api.list(SECRETS, tokens.NAMESPACE, fieldSelector=f"type={tokens.TYPE}")
    found = [t for t in map(tokens.of_secret, secrets) if t is not None]
    shown: list[dict[str, object]] = [{"id": t.id, "expires": t.expires, "description": t.description} for t in found]
    show_tokens(shown, [[t.id, _left(t.expires), t.description] for t in found], output)


def show_tokens(shown: list[dict[str, object]], rows: list[list[str]], fmt: str) -> None:
    """Prints them in a format."""
    output.show(shown, fmt, names=(), header=("ID", "LEFT", "DESCRIPTION"), rows=rows)


def _left(expires: float | None) -> str:
    if expires is None:
        return "forever"
    left = expires - time.time()
    return output.age(left) if left > 0 else "expired"


@token.command("delete")
@click.argument("identifiers", metavar="ID...", nargs=-1, required=True)
@kubeconfig_option
@pass_settings
def delete(settings: Settings, identifiers: tuple[str, ...], kubeconfig: Path | None) -> None:
    """Revoke tokens, named by their ID or whole. Nodes that joined with them stay."""
    with open_api(settings, kubeconfig) as api:
        for identifier in identifiers:
            name = identifier.partition(".")[0]
            try:
                api.delete(SECRETS, tokens.PREFIX + name, tokens.NAMESPACE)
            except ApiError as error:
                if error.reason != "NotFound":
                    raise
                raise NotFound(f"there is no token {name}; see: hv cluster token list") from error
            click.echo(name)
