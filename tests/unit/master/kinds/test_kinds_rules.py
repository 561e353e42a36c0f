"""Rules: what is refused, with upstream's words, and what may not change."""

from __future__ import annotations

from typing import Any

import pytest
from objects_of_kinds import LEAST, causes, changes, container, made, new, pod_spec, workload

from hypervisor.kube import resources as r
from hypervisor.master.patch.values import copy

Obj = dict[str, Any]


def pod(**fields: Any) -> Obj:
    return new(r.PODS, spec=pod_spec(**fields))


def one(**fields: Any) -> Obj:
    return pod(containers=[container(**fields)])


MOUNT = {"name": "v", "mountPath": "/m"}
PODS: list[tuple[Obj, str]] = [
    (pod(containers=[]), "spec.containers: Required value"),
    (one(name=""), "spec.containers[0].name: Required value"),
    (one(name="A_"), 'spec.containers[0].name: Invalid value: "A_": a lowercase RFC 1123 label must consist of'),
    (one(image=""), "spec.containers[0].image: Required value"),
    (pod(containers=[container(), container()]), 'spec.containers[1].name: Duplicate value: "c"'),
    (
        one(imagePullPolicy="x"),
        'imagePullPolicy: Unsupported value: "x": supported values: "Always", "IfNotPresent", "Never"',
    ),
    (
        one(ports=[{"containerPort": 70000}]),
        "ports[0].containerPort: Invalid value: 70000: must be between 1 and 65535, inclusive",
    ),
    (
        one(ports=[{"containerPort": 1, "name": "a"}, {"containerPort": 2, "name": "a"}]),
        'ports[1].name: Duplicate value: "a"',
    ),
    (one(ports=[{"containerPort": 1, "protocol": "X"}]), 'supported values: "SCTP", "TCP", "UDP"'),
    (one(env=[{"name": "A=B"}]), "env[0].name: Invalid value"),
    (one(env=[{"name": "A", "valueFrom": {}}]), "env[0].valueFrom: Invalid value"),
    (one(volumeMounts=[MOUNT]), 'spec.containers[0].volumeMounts[0].name: Not found: "v"'),
    (
        one(resources={"limits": {"cpu": 1}, "requests": {"cpu": 2}}),
        'resources.requests: Invalid value: "2": must be less than or equal to cpu limit of 1',
    ),
    (one(resources={"requests": {"cpu": -1}}), "must be greater than or equal to 0"),
    (one(resources={"requests": {"frobs": 1}}), "must be a standard resource type or fully qualified"),
    (one(livenessProbe={}), "livenessProbe: Required value: must specify a handler type"),
    (
        one(livenessProbe={"tcpSocket": {"port": 1}, "successThreshold": 2}),
        "livenessProbe.successThreshold: Invalid value: 2: must be 1",
    ),
    (
        one(livenessProbe={"tcpSocket": {"port": 1}, "exec": {"command": ["x"]}}),
        "Forbidden: may not specify more than 1 handler type",
    ),
    (one(readinessProbe={"exec": {"command": ["x"]}, "periodSeconds": -1}), "must be greater than or equal to 1"),
    (
        pod(initContainers=[container(name="i", readinessProbe={"exec": {"command": ["x"]}})]),
        "may not be set for init containers",
    ),
    (
        pod(restartPolicy="Sometimes"),
        'spec.restartPolicy: Unsupported value: "Sometimes": supported values: "Always", "Never", "OnFailure"',
    ),
    (pod(dnsPolicy="x"), "spec.dnsPolicy: Unsupported value"),
    (pod(volumes=[{"name": "v"}, {"name": "v"}]), 'spec.volumes[1].name: Duplicate value: "v"'),
    (
        pod(volumes=[{"name": "v", "emptyDir": {}, "hostPath": {"path": "/"}}]),
        "may not specify more than 1 volume type",
    ),
    (pod(volumes=[{"name": "v", "configMap": {}}]), "spec.volumes[0].configMap.name: Required value"),
    (
        pod(volumes=[{"name": "v", "secret": {"secretName": "s", "defaultMode": 4096}}]),
        "must be a number between 0 and 0777",
    ),
    (
        pod(volumes=[{"name": "v", "configMap": {"name": "c", "items": [{"key": "k", "path": "../x"}]}}]),
        "must not contain '..'",
    ),
    (pod(nodeSelector={"a b": "c"}), "spec.nodeSelector: Invalid value"),
    (pod(tolerations=[{"operator": "Equal"}]), "operator must be Exists when `key` is empty"),
    (
        pod(tolerations=[{"key": "a", "operator": "Exists", "value": "x"}]),
        "value must be empty when `operator` is 'Exists'",
    ),
    (
        pod(tolerations=[{"key": "a", "tolerationSeconds": 3}]),
        "effect must be 'NoExecute' when `tolerationSeconds` is set",
    ),
    (pod(activeDeadlineSeconds=0), "spec.activeDeadlineSeconds: Invalid value: 0"),
    (pod(terminationGracePeriodSeconds=-1), "must be greater than or equal to 0"),
    (
        pod(topologySpreadConstraints=[{"maxSkew": 0, "topologyKey": "k", "whenUnsatisfiable": "DoNotSchedule"}]),
        "maxSkew: Invalid value: 0: must be greater than zero",
    ),
    (
        pod(affinity={"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": []}}}),
        "must have at least one node selector term",
    ),
]


