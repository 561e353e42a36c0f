"""``hv cluster``: a master and hosts on this machine, in the background."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO

import click

from hypervisor.cli import cluster_networks, output
from hypervisor.cli.app import CONTEXT, Settings, pass_settings
from hypervisor.cli.cluster_state import MASTER, ClusterPaths, ClusterSpec
from hypervisor.cli.output import note
from hypervisor.errors import Conflict, HvError, InvalidInput, NotFound

FOLLOW_EVERY = 0.2  # seconds


@click.group("cluster", context_settings=CONTEXT)
def cluster() -> None:
    """A Kubernetes cluster on this machine: a master and hosts in the background."""


def paths_of(settings: Settings) -> ClusterPaths:
    """Where the cluster of a state folder is."""
    return ClusterPaths(Path(settings.state))


@cluster.command("up")
@click.option(
    "--hosts", metavar="N", type=click.IntRange(1), help="How many hosts. Default: as many as there are, else 2."
)
@click.option("--store", metavar="STORE", help="sqlite (the default), or etcd:HOST:PORT[,HOST:PORT...].")
@click.option(
    "--port", metavar="PORT", type=click.IntRange(1, 65535), help="Of the API server. Default: 6443 if it is free."
)
@click.option(
    "--node-grace-seconds",
    "node_grace",
    metavar="SECONDS",
    type=click.FloatRange(1),
    help="Without a sign of life for so long a host is taken for lost. Default: 40.",
)
@click.option(
    "--warm", metavar="N", type=click.IntRange(0, 1000), help="VMs that each host keeps ready for pods. Default: 0."
)
@cluster_networks.options(None)
@click.option(
    "--pod-network/--no-pod-network",
    "pod_network",
    default=None,
    help="Pods have addresses that others reach, and Services work; needs root and nftables. Default: no.",
)
@click.option("--timeout", metavar="SECONDS", type=float, default=120.0, show_default=True, help="How long to wait.")
@pass_settings
def up(
    settings: Settings,
    hosts: int | None,
    store: str | None,
    port: int | None,
    node_grace: float | None,
    warm: int | None,
    services: str | None,
    pods: str | None,
    node_ports: str | None,
    pod_network: bool | None,
    timeout: float,
) -> None:
    """Start what does not run, and wait until every host is Ready.

    Run it again after a crash or a reboot: all objects are there, and what has died is started again. With a greater
    --hosts the cluster grows. The hosts share the images and templates of the state folder.
    """
    from hypervisor.cli.cluster_up import Wanted, bring_up

    paths = paths_of(settings)
    wanted = Wanted(hosts, store, port, node_grace, services, pods, node_ports, warm, pod_network)
    spec = bring_up(paths, wanted, output.note, timeout)
    click.echo(f"The cluster runs: {spec.server}, {len(spec.hosts)} hosts. To use it:")
    click.echo(f"  export KUBECONFIG={paths.kubeconfig}")
    click.echo("  kubectl get nodes")


@cluster.command("down")
@click.option("--delete", is_flag=True, help="Remove the cluster's objects, logs and keys, too.")
@click.option("--now", is_flag=True, help="Kill pods, without their grace periods.")
@pass_settings
def down(settings: Settings, delete: bool, now: bool) -> None:
    """End the cluster's pods, hosts and master, and nothing else.

    Its objects stay, and its pods start anew with the next hv cluster up, unless --delete is given.
    """
    from hypervisor.cli.cluster_down import take_down

    take_down(paths_of(settings), output.note, delete=delete, now=now)


@cluster.command("status")
@output.format_option("table", "json", "yaml")
@pass_settings
def status(settings: Settings, output: str) -> int:
    """Say what runs and is ready. Exit code: 0 if all of it, else 1."""
    paths = paths_of(settings)
    spec = paths.must_load()
    found = found_status(paths, spec)
    show_status(found, output)
    if not all(c["running"] for c in found["components"]):
        note("not all of it runs; hv cluster up starts what is missing")
    return 0 if found["ready"] else 1


def found_status(paths: ClusterPaths, spec: ClusterSpec) -> dict[str, Any]:
    """What runs, and what the API server says of it."""
    from hypervisor.cli.cluster_up import node_is_ready
    from hypervisor.cli.kubeapi import KubeApi
    from hypervisor.kube.resources import NODES

    ready: dict[str, bool] = {}
    try:
        with KubeApi(paths.kubeconfig) as api:
            ready[MASTER] = paths.process(MASTER) is not None and api.ready()
            ready |= {n["metadata"]["name"]: node_is_ready(n) for n in api.list(NODES)} if ready[MASTER] else {}
    except HvError:
        pass
    components = [_component(paths, MASTER, f"127.0.0.1:{spec.port}", ready)]
    components += [_component(paths, h.name, f"{h.address}:{h.port}", ready) for h in spec.hosts]
    return {
        "server": spec.server,
        "store": spec.store,
        "kubeconfig": str(paths.kubeconfig),
        "ready": all(c["ready"] for c in components),
        "components": components,
    }


def _component(paths: ClusterPaths, name: str, address: str, ready: dict[str, bool]) -> dict[str, Any]:
    process = paths.process(name)
    runs = process is not None
    return {
        "name": name,
        "running": runs,
        "ready": runs and ready.get(name, False),
        "pid": process.pid if process is not None else None,
        "address": address,
        "log": str(paths.log(name)),
    }


def show_status(found: dict[str, Any], fmt: str) -> None:
    """Prints it in a format."""
    words = {True: "yes", False: "no"}
    rows = [
        [c["name"], words[c["running"]], words[c["ready"]], str(c["pid"] or "-"), c["address"], c["log"]]
        for c in found["components"]
    ]
    header = ("NAME", "RUNNING", "READY", "PID", "ADDRESS", "LOG")
    output.show(found, fmt, names=(), header=header, rows=rows)


@cluster.command("logs")
@click.argument("component", default=MASTER, shell_complete=lambda ctx, _p, text: _names(ctx, text))
@click.option("-f", "--follow", is_flag=True, help="Go on printing what is written.")
@click.option("--tail", metavar="N", type=click.IntRange(0), help="Only the last N lines.")
@pass_settings
def logs(settings: Settings, component: str, follow: bool, tail: int | None) -> None:
    """Print what a component wrote: master (the default) or a host's name."""
    paths = paths_of(settings)
    names = [MASTER, *(h.name for h in paths.must_load().hosts)]
    if component not in names:
        raise InvalidInput(f"there is no component {component!r}; there are: {', '.join(names)}")
    path = paths.log(component)
    if not path.exists():
        raise NotFound(f"{component} has not written anything yet")
    _print_file(path, follow=follow, tail=tail)


