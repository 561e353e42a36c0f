"""The kinds that the master serves: one row each.

Adding a kind is a row here (its schema comes from the published definitions), and, where it has some, functions for
defaults, validation and columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from hypervisor.kube import resources
from hypervisor.kube.resources import Resource
from hypervisor.master.custom import rules as definition_rules
from hypervisor.master.custom.definition import priority as version_priority
from hypervisor.master.kinds import (
    columns,
    core_rules,
    defaults,
    events,
    network_rules,
    pod_defaults,
    pod_rules,
    quota_rules,
    rules,
    workload_defaults,
    workload_rules,
)
from hypervisor.master.kinds.cells import PLAIN
from hypervisor.master.kinds.kind import Kind
from hypervisor.master.kinds.pod_columns import POD

_CORE = "io.k8s.api.core.v1."
_APPS = "io.k8s.api.apps.v1."
_RBAC = "io.k8s.api.rbac.v1."
_CREATE = ("create",)
_POD_SUBRESOURCES = (
    "attach",
    "binding",
    "debug",  # podvisor's own: a process in the guest, beside the containers
    "ephemeralcontainers",
    "eviction",
    "exec",
    "log",
    "portforward",
    "status",
)
_POD_FIELDS = (
    "spec.nodeName",
    "spec.restartPolicy",
    "spec.schedulerName",
    "spec.serviceAccountName",
    "spec.hostNetwork",
    "status.phase",
    "status.podIP",
    "status.nominatedNodeName",
)
_EVENT_FIELDS = (
    "involvedObject.kind",
    "involvedObject.namespace",
    "involvedObject.name",
    "involvedObject.uid",
    "involvedObject.apiVersion",
    "involvedObject.resourceVersion",
    "involvedObject.fieldPath",
    "reason",
    "reportingComponent",
    "source",
    "type",
)
_EVENTS_V1_FIELDS = (*(f.replace("involvedObject", "regarding") for f in _EVENT_FIELDS), "reportingController")


def _review(resource: Resource, schema: str) -> Kind:
    """A question: posted, answered in its status, never kept."""
    return Kind(
        resource,
        resource.kind.lower(),
        f"io.k8s.api.{schema}.v1.{resource.kind}",
        verbs=_CREATE,
        columns=PLAIN,
        generation=False,
        stored=False,
    )


CORE = (
    Kind(
        resources.NAMESPACES,
        "namespace",
        _CORE + "Namespace",
        short_names=("ns",),
        verbs=("create", "delete", "get", "list", "patch", "update", "watch"),
        subresources=("finalize", "status"),
        columns=columns.NAMESPACE,
        selectable=("status.phase",),
        generation=False,
        name_error=rules.dns_label,
        default=defaults.namespace,
        prepare_create=defaults.new_namespace,
    ),
    Kind(
        resources.NODES,
        "node",
        _CORE + "Node",
        short_names=("no",),
        subresources=("proxy", "status"),
        columns=columns.NODE,
        selectable=("spec.unschedulable",),
        generation=False,
        validate=core_rules.node,
        validate_update=core_rules.node_update,
    ),
    Kind(
        resources.PODS,
        "pod",
        _CORE + "Pod",
        short_names=("po",),
        categories=("all",),
        subresources=_POD_SUBRESOURCES,
        columns=POD,
        selectable=_POD_FIELDS,
        default=pod_defaults.pod,
        prepare_create=pod_defaults.new_pod,
        validate=pod_rules.pod,
        validate_update=pod_rules.pod_update,
    ),
    Kind(
        resources.EVENTS,
        "event",
        _CORE + "Event",
        short_names=("ev",),
        columns=columns.EVENT,
        selectable=_EVENT_FIELDS,
        generation=False,
        default=defaults.event,
        validate=core_rules.event,
    ),
    Kind(
        resources.EVENTS_V1,
        "event",
        "io.k8s.api.events.v1.Event",
        short_names=("ev",),
        columns=columns.EVENT_VIEW,
        selectable=_EVENTS_V1_FIELDS,
        generation=False,
        kept_as=resources.EVENTS,
        to_kept=events.to_core,
        from_kept=events.from_core,
    ),
    Kind(
        resources.CONFIG_MAPS,
        "configmap",
        _CORE + "ConfigMap",
        short_names=("cm",),
        columns=columns.CONFIG_MAP,
        generation=False,
        validate=core_rules.config_map,
        validate_update=core_rules.config_update,
    ),
    Kind(
        resources.SECRETS,
        "secret",
        _CORE + "Secret",
        columns=columns.SECRET,
        selectable=("type",),
        generation=False,
        default=defaults.secret,
        validate=core_rules.secret,
        validate_update=core_rules.secret_update,
    ),
    Kind(
        resources.SERVICE_ACCOUNTS,
        "serviceaccount",
        _CORE + "ServiceAccount",
        short_names=("sa",),
        subresources=("token",),
        columns=columns.SERVICE_ACCOUNT,
        generation=False,
    ),
    Kind(
        resources.SERVICES,
        "service",
        _CORE + "Service",
        short_names=("svc",),
        categories=("all",),
        subresources=("status",),
        columns=columns.SERVICE,
        selectable=("spec.clusterIP", "spec.type"),
        generation=False,
        name_error=rules.dns_1035_label,
        default=defaults.service,
        validate=core_rules.service,
        validate_update=core_rules.service_update,
    ),
    Kind(
        resources.RESOURCE_QUOTAS,
        "resourcequota",
        _CORE + "ResourceQuota",
        short_names=("quota",),
        subresources=("status",),
        columns=columns.RESOURCE_QUOTA,
        generation=False,
        validate=quota_rules.resource_quota,
    ),
    Kind(
        resources.LIMIT_RANGES,
        "limitrange",
        _CORE + "LimitRange",
        short_names=("limits",),
        columns=PLAIN,
        generation=False,
        default=quota_rules.limit_range_defaults,
        validate=quota_rules.limit_range,
    ),
    Kind(
        resources.ENDPOINTS,
        "endpoints",
        _CORE + "Endpoints",
        short_names=("ep",),
        columns=columns.ENDPOINTS,
        generation=False,
        default=defaults.endpoints,
        validate=core_rules.endpoints,
    ),
)
WORKLOADS = (
    Kind(
        resources.REPLICA_SETS,
        "replicaset",
        _APPS + "ReplicaSet",
        short_names=("rs",),
        categories=("all",),
        subresources=("scale", "status"),
        columns=columns.REPLICA_SET,
        selectable=("status.replicas",),
        default=workload_defaults.replica_set,
        validate=workload_rules.replica_set,
        validate_update=workload_rules.same_selector,
    ),
    Kind(
        resources.DEPLOYMENTS,
        "deployment",
        _APPS + "Deployment",
        short_names=("deploy",),
        categories=("all",),
        subresources=("scale", "status"),
        columns=columns.DEPLOYMENT,
        default=workload_defaults.deployment,
        validate=workload_rules.deployment,
        validate_update=workload_rules.same_selector,
    ),
    Kind(
        resources.DAEMON_SETS,
        "daemonset",
        _APPS + "DaemonSet",
        short_names=("ds",),
        categories=("all",),
        subresources=("status",),
        columns=columns.DAEMON_SET,
        default=workload_defaults.daemon_set,
        validate=workload_rules.daemon_set,
        validate_update=workload_rules.same_selector,
    ),
    Kind(
        resources.STATEFUL_SETS,
        "statefulset",
        _APPS + "StatefulSet",
        short_names=("sts",),
        categories=("all",),
        subresources=("scale", "status"),
        columns=columns.STATEFUL_SET,
        name_error=rules.dns_label,
        default=workload_defaults.stateful_set,
        validate=workload_rules.stateful_set,
        validate_update=workload_rules.stateful_set_update,
    ),
    Kind(
        resources.CONTROLLER_REVISIONS,
        "controllerrevision",
        _APPS + "ControllerRevision",
        columns=columns.CONTROLLER_REVISION,
        generation=False,
        validate=workload_rules.controller_revision,
        validate_update=workload_rules.revision_update,
    ),
    Kind(
        resources.CRON_JOBS,
        "cronjob",
        "io.k8s.api.batch.v1.CronJob",
        short_names=("cj",),
        categories=("all",),
        subresources=("status",),
        columns=columns.CRON_JOB,
        default=workload_defaults.cron_job,
        validate=workload_rules.cron_job,
    ),
    Kind(
        resources.JOBS,
        "job",
        "io.k8s.api.batch.v1.Job",
        categories=("all",),
        subresources=("status",),
        columns=columns.JOB,
        selectable=("status.successful",),
        default=workload_defaults.job,
        prepare_create=workload_defaults.new_job,
        validate=workload_rules.job,
        validate_update=workload_rules.job_update,
    ),
    Kind(
        resources.POD_DISRUPTION_BUDGETS,
        "poddisruptionbudget",
        "io.k8s.api.policy.v1.PodDisruptionBudget",
        short_names=("pdb",),
        subresources=("status",),
        columns=columns.POD_DISRUPTION_BUDGET,
        validate=workload_rules.disruption_budget,
    ),
)
CLUSTER = (
    Kind(
        resources.LEASES,
        "lease",
        "io.k8s.api.coordination.v1.Lease",
        columns=columns.LEASE,
        generation=False,
        validate=core_rules.lease,
    ),
    Kind(
        resources.ENDPOINT_SLICES,
        "endpointslice",
        "io.k8s.api.discovery.v1.EndpointSlice",
        columns=columns.ENDPOINT_SLICE,
        default=defaults.endpoint_slice,
        validate=core_rules.endpoint_slice,
        validate_update=core_rules.endpoint_slice_update,
    ),
    Kind(
        resources.NETWORK_POLICIES,
        "networkpolicy",
        "io.k8s.api.networking.v1.NetworkPolicy",
        short_names=("netpol",),
        columns=columns.NETWORK_POLICY,
        default=network_rules.network_policy_defaults,
        validate=network_rules.network_policy,
    ),
    Kind(
        resources.CSRS,
        "certificatesigningrequest",
        "io.k8s.api.certificates.v1.CertificateSigningRequest",
        short_names=("csr",),
        subresources=("approval", "status"),
        columns=columns.CSR,
        selectable=("spec.signerName",),
        generation=False,
        prepare_create=defaults.new_csr,
        validate=core_rules.csr,
        validate_update=core_rules.csr_update,
    ),
    Kind(
        resources.PRIORITY_CLASSES,
        "priorityclass",
        "io.k8s.api.scheduling.v1.PriorityClass",
        short_names=("pc",),
        columns=columns.PRIORITY_CLASS,
        default=defaults.priority_class,
        validate=core_rules.priority_class,
        validate_update=core_rules.priority_class_update,
    ),
    Kind(
        resources.ROLES,
        "role",
        _RBAC + "Role",
        columns=PLAIN,
        generation=False,
        name_error=rules.path_segment,
        default=defaults.role,
        validate=core_rules.role,
    ),
    Kind(
        resources.CLUSTER_ROLES,
        "clusterrole",
        _RBAC + "ClusterRole",
        columns=PLAIN,
        generation=False,
        name_error=rules.path_segment,
        default=defaults.role,
        validate=core_rules.cluster_role,
    ),
    Kind(
        resources.ROLE_BINDINGS,
        "rolebinding",
        _RBAC + "RoleBinding",
        columns=columns.BINDING,
        generation=False,
        name_error=rules.path_segment,
        default=defaults.binding,
        validate=core_rules.role_binding,
        validate_update=core_rules.binding_update,
    ),
    Kind(
        resources.CLUSTER_ROLE_BINDINGS,
        "clusterrolebinding",
        _RBAC + "ClusterRoleBinding",
        columns=columns.BINDING,
        generation=False,
        name_error=rules.path_segment,
        default=defaults.binding,
        validate=core_rules.cluster_role_binding,
        validate_update=core_rules.binding_update,
    ),
)
EXTENSIONS = (
    Kind(
        resources.CRDS,
        "customresourcedefinition",
        "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.CustomResourceDefinition",
        short_names=("crd", "crds"),
        categories=("api-extensions",),
        subresources=("status",),
        columns=PLAIN,
        default=definition_rules.default,
        prepare_create=definition_rules.new,
        validate=definition_rules.check,
        validate_update=definition_rules.check_update,
    ),
)
REVIEWS = (
    _review(resources.TOKEN_REVIEWS, "authentication"),
    _review(resources.SELF_SUBJECT_REVIEWS, "authentication"),
    _review(resources.SUBJECT_ACCESS_REVIEWS, "authorization"),
    _review(resources.LOCAL_SUBJECT_ACCESS_REVIEWS, "authorization"),
    _review(resources.SELF_SUBJECT_ACCESS_REVIEWS, "authorization"),
    _review(resources.SELF_SUBJECT_RULES_REVIEWS, "authorization"),
)


class Kinds:
    """Kinds by their names. Users' own are put in and dropped while a server runs; for one event loop then.

    :ivar generation: grows with each change
    :ivar routes: what is served, by group and version, then by plural
    :ivar fixed_groups: groups of the kinds that it was made with
    """

    def __init__(self, rows: Iterable[Kind]) -> None:
        self._fixed = tuple(rows)
        self._custom: dict[str, tuple[Kind, ...]] = {}
        self.fixed_groups = frozenset(k.resource.group for k in self._fixed)
        self.generation = 0
        self.routes: dict[tuple[str, str], dict[str, Kind]] = {}
        self._index()

    def _index(self) -> None:
        everything = (*self._fixed, *(k for name in sorted(self._custom) for k in self._custom[name]))
        self._rows = tuple(k for k in everything if k.served)
        self._by_plural = {(k.resource.group, k.resource.version, k.resource.plural): k for k in everything}
        self._by_kind = {(k.resource.group, k.resource.version, k.resource.kind): k for k in self._rows}
        self.routes = {}
        for kind in self._rows:
            self.routes.setdefault((kind.resource.group, kind.resource.version), {})[kind.resource.plural] = kind
        self.generation += 1

    def put(self, owner: str, rows: Iterable[Kind]) -> None:
        """The rows that a definition makes, in place of those that it made before."""
        self._custom[owner] = tuple(rows)
        self._index()

    def drop(self, owner: str) -> None:
        """A definition makes rows no longer."""
        if self._custom.pop(owner, None) is not None:
            self._index()

    def __iter__(self) -> Iterator[Kind]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, group: str, version: str, plural: str) -> Kind | None:
        """The kind that a URL path names."""
        return self._by_plural.get((group, version, plural))

    def of_kind(self, group: str, version: str, kind: str) -> Kind | None:
        """The kind that an object says it is of."""
        return self._by_kind.get((group, version, kind))

    def of(self, resource: Resource) -> Kind:
        """The row of a resource.

        :raises KeyError: it is not served
        """
        return self._by_plural[resource.group, resource.version, resource.plural]

    def groups(self) -> dict[str, tuple[str, ...]]:
        """The served groups, the core group first, each with its versions as clients prefer them."""
        found: dict[str, set[str]] = {}
        for kind in self._rows:
            found.setdefault(kind.resource.group, set()).add(kind.resource.version)
        return {group: tuple(sorted(found[group], key=version_priority)) for group in sorted(found)}

    def in_group(self, group: str, version: str) -> tuple[Kind, ...]:
        """The kinds of one group and version."""
        return tuple(k for k in self._rows if (k.resource.group, k.resource.version) == (group, version))


KINDS = Kinds((*CORE, *WORKLOADS, *CLUSTER, *EXTENSIONS, *REVIEWS))
"""Every kind that the master serves."""
