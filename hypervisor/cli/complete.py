"""Completion of arguments from what the host has: pods, containers, images. Never starts a daemon, never fails."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import click
from click.shell_completion import split_arg_string

from hypervisor.cli import pods, words
from hypervisor.cli.connect import connect_running
from hypervisor.cli.state import pod_reference, state_dir
from hypervisor.errors import HvError

PATIENCE = 1.0  # seconds: a Tab key that hangs is worse than one that finds nothing
Completer = Callable[[click.Context, click.Parameter, str], list[str]]


def _ask(ctx: click.Context, *path: str) -> Any:
    """What hostd answers on a path; None when it does not."""
    state = ctx.find_root().params.get("state_dir")
    try:
        connection = connect_running(state_dir(state), PATIENCE)
        if connection is None:
            return None
        with connection:
            return connection.get("hv", "v1", *path)
    except (HvError, OSError):
        return None


def pod_names(ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Names of pods that begin so, without those that the line has already."""
    found = _ask(ctx, "pods") or {}
    names = [pods.name_of(p) for p in found.get("items") or ()]
    given = ctx.params.get("pods") or ()
    return [n for n in names if n.startswith(incomplete) and n not in given]


def container_names(ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Names of the containers of the pod that the line names."""
    pod = ctx.params.get("pod") or _pod_on_the_line(ctx)
    if not pod:
        return []
    try:
        found = _ask(ctx, "pods", *pod_reference(pod)) or {}
    except HvError:
        return []
    return [str(c["name"]) for c in pods.containers(found) if str(c.get("name", "")).startswith(incomplete)]


def _pod_on_the_line(ctx: click.Context) -> str | None:
    """click has no positional arguments to offer while the last option still lacks its value."""
    typed = split_arg_string(os.environ.get("COMP_WORDS", ""))
    after = typed[typed.index(ctx.info_name) + 1 :] if ctx.info_name in typed else []
    own, _ = words.split(after, ("-c", "--container"))
    return next((word for word in own if not word.startswith("-")), None)


def image_names(ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Names of images, and the short forms that mean them."""
    found = _ask(ctx, "images") or {}
    names: set[str] = set()
    for image in images_of(found):
        for name in image.get("names") or ():
            names |= {name, short_name(name)}
    return sorted(n for n in names if n.startswith(incomplete))


def images_of(answer: Any) -> list[dict[str, Any]]:
    """The list in hostd's answer to ``GET /hv/v1/images``."""
    items = answer.get("images", ()) if isinstance(answer, dict) else answer
    return [i for i in items or () if isinstance(i, dict)]


def short_name(name: str) -> str:
    """What a person would type for a full image name."""
    for prefix in ("localhost/podvisor/", "localhost/", "docker.io/library/", "docker.io/"):
        if name.startswith(prefix):
            name = name.removeprefix(prefix)
            break
    return name.removesuffix(":latest")
