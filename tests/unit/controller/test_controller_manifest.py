"""Manifests: what each bad input is answered with, exactly; what good ones become."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from hypervisor.controller.fields import CONTAINER_FIELDS, POD_FIELDS, Support
from hypervisor.controller.manifest import load_documents, parse_pod
from hypervisor.controller.runtime_spec import setup_arguments
from hypervisor.controller.schema import pod_definitions
from hypervisor.controller.spec import EnvVar, Security, Volume
from hypervisor.errors import InvalidInput

MINIMAL: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "p"},
    "spec": {"containers": [{"name": "c", "image": "busybox"}]},
}


def pod(container: dict[str, Any] | None = None, /, **spec: Any) -> dict[str, Any]:
    manifest = copy.deepcopy(MINIMAL)
    manifest["spec"]["containers"][0] |= container or {}
    manifest["spec"] |= spec
    return manifest


def metadata(**values: Any) -> dict[str, Any]:
    return MINIMAL | {"metadata": {"name": "p"} | values}


def limits(**values: Any) -> dict[str, Any]:
    return pod({"resources": {"limits": {k.replace("_", "-"): v for k, v in values.items()}}})


C = "spec.containers[0]"
VOLUME = {"name": "v", "emptyDir": {}}

BAD: list[tuple[str, Any, str]] = [
    ("not a mapping", [1], "a manifest must be a mapping"),
    ("other kind", MINIMAL | {"kind": "Deployment"}, "kind: this host takes apiVersion v1, kind Pod"),
    ("unknown at the top", MINIMAL | {"speck": {}}, 'speck: unknown field; did you mean "spec"?'),
    ("unknown field", pod({"imag": "x"}), f'{C}.imag: unknown field; did you mean "image"?'),
    ("unknown, nothing near", pod({"zzz": 1}), f"{C}.zzz: unknown field; the fields here are args, command"),
    (
        "unknown in the spec",
        pod(restartPolcy="Never"),
        'spec.restartPolcy: unknown field; did you mean "restartPolicy"?',
    ),
    ("no containers", pod() | {"spec": {}}, "spec.containers: required, and missing"),
    ("empty containers", pod(containers=[]), "spec.containers: a pod needs at least one container"),
    ("no name of a container", pod(containers=[{"image": "x"}]), f"{C}.name: required, and missing"),
    ("no name", MINIMAL | {"metadata": {}}, "metadata.name: required, and missing"),
    ("no spec", {k: v for k, v in MINIMAL.items() if k != "spec"}, "spec: required, and missing"),
    ("no image", pod({"image": None}), f"{C}.image: required, and missing"),
    ("bad image", pod({"image": "a b"}), f"{C}.image: image 'a b'"),
    ("string for a list", pod({"command": "sh"}), f'{C}.command: must be a list of strings, not a string ("sh")'),
    (
        "number for a string",
        pod({"env": [{"name": "A", "value": 8080}]}),
        "not a whole number (8080); put it in quotes",
    ),
    ("string for a boolean", pod({"tty": "yes"}), f'{C}.tty: must be true or false, not a string ("yes")'),
    ("fraction for an integer", pod(terminationGracePeriodSeconds=1.5), "must be a whole number, not a number (1.5)"),
    ("mapping for a list", pod(containers={"name": "c"}), "spec.containers: must be a list, not a mapping"),
    ("null in a list", pod({"args": [None]}), f"{C}.args[0]: an empty list entry"),
    ("restartPolicy", pod(restartPolicy="Sometimes"), "'Sometimes' is not one of Always, OnFailure, Never"),
    ("pull policy", pod({"imagePullPolicy": "missing"}), "'missing' is not one of Always, IfNotPresent, Never"),
    ("negative grace", pod(terminationGracePeriodSeconds=-1), "spec.terminationGracePeriodSeconds: -1 is not from 0"),
    ("bad unit", limits(memory="128MB"), f"{C}.resources.limits.memory: '128MB' has the unknown unit 'MB'"),
    ("milli bytes", limits(memory="128m"), f"{C}.resources.limits.memory: '128m' is a fraction of a byte"),
    ("too little memory", limits(memory="1Mi"), f"{C}.resources.limits.memory: 1Mi is too little"),
    ("no limit", limits(cpu=0), f"{C}.resources.limits.cpu: a limit of nothing"),
    (
        "unknown resource",
        limits(gpu=1),
        f"{C}.resources.limits.gpu: 'gpu' is not one of cpu, memory, ephemeral-storage",
    ),
    (
        "request above limit",
        pod({"resources": {"limits": {"cpu": 1}, "requests": {"cpu": 2}}}),
        f"{C}.resources.requests.cpu: 2 is more than the limit 1",
    ),
    ("name of a pod", MINIMAL | {"metadata": {"name": "Pod_1"}}, "metadata.name: 'Pod_1' is no DNS name"),
    ("name of a container", pod({"name": "a.b"}), f"{C}.name: 'a.b' is no DNS label"),
    ("namespace", metadata(namespace="A"), "metadata.namespace: 'A' is no DNS label"),
    ("label key", metadata(labels={"a b": "x"}), "is no label key"),
    ("label value", metadata(labels={"a": "x y"}), "metadata.labels.a: 'x y' is no label value"),
    ("own annotation", metadata(annotations={"podvisor.dev/nte": "x"}), "'podvisor.dev/nte' is not one of"),
    ("network", metadata(annotations={"podvisor.dev/net": "host"}), "'host' is not one of user, none"),
    ("cold", metadata(annotations={"podvisor.dev/cold": "yes"}), "podvisor.dev/cold"),
    ("disk size", metadata(annotations={"podvisor.dev/disk-size": "big"}), "'big' is no quantity"),
    (
        "same name twice",
        pod(containers=[{"name": "c", "image": "x"}, {"name": "c", "image": "y"}]),
        "spec.containers[1].name: 'c' is used twice",
    ),
    ("volume not there", pod({"volumeMounts": [{"name": "v", "mountPath": "/v"}]}), "the pod has no volume 'v'"),
    ("volume without source", pod(volumes=[{"name": "v"}]), "spec.volumes[0]: give the volume a source"),
    ("volume twice", pod(volumes=[VOLUME, VOLUME]), "spec.volumes[1].name: 'v' is used twice"),
    ("medium", pod(volumes=[{"name": "v", "emptyDir": {"medium": "Disk"}}]), "'Disk' is not one of (empty), Memory"),
    (
        "relative mount",
        pod({"volumeMounts": [{"name": "v", "mountPath": "v"}]}, volumes=[VOLUME]),
        f"{C}.volumeMounts[0].mountPath: 'v' is not an absolute path",
    ),
    (
        "escaping subPath",
        pod({"volumeMounts": [{"name": "v", "mountPath": "/v", "subPath": "../x"}]}, volumes=[VOLUME]),
        f"{C}.volumeMounts[0].subPath: '../x' is not a relative path",
    ),
    ("relative workingDir", pod({"workingDir": "tmp"}), f"{C}.workingDir: 'tmp' is not an absolute path"),
    ("NUL", pod({"args": ["a\0b"]}), f"{C}.args[0]: holds a NUL byte"),
    ("10 MB argument", pod({"args": ["x" * 10_000_000]}), f"{C}.args[0]: 10000000 bytes; Linux takes at most 131071"),
    ("10 MB of arguments", pod({"args": ["x" * 100_000] * 100}), "Linux takes at most 2097152 for all of them"),
    ("env name", pod({"env": [{"name": "A=B", "value": ""}]}), f"{C}.env[0].name: 'A=B' cannot name a variable"),
    (
        "env field",
        pod({"env": [{"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "spec.foo"}}}]}),
        f"{C}.env[0].valueFrom.fieldRef.fieldPath: 'spec.foo' is not one of metadata.name",
    ),
    (
        "config map",
        pod({"env": [{"name": "A", "valueFrom": {"configMapKeyRef": {"key": "k"}}}]}),
        f"{C}.env[0].valueFrom.configMapKeyRef.name: required, and missing",
    ),
    ("capability", pod({"securityContext": {"capabilities": {"add": ["FLY"]}}}), "'FLY' is no capability of Linux"),
    (
        "root and not",
        pod({"securityContext": {"runAsNonRoot": True, "runAsUser": 0}}),
        f"{C}.securityContext.runAsNonRoot: runAsUser is 0, which is root",
    ),
    ("user id", pod({"securityContext": {"runAsUser": -1}}), "-1 is no user or group id"),
    (
        "seccomp",
        pod({"securityContext": {"seccompProfile": {"type": "Localhost"}}}),
        "'Localhost' is not one of RuntimeDefault, Unconfined",
    ),
    (
        "privileged and not",
        pod({"securityContext": {"privileged": True, "allowPrivilegeEscalation": False}}),
        f"{C}.securityContext.allowPrivilegeEscalation: cannot be false",
    ),
    ("stdinOnce", pod({"stdinOnce": True}), f"{C}.stdinOnce: needs stdin: true"),
    ("port", pod({"ports": [{"containerPort": 0}]}), f"{C}.ports[0].containerPort: 0 is no port"),
    ("hostPort", pod({"ports": [{"containerPort": 80, "hostPort": 99999}]}), "ports[0].hostPort: 99999 is no port"),
    ("hostIP", pod({"ports": [{"containerPort": 80, "hostPort": 80, "hostIP": "x"}]}), "hostIP: 'x' is no IP address"),
    ("hostNetwork", pod(hostNetwork=True), "spec.hostNetwork: not supported: a pod VM has no host namespace"),
    ("hostPath", pod(volumes=[{"name": "v", "hostPath": {"path": "/"}}]), "spec.volumes[0].hostPath: not supported"),
    (
        "other volume",
        pod(volumes=[{"name": "v", "nfs": {"server": "s", "path": "/"}}]),
        "volumes[0].nfs: not supported",
    ),
    ("fsGroup", pod(securityContext={"fsGroup": -1}), "spec.securityContext.fsGroup: -1 is no user or group id"),
    ("too many groups", pod(securityContext={"supplementalGroups": [1] * 1000}), "1000 groups; at most 512"),
    ("file modes", pod(volumes=[{"name": "v", "secret": {"secretName": "s", "defaultMode": 4095}}]), "is no file mode"),
    ("mount over the root", pod({"volumeMounts": [{"name": "v", "mountPath": "/./"}]}, volumes=[VOLUME]), "below /"),
    (
        "gRPC service",
        pod({"livenessProbe": {"grpc": {"port": 1, "service": "a\0b"}}}),
        f"{C}.livenessProbe.grpc.service",
    ),
    ("gRPC probe", pod({"livenessProbe": {"grpc": {"port": 0}}}), f"{C}.livenessProbe.grpc.port: 0 is no port"),
    (
        "probe of nothing",
        pod({"livenessProbe": {}}),
        f"{C}.livenessProbe: give one of exec, httpGet, tcpSocket, grpc, not none",
    ),
    (
        "probe of two things",
        pod({"readinessProbe": {"exec": {"command": ["x"]}, "tcpSocket": {"port": 1}}}),
        "give one of exec, httpGet, tcpSocket, grpc, not exec and tcpSocket",
    ),
    (
        "port by a name that there is not",
        pod({"ports": [{"name": "web", "containerPort": 80}], "livenessProbe": {"tcpSocket": {"port": "wbe"}}}),
        f"{C}.livenessProbe.tcpSocket.port: the container has no port 'wbe'; it has web",
    ),
    (
        "successThreshold of a liveness probe",
        pod({"livenessProbe": {"tcpSocket": {"port": 1}, "successThreshold": 2}}),
        f"{C}.livenessProbe.successThreshold: must be 1 for this probe",
    ),
    (
        "grace of a readiness probe",
        pod({"readinessProbe": {"tcpSocket": {"port": 1}, "terminationGracePeriodSeconds": 2}}),
        f"{C}.readinessProbe.terminationGracePeriodSeconds: not supported: a readiness probe ends nothing",
    ),
    (
        "negative period",
        pod({"startupProbe": {"tcpSocket": {"port": 1}, "periodSeconds": -1}}),
        f"{C}.startupProbe.periodSeconds: -1 is not from 1",
    ),
    (
        "blank in the path of a probe",
        pod({"readinessProbe": {"httpGet": {"port": 1, "path": "/a b"}}}),
        f"{C}.readinessProbe.httpGet.path: '/a b' has blanks",
    ),
    (
        "TCP hook",
        pod({"lifecycle": {"preStop": {"tcpSocket": {"port": 1}}}}),
        f"{C}.lifecycle.preStop.tcpSocket: not supported",
    ),
    (
        "probe of an init container",
        pod(initContainers=[{"name": "i", "image": "x", "livenessProbe": {"tcpSocket": {"port": 1}}}]),
        "spec.initContainers[0].livenessProbe: an init container runs to its end",
    ),
    (
        "policy of an init container",
        pod(initContainers=[{"name": "i", "image": "x", "restartPolicy": "Never"}]),
        "spec.initContainers[0].restartPolicy: 'Never' is not one of Always",
    ),
    (
        "two sources of a variable",
        pod(
            {
                "env": [
                    {
                        "name": "A",
                        "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}, "secretKeyRef": {"key": "k"}},
                    }
                ]
            }
        ),
        f"{C}.env[0].valueFrom: give one source, not fieldRef and secretKeyRef",
    ),
    ("envFrom of nothing", pod({"envFrom": [{"prefix": "X"}]}), f"{C}.envFrom[0]: give one of configMapRef, secretRef"),
    (
        "resource of no container",
        pod(
            {
                "env": [
                    {"name": "A", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu", "containerName": "x"}}}
                ]
            }
        ),
        "resourceFieldRef.containerName: variable A of container c: the pod has no container 'x'",
    ),
    ("policy of a container", pod({"restartPolicy": "Always"}), f"{C}.restartPolicy: not supported"),
    (
        "message policy",
        pod({"terminationMessagePolicy": "Never"}),
        f"{C}.terminationMessagePolicy: 'Never' is not one of File, FallbackToLogsOnError",
    ),
    ("alias", pod(hostAliases=[{"ip": "nope", "hostnames": ["a"]}]), "spec.hostAliases[0].ip: 'nope' is no IP address"),
    ("dns", pod(dnsPolicy="None"), "spec.dnsConfig.nameservers: dnsPolicy None needs at least one"),
    ("dns v6", pod(dnsConfig={"nameservers": ["::1"]}), "'::1' is no IPv4 address"),
]


@pytest.mark.parametrize(("manifest", "message"), [(m, t) for _, m, t in BAD], ids=[n for n, _, _ in BAD])
def test_bad_input_is_one_clear_error(manifest: Any, message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_pod(manifest)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_defaults() -> None:
    spec = parse_pod(MINIMAL)
    assert (spec.namespace, spec.name, spec.restart_policy, spec.grace_s, spec.hostname) == (
        "default",
        "p",
        "Always",
        30,
        "p",
    )
    container = spec.containers[0]
    assert container.security == Security()
    assert (container.command, container.args, container.pull) == (None, None, None)


def test_null_is_absent() -> None:
    spec = parse_pod(pod({"args": None, "env": None, "resources": None, "securityContext": None}, volumes=None))
    assert spec == parse_pod(MINIMAL)


def test_a_full_pod() -> None:
    container = {
        "command": ["sh"],
        "env": [
            {"name": "A", "value": "$(B)"},
            {"name": "N", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        ],
        "resources": {"limits": {"cpu": "1500m", "memory": "64Mi", "ephemeral-storage": "2Gi"}, "requests": {"cpu": 1}},
        "securityContext": {"runAsUser": 5, "capabilities": {"add": ["CAP_NET_ADMIN"], "drop": ["all"]}},
        "volumeMounts": [{"name": "m", "mountPath": "/m", "readOnly": True}],
    }
    spec = parse_pod(
        pod(
            container,
            securityContext={"runAsUser": 1, "runAsGroup": 2, "supplementalGroups": [3]},
            volumes=[{"name": "m", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}}],
        )
    )
    found = spec.containers[0]
    assert spec.volumes == (Volume("m", "memory", 2**20),)
    assert found.env == (EnvVar("A", "$(B)"), EnvVar("N", field="metadata.name"))
    assert (found.resources.cpu_limit_millis, found.resources.memory_limit) == (1500, 2**26)
    assert found.security == Security(user=5, group=2, groups=(3,), add=("NET_ADMIN",), drop=("ALL",))


def test_what_an_api_server_adds_is_accepted() -> None:
    manifest = pod(
        {
            "terminationMessagePath": "/dev/termination-log",
            "terminationMessagePolicy": "File",
            "imagePullPolicy": "Always",
        },
        dnsPolicy="ClusterFirst",
        schedulerName="default-scheduler",
        serviceAccountName="default",
        enableServiceLinks=True,
        hostNetwork=False,
        securityContext={},
        tolerations=[{"key": "k", "operator": "Exists"}],
        nodeName="n",
    )
    manifest["metadata"] |= {"uid": "u", "resourceVersion": "1", "creationTimestamp": "2026-01-01T00:00:00Z"}
    manifest["status"] = {"phase": "Pending"}
    assert parse_pod(manifest).name == "p"


def test_every_field_of_the_schema_is_refused_unless_a_row_says_otherwise() -> None:
    """A new Kubernetes version may add fields: each must be refused, or have a row here."""
    for name, table, prefix in (
        ("io.k8s.api.core.v1.PodSpec", POD_FIELDS, "spec."),
        ("io.k8s.api.core.v1.Container", CONTAINER_FIELDS, ""),
    ):
        for field in pod_definitions()[name]["properties"]:
            path = f"{prefix}{field}"
            if any(row == path or row.startswith((f"{path}.", f"{path}[")) for row in table):
                continue
            manifest = pod(**{field: [{}]}) if prefix else pod({field: [{}]})
            with pytest.raises(InvalidInput):
                parse_pod(manifest)


def test_refused_rows_say_why() -> None:
    for row in (*POD_FIELDS.values(), *CONTAINER_FIELDS.values()):
        assert row.why or row.support is Support.HONOURED, row


# ---- texts -----------------------------------------------------------------------------------------------------------


def test_several_documents_and_lists() -> None:
    text = "---\nkind: Pod\n---\n\n---\nkind: List\nitems: [{kind: A}, {kind: B}]\n"
    assert [d["kind"] for d in load_documents(text)] == ["Pod", "A", "B"]


def test_times_stay_strings() -> None:
    assert load_documents("a: 2026-01-01T00:00:00Z") == [{"a": "2026-01-01T00:00:00Z"}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", "line 2: the key 'a' is given twice"),
        ("a: [", "not YAML: line"),
        ("- 1\n", "a manifest must be a mapping, not a list"),
        ("just text", "a manifest must be a mapping, not a str"),
        ("a: !!python/object/apply:os.system [x]", "not YAML"),
        ("[" * 5000, "nested more than"),
        ("x" * 5_000_000, "at most 4194304 are taken"),
    ],
)
def test_bad_texts(text: str, message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        load_documents(text)
    assert message in str(caught.value)


def test_json_is_yaml() -> None:
    assert parse_pod(load_documents(json.dumps(MINIMAL))[0]) == parse_pod(MINIMAL)


def test_a_name_in_the_clusters_domain() -> None:
    plain = parse_pod(pod(subdomain="web"))
    assert (plain.hostname, plain.fqdn) == ("p", "p.web.default.svc.cluster.local")
    assert ["10.0.2.15", plain.fqdn] in setup_arguments(plain)["hosts"]
    full = parse_pod(pod(subdomain="web", hostname="h", setHostnameAsFQDN=True))
    assert full.hostname == setup_arguments(full)["hostname"] == "h.web.default.svc.cluster.local"
    assert parse_pod(pod(setHostnameAsFQDN=True)).hostname == "p"
    with pytest.raises(InvalidInput, match=r"spec\.setHostnameAsFQDN: .* Linux takes 64"):
        parse_pod(pod(subdomain="w" * 60, setHostnameAsFQDN=True))