@pytest.mark.parametrize(("obj", "expected"), PODS, ids=[text[:50] for _, text in PODS])
def test_pods(obj: Obj, expected: str) -> None:
    found = causes(r.PODS, obj)
    assert len(found) == 1, found
    assert expected in found[0]


def meta(**fields: Any) -> Obj:
    obj = new(r.CONFIG_MAPS)
    obj["metadata"] |= fields
    return obj


def spec(resource: Any, **fields: Any) -> Obj:
    return new(resource, spec=LEAST[resource]()["spec"] | fields)


BAD_LABELS = workload(template={"metadata": {"labels": {"app": "b"}}, "spec": pod_spec()})["spec"]
OTHERS: list[tuple[Any, Obj, str]] = [
    (
        r.CONFIG_MAPS,
        new(r.CONFIG_MAPS, "A"),
        'metadata.name: Invalid value: "A": a lowercase RFC 1123 subdomain must consist of',
    ),
    (r.CONFIG_MAPS, new(r.CONFIG_MAPS, "a" * 254), "must be no more than 253 bytes"),
    (r.NAMESPACES, new(r.NAMESPACES, "a.b"), "a lowercase RFC 1123 label must consist of"),
    (r.SERVICES, new(r.SERVICES, "1a"), "a DNS-1035 label must consist of"),
    (r.ROLES, new(r.ROLES, "a/b"), "metadata.name: Invalid value: \"a/b\": may not contain '/'"),
    (r.CONFIG_MAPS, meta(labels={"a": "b c"}), 'metadata.labels: Invalid value: "b c": a valid label must be'),
    (
        r.CONFIG_MAPS,
        meta(annotations={"a": "x" * 300_000}),
        "metadata.annotations: Too long: may not be more than 262144 bytes",
    ),
    (r.CONFIG_MAPS, meta(finalizers=["x"]), "name is neither a standard finalizer name nor is it fully qualified"),
    (
        r.CONFIG_MAPS,
        meta(ownerReferences=[{"apiVersion": "v1", "kind": "Pod", "name": "p", "uid": ""}]),
        'ownerReferences[0].uid: Invalid value: "": must not be empty',
    ),
    (
        r.CONFIG_MAPS,
        new(r.CONFIG_MAPS, data={"a/b": "x"}),
        'data[a/b]: Invalid value: "a/b": a valid config key must consist of',
    ),
    (
        r.CONFIG_MAPS,
        new(r.CONFIG_MAPS, data={"a": "x" * (1 << 20) + "x"}),
        "Too long: may not be more than 1048576 bytes",
    ),
    (r.SECRETS, new(r.SECRETS, type="kubernetes.io/tls", data={"tls.crt": ""}), "data[tls.key]: Required value"),
    (
        r.DEPLOYMENTS,
        new(r.DEPLOYMENTS, spec=BAD_LABELS),
        'spec.template.metadata.labels: Invalid value: {"app":"b"}: `selector` does not match template `labels`',
    ),
    (
        r.DEPLOYMENTS,
        spec(r.DEPLOYMENTS, replicas=-1),
        "spec.replicas: Invalid value: -1: must be greater than or equal to 0",
    ),
    (
        r.DEPLOYMENTS,
        spec(r.DEPLOYMENTS, strategy={"rollingUpdate": {"maxSurge": 0, "maxUnavailable": 0}}),
        "may not be 0 when `maxSurge` is 0",
    ),
    (
        r.DEPLOYMENTS,
        spec(r.DEPLOYMENTS, strategy={"rollingUpdate": {"maxUnavailable": "x"}}),
        "a valid percent string must be",
    ),
    (
        r.DEPLOYMENTS,
        spec(r.DEPLOYMENTS, strategy={"type": "Recreate", "rollingUpdate": {}}),
        "may not be specified when strategy `type` is 'Recreate'",
    ),
    (
        r.JOBS,
        spec(r.JOBS, template={"spec": pod_spec()}),
        'spec.template.spec.restartPolicy: Required value: valid values: "OnFailure", "Never"',
    ),
    (
        r.JOBS,
        spec(r.JOBS, completionMode="Indexed", parallelism=2),
        "spec.completions: Required value: when completion mode is Indexed",
    ),
    (r.SERVICES, spec(r.SERVICES, ports=[]), "spec.ports: Required value"),
    (r.SERVICES, spec(r.SERVICES, ports=[{"port": 1, "name": "a"}, {"port": 2}]), "spec.ports[1].name: Required value"),
    (r.SERVICES, spec(r.SERVICES, clusterIP="x"), "must be a valid IP address"),
    (
        r.ROLES,
        new(r.ROLES, rules=[{"resources": ["pods"], "verbs": ["get"]}]),
        "rules[0].apiGroups: Required value: resource rules must supply at least one api group",
    ),
    (
        r.ROLES,
        new(r.ROLES, rules=[{"nonResourceURLs": ["/"], "verbs": ["get"]}]),
        "namespaced rules cannot apply to non-resource URLs",
    ),
    (
        r.CLUSTER_ROLE_BINDINGS,
        new(r.CLUSTER_ROLE_BINDINGS, roleRef={"kind": "Role", "name": "r"}),
        'roleRef.kind: Unsupported value: "Role": supported values: "ClusterRole"',
    ),
    (
        r.CLUSTER_ROLE_BINDINGS,
        new(r.CLUSTER_ROLE_BINDINGS, subjects=[{"kind": "ServiceAccount", "name": "s"}]),
        "subjects[0].namespace: Required value",
    ),
    (r.NODES, new(r.NODES, spec={"taints": [{"key": "k", "effect": "x"}]}), "spec.taints[0].effect: Unsupported value"),
    (r.LEASES, new(r.LEASES, spec={"leaseDurationSeconds": 0}), "must be greater than 0"),
    (
        r.PRIORITY_CLASSES,
        new(r.PRIORITY_CLASSES, value=2_000_000_000),
        "maximum allowed value of a user defined priority is 1000000000",
    ),
    (r.CSRS, spec(r.CSRS, signerName="x"), "must be a fully qualified domain and path"),
    (r.CSRS, spec(r.CSRS, expirationSeconds=5), "may not specify a duration less than 600 seconds"),
    (r.EVENTS, new(r.EVENTS, involvedObject={"namespace": "other"}), "does not match event.namespace"),
    (r.ENDPOINT_SLICES, new(r.ENDPOINT_SLICES, endpoints=[{"addresses": ["x"]}]), "must be a valid IP address"),
]


