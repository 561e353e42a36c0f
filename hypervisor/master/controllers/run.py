"""All controllers and the scheduler of a master, over one set of caches."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from hypervisor.kube.client import ApiClient
from hypervisor.kube.events import EventRecorder
from hypervisor.kube.informer import Informer
from hypervisor.kube.resources import (
    CLUSTER_ROLES,
    CONFIG_MAPS,
    CONTROLLER_REVISIONS,
    CRDS,
    CRON_JOBS,
    DAEMON_SETS,
    DEPLOYMENTS,
    ENDPOINT_SLICES,
    JOBS,
    LEASES,
    NAMESPACES,
    NODES,
    POD_DISRUPTION_BUDGETS,
    PODS,
    REPLICA_SETS,
    SECRETS,
    SERVICE_ACCOUNTS,
    SERVICES,
    STATEFUL_SETS,
    Resource,
)
from hypervisor.master.controllers.accounts import AccountsController
from hypervisor.master.controllers.aggregation import AggregationController
from hypervisor.master.controllers.base import Context, Controller, indexers, run_controllers
from hypervisor.master.controllers.budgets import BudgetController
from hypervisor.master.controllers.cronjob import CronJobController
from hypervisor.master.controllers.custom import CustomKindsController
from hypervisor.master.controllers.daemonset import DaemonSetController
from hypervisor.master.controllers.deployment.controller import DeploymentController
from hypervisor.master.controllers.endpoints import EndpointsController
from hypervisor.master.controllers.garbage import GarbageCollector
from hypervisor.master.controllers.job import JobController
from hypervisor.master.controllers.namespaces import NamespaceController
from hypervisor.master.controllers.nodelifecycle import GRACE_S, NodeLifecycleController
from hypervisor.master.controllers.podcidr import PodCidrController
from hypervisor.master.controllers.podgc import PodCollector
from hypervisor.master.controllers.quota import QuotaController
from hypervisor.master.controllers.replicaset import ReplicaSetController
from hypervisor.master.controllers.statefulset import StatefulSetController
from hypervisor.master.controllers.tokens import TokenCleaner
from hypervisor.master.network.ranges import Network
from hypervisor.master.scheduler.run import run_scheduler

WATCHED = (
    CLUSTER_ROLES,
    CONFIG_MAPS,
    CONTROLLER_REVISIONS,
    CRDS,
    CRON_JOBS,
    DAEMON_SETS,
    DEPLOYMENTS,
    ENDPOINT_SLICES,
    JOBS,
    LEASES,
    NAMESPACES,
    NODES,
    POD_DISRUPTION_BUDGETS,
    PODS,
    REPLICA_SETS,
    SECRETS,
    SERVICE_ACCOUNTS,
    SERVICES,
    STATEFUL_SETS,
)
"""Resources that some controller asks about."""


async def run_control_loops(
    client: ApiClient,
    *,
    ca_pem: str,
    collected: Sequence[Resource],
    node_grace_s: float = GRACE_S,
    pod_networks: Sequence[Network] = (),
    more: Sequence[Controller] = (),
) -> None:
    """Runs scheduler and controllers until cancelled; what fails is tried again, for ever.

    :param ca_pem: the certificate authority that clients in pods are to trust
    :param collected: every resource that is stored; garbage collection and namespace deletion look at all of them
    :param pod_networks: of which each node gets its part; none: nodes get none
    :param more: controllers of other parts of the master
    """
    resources = {*collected, *WATCHED}
    caches = {r: Informer(client, r, indexers=indexers(r)) for r in sorted(resources, key=lambda r: r.qualified)}
    scheduling, managing = EventRecorder(client, "default-scheduler"), EventRecorder(client, "controller-manager")
    context = Context(client, managing, caches)
    async with asyncio.TaskGroup() as group:
        group.create_task(scheduling.run(), name="events of the scheduler")
        group.create_task(managing.run(), name="events of the controllers")
        collector = GarbageCollector(context)
        controllers = [
            *_controllers(context, ca_pem, node_grace_s),
            PodCidrController(context, pod_networks),
            collector,
            CustomKindsController(context, collector, group),
            *more,
        ]
        group.create_task(run_controllers(context, controllers), name="controllers")
        group.create_task(run_scheduler(client, scheduling, caches), name="scheduler")
        for cache in tuple(caches.values()):
            group.create_task(cache.run(), name=f"cache {cache.resource.qualified}")


def _controllers(context: Context, ca_pem: str, node_grace_s: float) -> list[Controller]:
    return [
        ReplicaSetController(context),
        DeploymentController(context),
        DaemonSetController(context),
        StatefulSetController(context),
        JobController(context),
        CronJobController(context),
        EndpointsController(context),
        NamespaceController(context),
        AccountsController(context, ca_pem),
        NodeLifecycleController(context, grace_s=node_grace_s),
        BudgetController(context),
        AggregationController(context),
        TokenCleaner(context),
        QuotaController(context),
        PodCollector(context),
    ]
