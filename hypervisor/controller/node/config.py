"""How a host takes part in a cluster."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

KUBELET_PORT = 10250
MAX_PODS = 110


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """A node.

    :ivar kubeconfig: where the API server is, and this node's credentials (``system:node:NAME``)
    :ivar address: where the API server reaches this node: its InternalIP, and what the kubelet's server listens on
    :ivar cpus: CPUs that it says it has; None is all of the machine's
    :ivar memory_bytes: memory that it says it has; None is all of the machine's
    :ivar cluster_cidrs: ranges of all pods and Services, for the pod network
    :ivar client_ca: certificates that callers' must come from; None is the kubeconfig's certificate authority
    """

    name: str
    kubeconfig: Path
    address: str
    port: int = KUBELET_PORT
    labels: tuple[tuple[str, str], ...] = ()
    cpus: int | None = None
    memory_bytes: int | None = None
    max_pods: int = MAX_PODS
    client_ca: Path | None = None
    cluster_cidrs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Beats:
    """Times of a node, in seconds.

    :ivar lease_s: between two renewals of the Lease
    :ivar lease_duration_s: without a renewal for so long the node counts as lost
    :ivar status_s: between two looks at the node's conditions
    :ivar report_s: an unchanged status is reported again after this long
    :ivar resync_s: every pod is looked at again so often, whatever was or was not heard
    """

    lease_s: float = 10.0
    lease_duration_s: int = 40
    status_s: float = 10.0
    report_s: float = 60.0
    resync_s: float = 60.0
