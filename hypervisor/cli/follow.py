"""Foreground life of a pod that ``hv run`` made: wait for its container, join its streams, learn its exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from hypervisor.cli import pods, session, ws
from hypervisor.cli.connect import connect_any
from hypervisor.cli.execute import stream_query
from hypervisor.cli.rest import Connection, target
from hypervisor.cli.route import find_cluster
from hypervisor.cli.state import read_endpoint
from hypervisor.errors import Conflict, HvError, NotFound, Unavailable, VmFailed

Pod = dict[str, Any]


def wait_started(connection: Connection, namespace: str, name: str, container: str) -> Pod:
    """Waits until the container runs or has run.

    :returns: the pod as it was then
    :raises VmFailed: it cannot run; the message says why
    :raises NotFound: somebody removed the pod
    """
    connection.set_timeout(None)
    where = target(("hv", "v1", "pods", namespace, name), [("watch", "1")])
    for pod in connection.call("GET", where).objects():
        status = pods.container_status(pod, container)
        if pods.state(status, "running") is not None or pods.state(status, "terminated") is not None:
            return pod
        reason = pods.failure(pod, container)
        if reason is not None:
            raise VmFailed(f"pod {name} cannot run: {reason}")
    raise NotFound(f"pod {name} was removed before its container ran")


def join(
    state: str,
    pod: Pod,
    container: str,
    *,
    stdin: bool,
    tty: bool,
    replay: bool,
    on_signal: Callable[[int], None] | None = None,
    joined: Callable[[], None] = lambda: None,
) -> session.Outcome:
    """Joins the container's streams until it ends or the user detaches.

    :param replay: begin with what it has written so far
    :param joined: called as soon as hostd has accepted
    :raises Unavailable: the pod's VM does not run (any more)
    """
    connection = fresh(state)
    metadata = pod["metadata"]
    query = [*stream_query(stdin, tty), ("exitCode", "1")] + ([("replay", "1")] if replay else [])
    where = target(("attach", metadata.get("namespace") or "default", metadata["name"], container), query)
    try:
        protocol = ws.handshake(connection, where, session.PROTOCOLS)
    except BaseException:
        connection.close()
        raise
    joined()
    stdin_fd = 0 if stdin else None
    return session.Session(connection, protocol, stdin=stdin_fd, tty=tty, detach_keys=stdin, on_signal=on_signal).run()


def fresh(state: str) -> Connection:
    """A connection of its own to the daemon or master that has just been talked to."""
    if find_cluster(state) is not None:
        return connect_any(state)
    endpoint = read_endpoint(state)
    if endpoint is None:
        raise Unavailable("hostd has stopped; see hv host status")
    try:
        return Connection(endpoint)
    except OSError as e:
        raise Unavailable(f"hostd does not answer any more ({e}); see hv host status") from e


def exit_code_of(pod: Pod, container: str) -> int | None:
    """The exit code in a pod's status; None while the container has not ended."""
    ended = pods.state(pods.container_status(pod, container), "terminated")
    return None if ended is None else int(ended.get("exitCode") or 0)


def print_log(state: str, pod: Pod, container: str) -> None:
    """Prints what a container that is over wrote. A log does not tell its streams apart: all goes to our stdout."""
    metadata = pod["metadata"]
    path = ("containerLogs", metadata.get("namespace") or "default", metadata["name"], container)
    with fresh(state) as connection:
        for data in connection.call("GET", target(path)).chunks():
            sys.stdout.buffer.write(data)
    sys.stdout.flush()


def is_over(error: HvError) -> bool:
    """Whether a refused attach only means that the container's VM is off already."""
    return isinstance(error, (Unavailable, NotFound, Conflict))
