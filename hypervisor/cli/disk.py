"""``hv disk``: virtual disks and their chains of I/O filters. A disk that a pod has open is changed where it runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hypervisor.cli import live_disk, output
from hypervisor.cli.app import CONTEXT, Settings, pass_settings
from hypervisor.errors import HvError, InvalidInput, Unavailable

if TYPE_CHECKING:
    from hypervisor.iofilter.spec import FilterSpec
    from hypervisor.iofilter.store import DiskStore

HEADER = ("NAME", "SIZE", "USED", "PARENT", "FILTERS", "OPEN")


def disk_store(settings: Settings) -> DiskStore:
    """The disks below the state folder."""
    from hypervisor.iofilter.store import DiskStore

    return DiskStore(Path(settings.state) / "disks")


def disk_names(ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Completion."""
    from hypervisor.cli.state import state_dir
    from hypervisor.iofilter.store import DiskStore

    root = Path(state_dir(ctx.find_root().params.get("state_dir"))) / "disks"
    return [name for name in DiskStore(root).names() if name.startswith(incomplete)]


def filter_kinds(_ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Completion."""
    from hypervisor.iofilter.loop import filter_classes

    return [found.name for found in filter_classes() if found.name.startswith(incomplete)]


def size_argument(text: str) -> int:
    """A size as ``10Gi`` or ``512M``, rounded up to whole blocks."""
    from hypervisor.iofilter.store import round_size
    from hypervisor.kube.quantity import parse_bytes

    return round_size(parse_bytes(text, where="size"))


def settings_of(pairs: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """``KEY=VALUE`` words as settings. Raises `InvalidInput`."""
    found = []
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise InvalidInput(f"{pair!r} is no setting: KEY=VALUE is wanted")
        found.append((key, value))
    return tuple(found)


def filter_option(text: str) -> FilterSpec:
    """``KIND,KEY=VALUE,...`` as a filter."""
    from hypervisor.iofilter.loop import filter_class
    from hypervisor.iofilter.spec import FilterSpec

    kind, *pairs = text.split(",")
    values = settings_of(pairs)
    if filter_class(kind).persistent and not any(key == "state" for key, _ in values):
        values = (*values, ("state", f"./{kind}.state"))
    return FilterSpec(kind, kind, values)


@click.group("disk", context_settings=CONTEXT)
def disk() -> None:
    """Create, clone, filter and open virtual disks.

    A disk is a chain of I/O filters over data. What a pod's VM has open can be changed while it runs.
    """


@disk.command("create")
@click.argument("name")
@click.option("--size", required=True, help="As 10Gi or 512M. Room is taken as it is written.")
@click.option("--filter", "filters", multiple=True, metavar="KIND,KEY=VALUE,...", help="From the guest to the data.")
@click.option(
    "--nbd", metavar="SOCKET[#EXPORT]", help="The data is an NBD server's export, not a file of the disk's own."
)
@pass_settings
def create(settings: Settings, name: str, size: str, filters: Sequence[str], nbd: str | None) -> None:
    """Make an empty disk."""
    from hypervisor.iofilter.descriptor import Data, Descriptor
    from hypervisor.iofilter.store import DATA

    data = Data("file", DATA)
    if nbd:
        socket, _, export = nbd.partition("#")
        data = Data("nbd", str(Path(socket).absolute()), export)
    specs = tuple(filter_option(text) for text in filters)
    disk_store(settings).create(Descriptor(name, size_argument(size), data, filters=specs))
    click.echo(name)


@disk.command("clone")
@click.argument("base", shell_complete=disk_names)
@click.argument("name")
@pass_settings
def clone(settings: Settings, base: str, name: str) -> None:
    """Make a linked clone: it holds only what is written to it.

    What it never wrote is read from BASE, through BASE's own chain. BASE takes no more writes while it has clones.
    """
    disk_store(settings).clone(base, name)
    click.echo(name)


@disk.command("ls")
@output.format_option()
@pass_settings
def ls(settings: Settings, output: str) -> None:
    """List disks."""
    print_disks(disk_store(settings), output)


def print_disks(store: DiskStore, fmt: str) -> None:
    """Prints all disks; one that is damaged says so in its line."""
    items = [_listed(store, name) for name in store.names()]
    rows = [_row(item) for item in items]
    output.show({"items": items}, fmt, names=[i["name"] for i in items], header=HEADER, rows=rows)


def _listed(store: DiskStore, name: str) -> dict[str, Any]:
    folder = store.folder(name)
    used = sum(path.stat().st_blocks * 512 for path in folder.iterdir() if path.is_file())
    try:
        value = store.load(name).as_json()
    except HvError as error:
        return {"name": name, "used": used, "error": str(error)}
    return {**value, "used": used, "open": (folder / "control.sock").is_socket()}


def _row(item: dict[str, Any]) -> list[str]:
    if "error" in item:
        return [item["name"], "-", output.size(item["used"]), "-", "damaged", "-"]
    filters = ",".join(spec["name"] for spec in item["filters"]) or "-"
    opened = "yes" if item["open"] else "no"
    return [item["name"], output.size(item["size"]), output.size(item["used"]), item["parent"] or "-", filters, opened]


@disk.command("info")
@click.argument("name", shell_complete=disk_names)
@output.format_option("table", "json", "yaml")
@pass_settings
def info(settings: Settings, name: str, output: str) -> None:
    """Show a disk's descriptor and, while it is open, its figures."""
    from hypervisor.iofilter.control import ask

    store = disk_store(settings)
    store.load(name)  # a damaged one is an error here, with what is wrong
    value = _listed(store, name) | {"clones": store.clones_of(name)}
    try:
        value["live"] = ask(store.folder(name), {"op": "info"})
        value["open"] = True
    except Unavailable:
        value["open"] = False
    print_info(value, output)


def print_info(value: dict[str, Any], fmt: str) -> None:
    """Prints one disk."""
    if fmt == "table":
        fmt = "yaml"
    output.emit(output.as_json(value) if fmt == "json" else output.as_yaml(value))


@disk.command("rm")
@click.argument("names", nargs=-1, required=True, metavar="NAME...", shell_complete=disk_names)
@pass_settings
def rm(settings: Settings, names: Sequence[str]) -> int:
    """Remove disks and what is on them. One that is open or has clones is refused."""
    failed = 0
    for name in names:
        try:
            disk_store(settings).remove(name)
            click.echo(name)
        except HvError as error:
            output.note(str(error))
            failed = 1
    return failed


@disk.command("resize")
@click.argument("name", shell_complete=disk_names)
@click.argument("size")
@click.option("--shrink", is_flag=True, help="Allow a smaller size: what lies behind it is lost.")
@pass_settings
def resize(settings: Settings, name: str, size: str, shrink: bool) -> None:
    """Change a disk's size, also while it is open."""
    from hypervisor.iofilter.changes import Changes

    changes = Changes(disk_store(settings), name)
    wanted = size_argument(size)
    if wanted < changes.descriptor.size and not shrink:
        raise InvalidInput(f"disk {name} has {output.size(changes.descriptor.size)}: a smaller size needs --shrink")
    _say_pause(changes.resize(wanted))


def _say_pause(result: dict[str, Any]) -> None:
    if "pause_s" in result:
        click.echo(f"done; requests waited {result['pause_s'] * 1000:.2f} ms")
    else:
        click.echo("done")


@disk.group("filter")
def filter_() -> None:
    """Put filters into a disk's chain, take them out, give them other settings.

    A disk of a running pod is named POD/DISK, as web/scratch or web/image (see hv top --disks).
    """


@filter_.command("ls")
@output.format_option("table", "json")
def filter_ls(output: str) -> None:
    """List the filters there are."""
    from hypervisor.iofilter.loop import filter_classes

    print_filters([(c.name, c.order, "yes" if c.persistent else "no") for c in filter_classes()], output)


def print_filters(rows: Sequence[tuple[str, str, str]], fmt: str) -> None:
    """Prints filter classes."""
    header = ("NAME", "ORDER", "NEEDED TO READ")
    value = {"items": [{"name": n, "order": o, "persistent": p == "yes"} for n, o, p in rows]}
    output.show(value, fmt, names=[row[0] for row in rows], header=header, rows=rows)


@filter_.command("add")
@click.argument("name", shell_complete=disk_names)
@click.argument("kind", shell_complete=filter_kinds)
@click.argument("values", nargs=-1, metavar="KEY=VALUE...")
@click.option("--as", "filter_name", help="The filter's name in the chain. Default: KIND.")
@click.option("--at", type=int, help="Its place, 0 nearest to the guest. Default: behind those of its class.")
@pass_settings
def filter_add(
    settings: Settings, name: str, kind: str, values: Sequence[str], filter_name: str | None, at: int | None
) -> None:
    """Put a filter into a disk's chain, also while it is open."""
    from hypervisor.iofilter.changes import Changes
    from hypervisor.iofilter.spec import FilterSpec

    spec = FilterSpec(kind, filter_name or kind, settings_of(values))
    if live_disk.is_of_pod(name):
        wish = {"op": "filter-add", "kind": kind, "name": spec.name, "settings": dict(spec.settings), "at": at}
        _say_pause(live_disk.change(settings, name, wish))
        return
    _say_pause(Changes(disk_store(settings), name).add_filter(spec, at))


@filter_.command("rm")
@click.argument("name", shell_complete=disk_names)
@click.argument("filter_name", metavar="FILTER")
@pass_settings
def filter_rm(settings: Settings, name: str, filter_name: str) -> None:
    """Take a filter out of a disk's chain, also while it is open."""
    from hypervisor.iofilter.changes import Changes

    if live_disk.is_of_pod(name):
        _say_pause(live_disk.change(settings, name, {"op": "filter-remove", "name": filter_name}))
        return
    _say_pause(Changes(disk_store(settings), name).remove_filter(filter_name))


@filter_.command("set")
@click.argument("name", shell_complete=disk_names)
@click.argument("filter_name", metavar="FILTER")
@click.argument("values", nargs=-1, metavar="KEY=VALUE...")
@pass_settings
def filter_set(settings: Settings, name: str, filter_name: str, values: Sequence[str]) -> None:
    """Give a filter other settings, also while the disk is open. Those not named keep their values."""
    from hypervisor.iofilter.changes import Changes

    if live_disk.is_of_pod(name):
        wish = {"op": "filter-set", "name": filter_name, "settings": dict(settings_of(values))}
        _say_pause(live_disk.change(settings, name, wish))
        return
    changes = Changes(disk_store(settings), name)
    merged = dict(changes.descriptor.filter(filter_name).settings) | dict(settings_of(values))
    _say_pause(changes.set_filter(filter_name, tuple(merged.items())))


@disk.command("open", context_settings=CONTEXT | {"ignore_unknown_options": True})
@click.argument("name", shell_complete=disk_names)
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.option("--at", metavar="FILTER", help="Only what lies below this filter: backup below encryption, or above it.")
@click.option("--socket", type=click.Path(), help="Where to serve NBD. Default: a socket in the disk's folder.")
@click.option("--read-only", is_flag=True)
@pass_settings
def open_(
    settings: Settings, name: str, command: Sequence[str], at: str | None, socket: str | None, read_only: bool
) -> int:
    """Serve a disk by NBD, until Ctrl-C or while COMMAND runs.

    In COMMAND, {} stands for the address, as nbd+unix:///?socket=PATH. A disk that a pod has open is served where it
    runs: what is read is what the pod sees.
    """
    from hypervisor.iofilter.serve import serve

    path = Path(socket).absolute() if socket else None
    return serve(disk_store(settings), name, at=at, socket=path, read_only=read_only, command=tuple(command))


@disk.command("export")
@click.argument("name", shell_complete=disk_names)
@click.argument("file", type=click.Path())
@click.option("--format", "fmt", type=click.Choice(["qcow2", "raw"]), default="qcow2", show_default=True)
@click.option("--at", metavar="FILTER", help="Only what lies below this filter.")
@pass_settings
def export(settings: Settings, name: str, file: str, fmt: str, at: str | None) -> int:
    """Copy a disk's content to a file."""
    from hypervisor.iofilter.serve import serve

    command = ("qemu-img", "convert", "-p", "-f", "raw", "-O", fmt, "{}", str(Path(file).absolute()))
    return serve(disk_store(settings), name, at=at, read_only=True, command=command)


@disk.command("import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
@click.argument("name")
@click.option("--format", "fmt", type=click.Choice(["qcow2", "raw", "vmdk", "vdi"]), required=True)
@click.option("--filter", "filters", multiple=True, metavar="KIND,KEY=VALUE,...", help="From the guest to the data.")
@pass_settings
def import_(settings: Settings, file: str, name: str, fmt: str, filters: Sequence[str]) -> int:
    """Make a disk from a file. The format is never guessed: a guest could have written another one's header."""
    from hypervisor.iofilter.importing import import_disk

    specs = tuple(filter_option(text) for text in filters)
    status = import_disk(disk_store(settings), Path(file).absolute(), name, fmt, specs)
    if not status:
        click.echo(name)
    return status


@disk.command("check")
@click.argument("name", shell_complete=disk_names)
@pass_settings
def check(settings: Settings, name: str) -> int:
    """Read a whole disk through its chain: descriptor, filters' state, every block. Errors say where."""
    from hypervisor.iofilter.serve import serve

    disk_store(settings).load(name)
    command = ("nbdcopy", "--progress", "{}", "null:")
    return serve(disk_store(settings), name, read_only=True, command=command)


@disk.command("snapshot")
@click.argument("name", shell_complete=disk_names)
@click.argument("snapshot_name", metavar="SNAPSHOT")
@pass_settings
def snapshot(settings: Settings, name: str, snapshot_name: str) -> None:
    """Keep the disk as it is now as disk SNAPSHOT; the disk goes on as a linked clone of it. It must not be open."""
    disk_store(settings).snapshot(name, snapshot_name)
    click.echo(snapshot_name)