@pytest.mark.parametrize(("resource", "obj", "expected"), OTHERS, ids=[f"{k.plural} {t[:40]}" for k, _, t in OTHERS])
def test_other_kinds(resource: Any, obj: Obj, expected: str) -> None:
    found = causes(resource, obj)
    assert len(found) == 1, found
    assert expected in found[0]


# ---- changes ---------------------------------------------------------------------------------------------------------


def changed(old: Obj, path: str, value: Any) -> Obj:
    """The top-level field that a change of the field at `path` changes."""
    top, *rest = path.split(".")
    field = copy(old.get(top))
    place = field
    for part in rest[:-1]:
        place = place[int(part)] if part.isdigit() else place[part]
    if not rest:
        return {top: value}
    place[rest[-1]] = value
    return {top: field}


ALLOWED = [
    (r.PODS, "spec.containers.0.image", "other:2"),
    (r.PODS, "spec.activeDeadlineSeconds", 5),
    (r.PODS, "spec.tolerations", [{"key": "a", "operator": "Exists"}]),
    (r.DEPLOYMENTS, "spec.replicas", 7),
    (r.JOBS, "spec.parallelism", 7),
    (r.SECRETS, "data", {"x": "eA=="}),
    (r.SERVICES, "spec.selector", {"a": "b"}),
]
REFUSED = [
    (
        r.PODS,
        "spec.nodeName",
        "n",
        "spec: Forbidden: pod updates may not change fields other than `spec.containers[*].image`",
    ),
    (r.PODS, "spec.containers.0.args", ["x"], "pod updates may not change fields other than"),
    (r.PODS, "spec.containers", [container(), container(name="d")], "pod updates may not add or remove containers"),
    (r.REPLICA_SETS, "spec.selector", {"matchLabels": {"app": "a", "x": "y"}}, "field is immutable"),
    (r.DEPLOYMENTS, "spec.selector.matchLabels", {}, "spec.selector: Invalid value"),
    (r.JOBS, "spec.completions", 9, "spec.completions: Invalid value: 9: field is immutable"),
    (r.JOBS, "spec.template.spec.terminationGracePeriodSeconds", 9, "spec.template: Invalid value"),
    (r.SECRETS, "type", "x/y", 'type: Invalid value: "x/y": field is immutable'),
    (r.ROLE_BINDINGS, "roleRef.name", "other", "roleRef: Invalid value"),
    (r.PRIORITY_CLASSES, "value", 6, "value: Forbidden: may not be changed in an update."),
    (r.CONTROLLER_REVISIONS, "data", {"a": 2}, "data: Invalid value"),
    (r.CSRS, "spec.signerName", "b.c/d", "spec: Invalid value"),
    (r.ENDPOINT_SLICES, "addressType", "FQDN", "addressType: Invalid value"),
]


