"""A connection to the daemon of a state folder, which is started when none answers, or to the master of its cluster.

On the hot path.
"""

from __future__ import annotations

import sys

from hypervisor.cli.rest import QUICK, Connection
from hypervisor.cli.route import find_cluster, has_died
from hypervisor.cli.state import read_endpoint
from hypervisor.errors import Unavailable


def connect_running(state: str, timeout: float | None = QUICK) -> Connection | None:
    """A connection to the daemon that runs; None when none does."""
    endpoint = read_endpoint(state)
    if endpoint is None:
        return None
    try:
        return Connection(endpoint, timeout)
    except TimeoutError as e:
        raise Unavailable(
            f"hostd (process {endpoint.pid}) does not take connections; end it, then run the command again"
        ) from e
    except OSError:
        return None  # it has died; its file is left over


def connect_any(state: str, timeout: float | None = QUICK) -> Connection:
    """A connection to the cluster's master where one runs, else to the host's daemon as `connect` has it.

    :raises Unavailable: see there
    """
    cluster = find_cluster(state)
    if cluster is None:
        if has_died(state):
            told = "the cluster's master has died, so this goes to a host without it; to start it again: hv cluster up"
            print(f"hv: {told}", file=sys.stderr)  # noqa: T201
        return connect(state, timeout)
    from hypervisor.cli.upstream import MasterConnection

    try:
        return MasterConnection(cluster, timeout)
    except OSError as e:
        raise Unavailable(f"the cluster's master does not answer ({e}); see: hv cluster status") from e


def connect(state: str, timeout: float | None = QUICK) -> Connection:
    """A connection to the daemon of `state`, started in the background when there is none.

    :raises Unavailable: it did not come up; the message ends with what it said
    """
    connection = connect_running(state, timeout)
    if connection is None:
        from hypervisor.cli.starter import start_host

        connection = start_host(state, timeout)
    return connection
