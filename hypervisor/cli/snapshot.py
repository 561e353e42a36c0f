"""``hv suspend``, ``hv resume``, ``hv snapshot`` and ``hv fork``: a pod's VM as files."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import click

from hypervisor.cli import complete
from hypervisor.cli import output as out
from hypervisor.cli.app import Settings, pass_settings
from hypervisor.cli.rest import Connection, target
from hypervisor.cli.state import pod_reference
from hypervisor.cli.stop import each


@click.command("suspend")
@click.argument("pods", nargs=-1, required=True, metavar="POD...", shell_complete=complete.pod_names)
@pass_settings
def suspend(settings: Settings, pods: Sequence[str]) -> int:
    """Put running pods into files; hv resume brings them back.

    A pod's memory, devices and disk are written, and its VM's processes end: it uses neither CPU nor memory. It stays
    listed, as Suspended. Its connections to the outside do not outlive a long suspension. A VM that was started cold
    cannot be suspended.
    """
    return each(settings, pods, functools.partial(_post, "suspend"))


@click.command("resume")
@click.argument("pods", nargs=-1, required=True, metavar="POD...", shell_complete=complete.pod_names)
@pass_settings
def resume(settings: Settings, pods: Sequence[str]) -> int:
    """Have suspended pods go on where they were.

    Memory is loaded as it is touched. The same QEMU, CPU model and guest image are needed as when the pod was
    suspended; where they differ, the command says in what, and the pod stays suspended.
    """
    return each(settings, pods, functools.partial(_post, "resume"))


def _post(verb: str, connection: Connection, namespace: str, name: str) -> None:
    connection.post("hv", "v1", "pods", namespace, name, verb).read()


@click.command("fork")
@click.argument("pod", metavar="POD", shell_complete=complete.pod_names)
@click.option("--count", type=click.IntRange(1, 100), default=1, metavar="N", help="How many children. Default: 1.")
@out.format_option()
@pass_settings
def fork(settings: Settings, pod: str, count: int, output: str) -> None:
    """Make several of a running pod, each going on from now.

    Children are pods of their own, named POD-1, POD-2, ...: the same processes with the same memory and files, with
    new random numbers, addresses and host names. /run/podvisor-fork.json in each container says which child it is. What
    is printed last is how long the parent stood still.
    """
    namespace, name = pod_reference(pod)
    with settings.connect_any(None) as connection:
        made = connection.post("hv", "v1", "pods", namespace, name, "fork", query=[("count", str(count))]).json()
    names = made["children"]
    out.show(made, output, names=names, header=("NAME",), rows=[[name] for name in names])
    out.note(f"pod {name} stood still for {_ms(made)} ms")


@click.group("snapshot")
def snapshot() -> None:
    """Take, list, restore and remove snapshots of running pods.

    A snapshot has a pod's memory, devices and disk as they were. The pod goes on; only what differs from its snapshot
    before, or from what it was started from, is written. Snapshots belong to their pod and go with it.
    """


@snapshot.command("create")
@click.argument("pod", metavar="POD", shell_complete=complete.pod_names)
@click.argument("name", metavar="NAME")
@pass_settings
def create(settings: Settings, pod: str, name: str) -> None:
    """Take a snapshot; the pod goes on."""
    namespace, of = pod_reference(pod)
    with settings.connect_any(None) as connection:
        made = connection.post("hv", "v1", "pods", namespace, of, "snapshots", name).json()
    click.echo(name)
    pages = made["took"]["pages"]
    out.note(f"pod {of} stood still for {_ms(made)} ms; {pages} pages ({pages * 4 / 1024:.1f} MiB) were written")


@snapshot.command("ls")
@click.argument("pod", metavar="POD", shell_complete=complete.pod_names)
@out.format_option()
@pass_settings
def ls(settings: Settings, pod: str, output: str) -> None:
    """List a pod's snapshots, the oldest first.

    SIZE is what removing it would free: what it shares with others counts for none.
    """
    namespace, name = pod_reference(pod)
    with settings.connect_any() as connection:
        listed = connection.get("hv", "v1", "pods", namespace, name, "snapshots")
    items = listed["items"]
    header = ("NAME", "AGE", "SIZE", "LAYERS")
    out.show(listed, output, names=[s["name"] for s in items], header=header, rows=[_row(s) for s in items])


def _row(item: dict[str, Any]) -> list[str]:
    if "damaged" in item:
        return [item["name"], "-", "damaged", "-"]
    created = datetime.fromtimestamp(item["created"], UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return [item["name"], out.age_since(created), out.size(item["bytes"]), str(item["layers"])]


@snapshot.command("rm")
@click.argument("pod", metavar="POD", shell_complete=complete.pod_names)
@click.argument("name", metavar="NAME")
@pass_settings
def rm(settings: Settings, pod: str, name: str) -> None:
    """Remove a snapshot; others, later ones too, stay whole."""
    namespace, of = pod_reference(pod)
    with settings.connect_any(None) as connection:
        connection.call("DELETE", target(("hv", "v1", "pods", namespace, of, "snapshots", name))).read()
    click.echo(name)


@snapshot.command("restore")
@click.argument("pod", metavar="POD", shell_complete=complete.pod_names)
@click.argument("name", metavar="NAME")
@pass_settings
def restore(settings: Settings, pod: str, name: str) -> None:
    """Have a running pod go on from a snapshot; what it did since is given up."""
    namespace, of = pod_reference(pod)
    with settings.connect_any(None) as connection:
        connection.post("hv", "v1", "pods", namespace, of, "snapshots", name, "restore").read()
    click.echo(name)


def _ms(made: dict[str, Any]) -> str:
    return f"{made['took']['paused_s'] * 1000:.0f}"
