"""``hv image``: the host's images."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from hypervisor.cli import complete, output, progress
from hypervisor.cli.app import CONTEXT, Settings, pass_settings
from hypervisor.cli.podspec import PULL_POLICIES
from hypervisor.cli.rest import target
from hypervisor.errors import HostUnfit, HvError, InvalidInput

HEADER = ("NAME", "ID", "SIZE", "CREATED")
WIDE = (*HEADER, "DIGEST")


@click.group("image", context_settings=CONTEXT)
def image() -> None:
    """Pull, import, list and remove images.

    Each image becomes one read-only virtual disk that all its containers share.
    """


@image.command("pull")
@click.argument("name")
@click.option(
    "--policy",
    type=click.Choice(list(PULL_POLICIES)),
    default="always",
    show_default=True,
    help="missing: not if it is here already.",
)
@pass_settings
def pull(settings: Settings, name: str, policy: str) -> None:
    """Fetch an image from its registry.

    Credentials: those of hv image login, skopeo and docker.
    """
    with settings.connect_any(None) as connection:
        answer = connection.post("hv", "v1", "images", "pull", value={"reference": name, "policy": policy})
        click.echo(_shown(progress.follow(answer, name)))


@image.command("import")
@click.argument("archive", type=click.Path())
@click.option("--name", help="Name for the image. Default: the one in the archive.")
@pass_settings
def import_(settings: Settings, archive: str, name: str | None) -> None:
    """Import an image from a file.

    ARCHIVE is an OCI archive, a folder in OCI layout, or a docker archive, as docker save makes it.
    """
    path = Path(archive).absolute()
    if not path.exists():
        raise InvalidInput(f"there is no file {archive}")
    with settings.connect_any(None) as connection:
        answer = connection.post("hv", "v1", "images", "import", value={"path": str(path), "name": name})
        click.echo(_shown(progress.follow(answer, path.name)))


def _shown(result: dict[str, Any]) -> str:
    """The names of what a pull or an import made."""
    images = result.get("images") or [result.get("image") or {}]
    return "\n".join(str((i.get("names") or [i.get("id", "?")])[0]) for i in images)


@image.command("ls")
@output.format_option()
@pass_settings
def ls(settings: Settings, output: str) -> None:
    """List images."""
    with settings.connect_any() as connection:
        answer = connection.get("hv", "v1", "images")
    print_images(answer, output)


def print_images(answer: Any, fmt: str) -> None:
    """Prints hostd's list in a format: a line for each name; one without a name is listed as (none)."""
    named = [(n, i) for i in complete.images_of(answer) for n in i.get("names") or ["(none)"]]
    named.sort(key=lambda pair: pair[0])
    wide = fmt == "wide"
    rows = [_row(name, found, wide) for name, found in named]
    names = [str(found.get("id")) if name == "(none)" else name for name, found in named]
    output.show(answer, fmt, names=names, header=WIDE if wide else HEADER, rows=rows)


def _row(name: str, found: dict[str, Any], wide: bool) -> list[str]:
    created = str(found.get("created") or "")
    age = "-" if created < "1981" else output.age_since(created)  # reproducible images say 1970 or 1980
    row = [name, str(found.get("id", "?"))[:12], output.size(found.get("size_bytes")), age]
    return [*row, str(found.get("digest") or "-")] if wide else row


@image.command("rm")
@click.argument("names", nargs=-1, required=True, metavar="NAME...", shell_complete=complete.image_names)
@pass_settings
def rm(settings: Settings, names: Sequence[str]) -> int:
    """Remove images. One that a pod uses is refused."""
    failed = 0
    for name in names:
        try:
            with settings.connect_any(None) as connection:
                connection.call("DELETE", target(("hv", "v1", "images"), [("reference", name)])).read()
            click.echo(name)
        except HvError as e:
            output.note(str(e))
            failed = 1
    return failed


@image.command("prune")
@output.format_option("table", "json")
@pass_settings
def prune(settings: Settings, output: str) -> None:
    """Remove every image that no pod uses."""
    with settings.connect_any(None) as connection:
        answer = connection.post("hv", "v1", "images", "prune").json()
    print_pruned(answer, output)


def print_pruned(answer: Any, fmt: str) -> None:
    """Prints what a prune removed."""
    if fmt == "json":
        output.emit(output.as_json(answer))
        return
    removed = answer.get("removed") or () if isinstance(answer, dict) else answer
    for item in removed:
        names = item.get("names") or [item.get("id")] if isinstance(item, dict) else [item]
        click.echo(", ".join(str(n) for n in names))


@image.command("login")
@click.argument("registry")
@click.option("-u", "--username", help="Default: asked for.")
@click.option("--password-stdin", is_flag=True, help="Read the password from standard input.")
@pass_settings
def login(settings: Settings, registry: str, username: str | None, password_stdin: bool) -> int:
    """Store credentials for a registry.

    They are stored after the registry has accepted them. Done by skopeo login: they are where skopeo, podman and
    buildah look for them too.
    """
    program = shutil.which("skopeo")
    if program is None:
        raise HostUnfit("skopeo is not installed; run: apt install skopeo")
    command = [program, "login"]
    command += ["--username", username] if username else []
    command += ["--password-stdin"] if password_stdin else []
    if not password_stdin and not sys.stdin.isatty():
        raise InvalidInput("there is no terminal to ask for a password on; add --username and --password-stdin")
    return subprocess.run([*command, registry], check=False).returncode
