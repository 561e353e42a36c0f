"""Whom a command speaks to: the master of the state folder's cluster if it runs, else the host itself. On the hot path.

``hv --local`` (or ``HV_LOCAL=1``) leaves the cluster aside; ``hv --host NAME`` means that host of the cluster alone;
``hv -n NAMESPACE`` (or ``HV_NAMESPACE``) is the namespace of pods that are named without one.
"""

from __future__ import annotations

import json
import os

from hypervisor.errors import InvalidInput, NotFound, Unavailable

LOCAL = "HV_LOCAL"
NAMESPACE = "HV_NAMESPACE"


class ClusterEndpoint:
    """Where a running master listens, and the folder of its cluster. Immutable by convention."""

    __slots__ = ("port", "root")

    def __init__(self, root: str, port: int) -> None:
        self.root = root
        self.port = port

    def host(self, name: str) -> str:
        """The state folder of a host."""
        return f"{self.root}/hosts/{name}"


def namespace() -> str:
    """The namespace of what is named without one."""
    return chosen_namespace() or "default"


def chosen_namespace() -> str:
    """The namespace that was asked for; empty for none."""
    return os.environ.get(NAMESPACE) or ""


def choose(*, local: bool = False, namespace: str | None = None) -> None:
    """Notes what the global options say, for this process and those that it starts."""
    if local:
        os.environ[LOCAL] = "1"
    if namespace:
        os.environ[NAMESPACE] = namespace


def find_cluster(state: str) -> ClusterEndpoint | None:
    """The cluster of a state folder if its master runs and may be used.

    :raises Unavailable: it belongs to another user
    :raises InvalidInput: its file is damaged
    """
    root = f"{state}/cluster"
    if os.environ.get(LOCAL) == "1" or not _runs(f"{root}/run/master.pid"):
        return None
    try:
        with open(f"{root}/cluster.json", encoding="utf-8") as file:  # noqa: PTH123
            return ClusterEndpoint(root, int(json.load(file)["port"]))
    except PermissionError as e:
        raise Unavailable(f"the cluster in {root} belongs to another user; run hv as that user, or hv --local") from e
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InvalidInput(f"is damaged ({e}); run: hv cluster up", where=f"{root}/cluster.json") from e


def has_died(state: str) -> bool:
    """Whether the state folder's cluster has a master that ended without being asked to: one that is stopped by
    ``hv cluster down`` takes its record away.
    """
    record = f"{state}/cluster/run/master.pid"
    return os.environ.get(LOCAL) != "1" and os.path.exists(record) and not _runs(record)  # noqa: PTH110


def _runs(record: str) -> bool:
    """Whether the process of a record (see `hypervisor.cli.cluster_state`) is alive."""
    try:
        with open(record, encoding="utf-8") as file:  # noqa: PTH123
            boot, stat = file.read().splitlines()[:2]
        with open("/proc/sys/kernel/random/boot_id", encoding="utf-8") as file:  # noqa: PTH123
            if file.read().strip() != boot:
                return False
        with open(f"/proc/{int(stat.split(' ', 1)[0])}/stat", encoding="utf-8") as file:  # noqa: PTH123
            now = file.read()
    except (OSError, ValueError):
        return False
    state, _, started = _fields(now)
    return state != "Z" and started == _fields(stat)[2]


def _fields(stat: str) -> tuple[str, str, str]:
    """State, parent and start time of a line of ``/proc/PID/stat``."""
    words = stat[stat.rindex(")") + 2 :].split()
    return words[0], words[1], words[19]


def host_state(state: str, name: str) -> str:
    """The state folder of a host of the cluster.

    :raises NotFound: there is none of that name
    """
    folder = f"{state}/cluster/hosts/{name}"
    if "/" in name or name in ("", ".", "..") or not os.path.isdir(folder):  # noqa: PTH112
        raise NotFound(f"there is no host {name!r} in the cluster of {state}; see: hv cluster status")
    return folder
