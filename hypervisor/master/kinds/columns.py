"""What `kubectl get` prints of each kind: the columns of upstream's printers. Pods have a file of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from hypervisor.master.kinds.cells import (
    AGE,
    NAME,
    NONE,
    UNKNOWN,
    View,
    by_selector,
    count,
    dig,
    field,
    human,
    instant,
    labels,
    listed,
    number,
    selector,
    since,
    template_columns,
    text,
    wide,
)
from hypervisor.master.kinds.events import to_core
from hypervisor.master.kinds.kind import Column

# Nodes and namespaces


def node_status(node: View) -> str:
    """The STATUS cell of a node: ``Ready``, ``NotReady``, ``Unknown``, and whether it is cordoned."""
    ready = next((c for c in dig(node, "status.conditions", ()) if c.get("type") == "Ready"), None)
    parts = ["Unknown" if ready is None else "Ready" if ready.get("status") == "True" else "NotReady"]
    return ",".join(parts + (["SchedulingDisabled"] if dig(node, "spec.unschedulable") else []))


def _roles(node: View) -> str:
    prefix, named = "node-role.kubernetes.io/", dig(node, "metadata.labels", {})
    roles = {key.removeprefix(prefix) for key in named if key.startswith(prefix)}
    roles |= {value for key, value in named.items() if key == "kubernetes.io/role"}
    return ",".join(sorted(roles - {""})) or NONE


def _node_address(kind: str) -> Callable[[View], str]:
    def cell(node: View) -> str:
        found = (a.get("address") for a in dig(node, "status.addresses", ()) if a.get("type") == kind)
        return str(next(found, NONE))

    return cell


NAMESPACE = (NAME, text("Status", "status.phase"), AGE)
NODE = (
    NAME,
    Column("Status", node_status),
    Column("Roles", _roles),
    AGE,
    text("Version", "status.nodeInfo.kubeletVersion"),
    wide("Internal-IP", _node_address("InternalIP")),
    wide("External-IP", _node_address("ExternalIP")),
    wide("OS-Image", field("status.nodeInfo.osImage", UNKNOWN)),
    wide("Kernel-Version", field("status.nodeInfo.kernelVersion", UNKNOWN)),
    wide("Container-Runtime", field("status.nodeInfo.containerRuntimeVersion", UNKNOWN)),
)

# Events


def _last_seen(event: View) -> str:
    first = event.get("firstTimestamp") or event.get("eventTime")
    last = dig(event, "series.lastObservedTime") or event.get("lastTimestamp") or first
    return since(last)


def _event_object(event: View) -> str:
    about = event.get("involvedObject", {})
    return f"{str(about.get('kind', '')).lower()}/{about.get('name', '')}"


def _event_source(event: View) -> str:
    source = event.get("source", {})
    component = source.get("component") or event.get("reportingComponent", "")
    host = source.get("host") or event.get("reportingInstance", "")
    return f"{component}, {host}" if host else str(component)


def _event_count(event: View) -> int:
    return int(dig(event, "series.count") or event.get("count") or 1)


EVENT = (
    Column("Last Seen", _last_seen),
    text("Type", "type"),
    text("Reason", "reason"),
    Column("Object", _event_object),
    wide("Subobject", field("involvedObject.fieldPath")),
    wide("Source", _event_source),
    Column("Message", lambda event: str(event.get("message", "")).strip()),
    wide("First Seen", lambda event: since(event.get("firstTimestamp") or event.get("eventTime"))),
    Column("Count", _event_count, type="integer", priority=1),
    Column("Name", field("metadata.name"), format="name", priority=1),
)


def _of_core(column: Column) -> Column:
    """A column of a core Event, for its events.k8s.io form."""
    return replace(column, value=lambda event: column.value(to_core(event)))


EVENT_VIEW = tuple(map(_of_core, EVENT))

# Configuration and identities


def _data(obj: View) -> int:
    return len(obj.get("data") or ()) + len(obj.get("binaryData") or ())


CONFIG_MAP = (NAME, Column("Data", _data, type="integer"), AGE)
SECRET = (NAME, text("Type", "type"), Column("Data", _data, type="integer"), AGE)
SERVICE_ACCOUNT = (NAME, Column("Secrets", count("secrets"), type="integer"), AGE)
LEASE = (NAME, text("Holder", "spec.holderIdentity"), AGE)

# Workloads


def _of(part: str, whole: str, default: int) -> Callable[[View], str]:
    return lambda obj: f"{dig(obj, part, 0)}/{dig(obj, whole, default)}"


def job_status(job: View) -> str:
    """The STATUS cell of a job."""
    true = {c.get("type") for c in dig(job, "status.conditions", ()) if c.get("status") == "True"}
    for condition, shown in (
        ("Complete", "Complete"),
        ("Failed", "Failed"),
        ("SuccessCriteriaMet", "SuccessCriteriaMet"),
    ):
        if condition in true:
            return shown
    if dig(job, "metadata.deletionTimestamp"):
        return "Terminating"
    return next((c for c in ("Suspended", "FailureTarget") if c in true), "Running")


def _completions(job: View) -> str:
    done, wanted = dig(job, "status.succeeded", 0), dig(job, "spec.completions")
    if wanted is not None:
        return f"{done}/{wanted}"
    parallel = dig(job, "spec.parallelism", 0)
    return f"{done}/1 of {parallel}" if parallel > 1 else f"{done}/1"


def _duration(job: View) -> str:
    start, end = instant(dig(job, "status.startTime")), instant(dig(job, "status.completionTime"))
    if start is None:
        return ""
    return human((end - start).total_seconds()) if end else since(dig(job, "status.startTime"))


REPLICA_SET = (
    NAME,
    number("Desired", "spec.replicas"),
    number("Current", "status.replicas"),
    number("Ready", "status.readyReplicas"),
    AGE,
    *template_columns(by_selector),
)
DEPLOYMENT = (
    NAME,
    Column("Ready", _of("status.readyReplicas", "spec.replicas", 0)),
    number("Up-to-date", "status.updatedReplicas"),
    number("Available", "status.availableReplicas"),
    AGE,
    *template_columns(by_selector),
)
DAEMON_SET = (
    NAME,
    number("Desired", "status.desiredNumberScheduled"),
    number("Current", "status.currentNumberScheduled"),
    number("Ready", "status.numberReady"),
    number("Up-to-date", "status.updatedNumberScheduled"),
    number("Available", "status.numberAvailable"),
    Column("Node Selector", lambda ds: labels(dig(ds, "spec.template.spec.nodeSelector"))),
    AGE,
    *template_columns(by_selector),
)


def _quota(prefix: str) -> Callable[[View], str]:
    """Used and allowed, of limits or of all else."""

    def cell(quota: View) -> str:
        hard, used = dig(quota, "status.hard", {}), dig(quota, "status.used", {})
        names = sorted(name for name in hard if name.startswith("limits.") == (prefix == "limits."))
        return ", ".join(f"{name}: {used.get(name, 0)}/{hard[name]}" for name in names)

    return cell


RESOURCE_QUOTA = (NAME, Column("Request", _quota("")), Column("Limit", _quota("limits.")), AGE)
STATEFUL_SET = (
    NAME,
    Column("Ready", lambda s: f"{dig(s, 'status.readyReplicas', 0)}/{dig(s, 'spec.replicas', 0)}"),
    AGE,
    *template_columns(by_selector)[:2],
)
CRON_JOB = (
    NAME,
    text("Schedule", "spec.schedule"),
    text("Timezone", "spec.timeZone", NONE),
    Column("Suspend", lambda c: str(dig(c, "spec.suspend", False))),
    Column("Active", lambda c: len(dig(c, "status.active", ())), type="integer"),
    Column("Last Schedule", lambda c: since(dig(c, "status.lastScheduleTime"), NONE)),
    AGE,
)
JOB = (
    NAME,
    Column("Status", job_status),
    Column("Completions", _completions),
    Column("Duration", _duration),
    AGE,
    *template_columns(by_selector),
)


def _controller(obj: View) -> str:
    owner = next((o for o in dig(obj, "metadata.ownerReferences", ()) if o.get("controller")), None)
    if owner is None:
        return NONE
    group = str(owner.get("apiVersion", "")).rpartition("/")[0]
    return f"{str(owner.get('kind', '')).lower()}{'.' if group else ''}{group}/{owner.get('name', '')}"


CONTROLLER_REVISION = (NAME, Column("Controller", _controller), number("Revision", "revision"), AGE)


def _either(path: str) -> Callable[[View], str]:
    return lambda obj: str(dig(obj, path, "N/A"))


POD_DISRUPTION_BUDGET = (
    NAME,
    Column("Min Available", _either("spec.minAvailable")),
    Column("Max Unavailable", _either("spec.maxUnavailable")),
    number("Allowed Disruptions", "status.disruptionsAllowed"),
    AGE,
)

NETWORK_POLICY = (NAME, Column("Pod-Selector", lambda obj: selector(dig(obj, "spec.podSelector", {}))), AGE)

# Services


def _external_addresses(service: View) -> str:
    spec = service.get("spec", {})
    given = list(spec.get("externalIPs", ()))
    if spec.get("type") == "ExternalName":
        return str(spec.get("externalName", ""))
    if spec.get("type") == "LoadBalancer":
        ingress = dig(service, "status.loadBalancer.ingress", ())
        given = [str(i.get("ip") or i.get("hostname")) for i in ingress] + given
        return ",".join(given) or "<pending>"
    return ",".join(given) or NONE


def _service_ports(service: View) -> str:
    ports = []
    for port in dig(service, "spec.ports", ()):
        outside = f":{port['nodePort']}" if port.get("nodePort") else ""
        ports.append(f"{port.get('port')}{outside}/{port.get('protocol', 'TCP')}")
    return ",".join(ports) or NONE


SERVICE = (
    NAME,
    text("Type", "spec.type"),
    text("Cluster-IP", "spec.clusterIP", NONE),
    Column("External-IP", _external_addresses),
    Column("Port(s)", _service_ports),
    AGE,
    wide("Selector", lambda service: labels(dig(service, "spec.selector"))),
)


def _endpoints(obj: View) -> str:
    found = []
    for subset in obj.get("subsets", ()):
        ports = [str(port.get("port")) for port in subset.get("ports", ())]
        for address in subset.get("addresses", ()):
            found += [f"{address.get('ip')}:{port}" for port in ports] or [str(address.get("ip"))]
    return listed(found, 3)


def _slice_ports(obj: View) -> str:
    ports = [str(port.get("port", "*")) for port in obj.get("ports", ())]
    return listed(ports, 3) if ports else "<unset>"


def _slice_endpoints(obj: View) -> str:
    found = [address for endpoint in obj.get("endpoints", ()) for address in endpoint.get("addresses", ())]
    return listed(found, 3) if found else "<unset>"


ENDPOINTS = (NAME, Column("Endpoints", _endpoints), AGE)
ENDPOINT_SLICE = (
    NAME,
    text("AddressType", "addressType"),
    Column("Ports", _slice_ports),
    Column("Endpoints", _slice_endpoints),
    AGE,
)

# Rights


def _role(binding: View) -> str:
    return f"{dig(binding, 'roleRef.kind', '')}/{dig(binding, 'roleRef.name', '')}"


def _subjects(kind: str) -> Callable[[View], str]:
    def shown(subject: Mapping[str, Any]) -> str:
        return f"{subject.get('namespace', '')}/{subject['name']}" if kind == "ServiceAccount" else str(subject["name"])

    return lambda binding: ", ".join(shown(s) for s in binding.get("subjects", ()) if s.get("kind") == kind)


BINDING = (
    NAME,
    Column("Role", _role),
    AGE,
    wide("Users", _subjects("User")),
    wide("Groups", _subjects("Group")),
    wide("ServiceAccounts", _subjects("ServiceAccount")),
)


def csr_condition(csr: View) -> str:
    """The CONDITION cell of a signing request."""
    found = {c.get("type") for c in dig(csr, "status.conditions", ())}
    state = next((c for c in ("Denied", "Approved") if c in found), "Pending")
    parts = [state] + (["Failed"] if "Failed" in found else [])
    return ",".join(parts + (["Issued"] if dig(csr, "status.certificate") else []))


def _requested(csr: View) -> str:
    seconds = dig(csr, "spec.expirationSeconds")
    return NONE if seconds is None else human(seconds)


CSR = (
    NAME,
    AGE,
    text("SignerName", "spec.signerName", NONE),
    text("Requestor", "spec.username"),
    Column("RequestedDuration", _requested),
    Column("Condition", csr_condition),
)
PRIORITY_CLASS = (
    NAME,
    number("Value", "value"),
    Column("Global-Default", lambda obj: bool(obj.get("globalDefault")), type="boolean"),
    AGE,
    text("PreemptionPolicy", "preemptionPolicy"),
)