def _names(ctx: click.Context, incomplete: str) -> list[str]:
    from hypervisor.cli.state import state_dir

    try:
        spec = ClusterPaths(Path(state_dir(ctx.find_root().params.get("state_dir")))).load()
    except HvError:
        return []
    names = [MASTER, *(h.name for h in spec.hosts)] if spec else []
    return [name for name in names if name.startswith(incomplete)]


def _print_file(path: Path, *, follow: bool, tail: int | None) -> None:
    while True:
        with path.open("rb") as file:
            if tail is not None:
                lines = file.read().splitlines(keepends=True)
                sys.stdout.buffer.write(b"".join(lines[len(lines) - tail :] if tail else []))
                tail = None
            moved = False
            while not moved:
                moved = follow and _is_moved(path, file)  # asked before the last of it is read
                while chunk := file.read(1 << 16):
                    sys.stdout.buffer.write(chunk)
                sys.stdout.flush()
                if not follow:
                    return
                time.sleep(0 if moved else FOLLOW_EVERY)


def _is_moved(path: Path, file: BinaryIO) -> bool:
    """Whether another file has the name now (a log that grew too large was moved aside), or it was made shorter."""
    try:
        now = path.stat()
    except FileNotFoundError:
        return False
    return not os.path.samestat(now, os.fstat(file.fileno())) or now.st_size < file.tell()


@cluster.command("kubeconfig")
@click.option("--path", "only_path", is_flag=True, help="Print the file's path instead of its content.")
@pass_settings
def kubeconfig(settings: Settings, only_path: bool) -> None:
    """Print the administrator's kubeconfig.

    \b
    Alone:              export KUBECONFIG="$(hv cluster kubeconfig --path)"
    Beside your own:    export KUBECONFIG="$HOME/.kube/config:$(hv cluster kubeconfig --path)"
    For good:           kubectl config view --flatten > merged   (with both as above)
    """
    paths = paths_of(settings)
    paths.must_load()
    click.echo(str(paths.kubeconfig) if only_path else paths.kubeconfig.read_text(), nl=only_path)


@cluster.command("backup")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@pass_settings
def backup(settings: Settings, file: Path) -> None:
    """Copy all objects into FILE (and its checksum into FILE.sha256), also while the cluster runs.

    Keys are not in it; Secrets are: it is readable by you alone.
    """
    from hypervisor.master.store.backup import backup as make

    paths = paths_of(settings)
    _must_be_sqlite(paths.must_load())
    made = make(database_of(paths), file.absolute())
    click.echo(f"{made.path}: {made.keys} objects, revision {made.revision}")


@cluster.command("restore")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@pass_settings
def restore(settings: Settings, file: Path) -> None:
    """Put the objects of a backup in the place of the cluster's, whose master must not run.

    What was there before is kept beside the store. Run hv cluster up afterwards.
    """
    from hypervisor.master.store.backup import restore as put_back

    paths = paths_of(settings)
    _must_be_sqlite(paths.must_load())
    with paths.locked():
        if paths.process(MASTER) is not None:
            raise Conflict("the master runs; run hv cluster down first")
        kept = put_back(file.absolute(), database_of(paths))
    click.echo(f"restored from {file}" + (f"; what was there is now {kept}" if kept else ""))


def database_of(paths: ClusterPaths) -> Path:
    """The SQLite store's file."""
    return paths.master / "store.db"


def _must_be_sqlite(spec: ClusterSpec) -> None:
    if spec.store != "sqlite":
        raise InvalidInput(f"the cluster keeps its objects in {spec.store}; use etcdctl snapshot for that")
