"""Defaults, as the API reference documents them, and what a new object begins with."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from objects_of_kinds import LEAST, causes, container, made, new, pod_spec

from hypervisor.kube import resources
from hypervisor.master.kinds.pod_defaults import pull_policy, qos_class
from hypervisor.master.kinds.table import KINDS
from hypervisor.master.patch.values import copy
from hypervisor.master.schema.protobuf import table


@pytest.mark.parametrize("resource", list(LEAST), ids=lambda r: r.qualified)
def test_the_least_of_each_kind_is_accepted_and_has_stable_defaults(resource: Any) -> None:
    assert causes(resource, new(resource)) == []
    once = made(resource)
    twice = copy(once)
    KINDS.of(resource).default(twice)
    assert twice == once


def test_every_stored_kind_is_tested() -> None:
    assert {k.resource for k in KINDS if k.stored and k.kept_as is None} == set(LEAST)


def test_pod() -> None:
    spec = made(resources.PODS)["spec"]
    assert {k: v for k, v in spec.items() if k != "containers"} == {
        "restartPolicy": "Always",
        "dnsPolicy": "ClusterFirst",
        "schedulerName": "default-scheduler",
        "terminationGracePeriodSeconds": 30,
        "securityContext": {},
        "enableServiceLinks": True,
    }
    assert spec["containers"] == [
        {
            "name": "c",
            "image": "nginx:1",
            "imagePullPolicy": "IfNotPresent",
            "terminationMessagePath": "/dev/termination-log",
            "terminationMessagePolicy": "File",
            "resources": {},
        }
    ]


def test_a_new_pod_waits_whatever_its_author_says() -> None:
    assert made(resources.PODS, status={"phase": "Running"})["status"] == {"phase": "Pending", "qosClass": "BestEffort"}


def test_probes_hooks_ports_and_fields() -> None:
    given = container(
        readinessProbe={"httpGet": {"port": 80}},
        lifecycle={"preStop": {"httpGet": {"port": "web"}}},
        ports=[{"containerPort": 80}],
        env=[{"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}],
    )
    found = made(resources.PODS, spec=pod_spec(containers=[given]))["spec"]["containers"][0]
    assert found["readinessProbe"] == {
        "httpGet": {"port": 80, "path": "/", "scheme": "HTTP"},
        "timeoutSeconds": 1,
        "periodSeconds": 10,
        "successThreshold": 1,
        "failureThreshold": 3,
    }
    assert found["lifecycle"]["preStop"]["httpGet"] == {"port": "web", "path": "/", "scheme": "HTTP"}
    assert found["ports"] == [{"containerPort": 80, "protocol": "TCP"}]
    assert found["env"][0]["valueFrom"]["fieldRef"]["apiVersion"] == "v1"


def test_volumes() -> None:
    volumes = [
        {"name": "a"},
        {"name": "b", "configMap": {"name": "x"}},
        {"name": "c", "secret": {"secretName": "x"}},
        {"name": "d", "projected": {"sources": [{"serviceAccountToken": {"path": "t"}}]}},
        {"name": "e", "hostPath": {"path": "/x"}},
    ]
    found = made(resources.PODS, spec=pod_spec(volumes=volumes))["spec"]["volumes"]
    assert found[0] == {"name": "a", "emptyDir": {}}
    assert [v.get("configMap", v.get("secret", v.get("projected", {}))).get("defaultMode") for v in found] == [
        None,
        420,
        420,
        420,
        None,
    ]
    assert found[3]["projected"]["sources"][0]["serviceAccountToken"]["expirationSeconds"] == 3600
    assert found[4]["hostPath"]["type"] == ""


def test_limits_are_requests() -> None:
    given = container(resources={"limits": {"cpu": 1, "memory": "1Gi"}, "requests": {"cpu": "500m"}})
    pod = made(resources.PODS, spec=pod_spec(containers=[given]))
    assert pod["spec"]["containers"][0]["resources"]["requests"] == {"cpu": "500m", "memory": "1Gi"}
    assert pod["status"]["qosClass"] == "Burstable"


def test_classes_of_service() -> None:
    whole = {"limits": {"cpu": "1", "memory": "1Gi"}}
    assert qos_class({"containers": [{"resources": whole}]}) == "Guaranteed"
    assert qos_class({"containers": [{"resources": whole}, {}]}) == "Burstable"
    assert qos_class({"containers": [{}]}) == "BestEffort"


@pytest.mark.parametrize(
    ("image", "policy"),
    [
        ("nginx", "Always"),
        ("nginx:latest", "Always"),
        ("nginx:1.2", "IfNotPresent"),
        ("host:5000/nginx", "Always"),
        ("host:5000/nginx:1", "IfNotPresent"),
        ("nginx@sha256:abc", "IfNotPresent"),
    ],
)
def test_pull_policies(image: str, policy: str) -> None:
    assert pull_policy(image) == policy


def test_deployment() -> None:
    spec = made(resources.DEPLOYMENTS)["spec"]
    assert (spec["replicas"], spec["revisionHistoryLimit"], spec["progressDeadlineSeconds"]) == (1, 10, 600)
    rolling = {"maxSurge": "25%", "maxUnavailable": "25%"}
    assert spec["strategy"] == {"type": "RollingUpdate", "rollingUpdate": rolling}
    assert spec["template"]["spec"]["restartPolicy"] == "Always"
    recreate = LEAST[resources.DEPLOYMENTS]()["spec"] | {"strategy": {"type": "Recreate"}}
    assert made(resources.DEPLOYMENTS, spec=recreate)["spec"]["strategy"] == {"type": "Recreate"}


def test_daemon_set_and_replica_set() -> None:
    strategy = made(resources.DAEMON_SETS)["spec"]["updateStrategy"]
    assert strategy == {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}}
    found = made(resources.REPLICA_SETS)
    assert (found["spec"]["replicas"], found["metadata"]["labels"]) == (1, {"app": "a"})


def test_job_selects_its_own_pods() -> None:
    one, other = made(resources.JOBS), made(resources.JOBS)
    spec = one["spec"]
    assert (spec["completions"], spec["parallelism"], spec["backoffLimit"]) == (1, 1, 6)
    assert spec["selector"]["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items()
    assert spec["template"]["metadata"]["labels"]["batch.kubernetes.io/job-name"] == "a"
    assert spec["selector"] != other["spec"]["selector"]


def test_secret_in_clear_is_encoded() -> None:
    found = made(resources.SECRETS, data={"a": "eA=="}, stringData={"b": "ä"})
    assert found["type"] == "Opaque"
    assert found["data"] == {"a": "eA==", "b": base64.b64encode("ä".encode()).decode()}
    assert "stringData" not in found


def test_service() -> None:
    spec = made(resources.SERVICES)["spec"]
    assert spec["ports"] == [{"port": 80, "protocol": "TCP", "targetPort": 80}]
    assert (spec["type"], spec["sessionAffinity"], spec["internalTrafficPolicy"]) == ("ClusterIP", "None", "Cluster")


def test_namespace() -> None:
    found = made(resources.NAMESPACES, "n")
    assert found["metadata"]["labels"] == {"kubernetes.io/metadata.name": "n"}
    assert (found["spec"], found["status"]) == ({"finalizers": ["kubernetes"]}, {"phase": "Active"})


def test_one_event_in_two_forms() -> None:
    kind = next(k for k in KINDS if k.kept_as is not None)
    event = {"regarding": {"name": "p"}, "note": "n", "reason": "R", "reportingController": "c", "deprecatedCount": 2}
    core = kind.to_kept(event)
    assert core["involvedObject"] == {"name": "p"}
    assert (core["message"], core["count"], core["apiVersion"]) == ("n", 2, "v1")
    assert kind.from_kept(core) == event | {"apiVersion": "events.k8s.io/v1"}


def test_every_published_kind_can_be_sent_in_protobuf() -> None:
    """kubectl create does so. Definitions of kinds are what no client of that sort knows."""
    known = table()
    lacking = {k.resource.kind for k in KINDS if k.schema not in known}
    assert lacking <= {"CustomResourceDefinition"}, "run tools/schema/protobuf-fields"