@pytest.mark.parametrize(
    ("resource", "path", "value"), ALLOWED, ids=lambda v: getattr(v, "plural", None) or str(v)[:30]
)
def test_what_may_change(resource: Any, path: str, value: Any) -> None:
    old = made(resource)
    assert changes(resource, old, changed(old, path, value)) == []


@pytest.mark.parametrize(
    ("resource", "path", "value", "expected"), REFUSED, ids=lambda v: getattr(v, "plural", None) or str(v)[:30]
)
def test_what_may_not_change(resource: Any, path: str, value: Any, expected: str) -> None:
    old = made(resource)
    assert any(expected in text for text in changes(resource, old, changed(old, path, value)))


def test_a_service_keeps_its_address() -> None:
    old = made(r.SERVICES)
    old["spec"]["clusterIP"] = "10.0.0.1"
    found = changes(r.SERVICES, old, changed(old, "spec.clusterIP", "10.0.0.2"))
    assert found == ['spec.clusterIPs[0]: Invalid value: "10.0.0.2": may not change once set']


@pytest.mark.parametrize("resource", [r.CONFIG_MAPS, r.SECRETS], ids=lambda r: r.plural)
def test_what_is_declared_immutable_is(resource: Any) -> None:
    old = made(resource, immutable=True)
    assert changes(resource, old, {"data": {}}) == ["data: Forbidden: field is immutable when `immutable` is set"]
    assert changes(resource, old, {"immutable": False}) == [
        "immutable: Forbidden: field is immutable when `immutable` is set"
    ]


def test_tolerations_only_grow() -> None:
    one, two = {"key": "a", "operator": "Exists"}, {"key": "b", "operator": "Exists"}
    old = made(r.PODS, spec=pod_spec(tolerations=[one]))
    assert changes(r.PODS, old, changed(old, "spec.tolerations", [two, one])) == []
    assert len(changes(r.PODS, old, changed(old, "spec.tolerations", [two]))) == 1


def test_a_write_of_status_changes_nothing_else_and_a_write_of_the_rest_no_status() -> None:
    from hypervisor.master.kinds import strategy
    from hypervisor.master.kinds.table import KINDS

    kind, old = KINDS.of(r.DEPLOYMENTS), made(r.DEPLOYMENTS)
    new = copy(old) | {"spec": {}, "status": {"replicas": 3}}
    strategy.prepare_update(kind, new, old, "status")
    assert (new["spec"], new["status"]) == (old["spec"], {"replicas": 3})
    new = copy(old) | {"status": {"replicas": 3}}
    strategy.prepare_update(kind, new, old)
    assert "status" not in new
