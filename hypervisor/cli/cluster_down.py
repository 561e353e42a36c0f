"""Ends a local cluster: its pods, its hosts, its master, and nothing else."""

from __future__ import annotations

import os
import select
import shutil
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from hypervisor.cli.cluster_state import MASTER, ClusterPaths
from hypervisor.errors import HvError, NotFound
from hypervisor.vmx.process import ProcessId

if TYPE_CHECKING:
    from hypervisor.cli.rest import Connection

STOP_TIMEOUT = 30.0  # seconds after SIGTERM
Tell = Callable[[str], None]


def take_down(paths: ClusterPaths, tell: Tell, *, delete: bool, now: bool = False) -> None:
    """Ends everything that ``hv cluster up`` started. Objects stay in the store unless `delete`.

    :param now: pods are killed, without their grace periods

    Harmless when nothing runs. After a failure the command can be run again.
    """
    if not paths.root.is_dir():
        tell(f"there is no cluster in {paths.root}")
        return
    with paths.locked():
        names = _host_names(paths)
        with ThreadPoolExecutor(max_workers=8) as pool:
            list(pool.map(lambda name: stop_component(paths, name, tell, now=now), names))
        ran = paths.process(MASTER) is not None
        end(paths, MASTER)
        tell("the master has ended" if ran else "no master runs")
        if delete:
            for path in (paths.hosts, paths.master, paths.root / "run"):
                shutil.rmtree(path, ignore_errors=True)
            for path in (paths.kubeconfig, paths.spec):
                path.unlink(missing_ok=True)
            tell("all objects of the cluster are gone")


def _host_names(paths: ClusterPaths) -> list[str]:
    """Hosts by their folders: also of a cluster whose ``cluster.json`` is damaged."""
    return sorted(p.name for p in paths.hosts.iterdir() if p.is_dir()) if paths.hosts.is_dir() else []


def stop_component(paths: ClusterPaths, host: str, tell: Tell, *, now: bool = False) -> None:
    """Ends a host and its pods. A host that is dead and has left VMs is started once more to end them.

    :raises HvError: its pods cannot be stopped
    """
    end(paths, host)
    state = paths.host(host)
    if _has_pods(state):
        stop_pods(state, now=now)
    tell(f"{host} has ended")


def _has_pods(state: Path) -> bool:
    folder = state / "pods"
    return folder.is_dir() and any(folder.iterdir())


def stop_pods(state: Path, *, now: bool = False) -> None:
    """Stops and removes all pods of a host whose daemon does not run; `now`: without their grace periods."""
    from hypervisor.cli.connect import connect
    from hypervisor.cli.host import stop_host

    with connect(str(state), None) as connection:
        if now:
            kill_pods(connection)
        stop_host(connection, pods=True)


def kill_pods(connection: Connection) -> None:
    """Has every pod end at once; does not wait for it."""
    from hypervisor.cli.rest import target

    for pod in connection.get("hv", "v1", "pods").get("items") or ():
        metadata = pod["metadata"]
        path = ("hv", "v1", "pods", metadata["namespace"], metadata["name"])
        try:
            connection.call("DELETE", target(path, [("gracePeriodSeconds", "0")])).read()
        except NotFound:
            continue  # it has just ended by itself


def end(paths: ClusterPaths, component: str) -> None:
    """SIGTERM, and SIGKILL to one that does not hear it. Pods of a host run on.

    :raises HvError: it belongs to somebody else
    """
    process = paths.process(component)
    if process is not None:
        try:
            process.signal(signal.SIGTERM)
            if not wait_end(process, STOP_TIMEOUT):
                process.kill()
                wait_end(process, STOP_TIMEOUT)
        except PermissionError as error:
            raise HvError(
                f"{component} (process {process.pid}) belongs to another user; end it as that user"
            ) from error
    paths.record(component).unlink(missing_ok=True)


def wait_end(process: ProcessId, seconds: float) -> bool:
    """Waits until a process has ended; False when it has not in time."""
    try:
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return True
    try:
        if not process.alive():
            return True
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        return bool(poll.poll(seconds * 1000))
    finally:
        os.close(fd)
