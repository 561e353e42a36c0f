"""``hv ps``: the pods of this host."""

from __future__ import annotations

import click

from hypervisor.cli import output, pods, route
from hypervisor.cli.app import Settings, pass_settings

HEADER = ("NAME", "STATUS", "RESTARTS", "AGE", "IMAGE")
WIDE = (*HEADER, "IP", "CONTAINERS", "UID")


@click.command("ps")
@output.format_option()
@pass_settings
def ps(settings: Settings, output: str) -> None:
    """List pods.

    All of them: those that run, those that wait, and those that have ended and were not removed; with hv -n NAMESPACE
    those of that namespace. -o json prints the v1 PodList that GET /pods answers with.
    """
    with settings.connect_any() as connection:
        listed = connection.get("hv", "v1", "pods")
    items = sorted(listed.get("items") or (), key=pods.name_of)
    if where := route.chosen_namespace():
        items = [p for p in items if (p["metadata"].get("namespace") or "default") == where]
        listed = {**listed, "items": items}
    wide = output == "wide"
    show(listed, output, items, wide)


def show(listed: object, fmt: str, items: list[pods.Pod], wide: bool) -> None:
    """Prints pods in a format."""
    rows = [_row(p, wide) for p in items]
    output.show(listed, fmt, names=[pods.name_of(p) for p in items], header=WIDE if wide else HEADER, rows=rows)


def _row(pod: pods.Pod, wide: bool) -> list[str]:
    created = (pod.get("metadata") or {}).get("creationTimestamp")
    images = ", ".join(dict.fromkeys(str(c.get("image")) for c in pods.containers(pod)))
    row = [pods.name_of(pod), pods.describe(pod), str(pods.restarts(pod)), output.age_since(created), images]
    if wide:
        status = pod.get("status") or {}
        names = ", ".join(str(c.get("name")) for c in pods.containers(pod))
        row += [str(status.get("podIP") or "-"), names, str((pod.get("metadata") or {}).get("uid") or "-")]
    return row
