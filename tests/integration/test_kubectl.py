"""Real kubectl against ``hv master``: each command's effect, on objects alone (no host, no VM)."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from master_process import KUBECTL, Kubectl, running_master, until

DEPLOYMENT = """
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, labels: {app: web}}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec: {containers: [{name: web, image: "busybox:1"}]}
"""
CONFIG = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: applied}\ndata: {colour: %s}\n"
NODE = {
    "apiVersion": "v1",
    "kind": "Node",
    "metadata": {"name": "n1"},
    # Nothing runs here: a pod of another test that the scheduler put on this node would never end its drain.
    "spec": {"taints": [{"key": "podvisor.io/test", "effect": "NoSchedule"}]},
    "status": {
        "capacity": {"cpu": "4", "memory": "8Gi", "pods": "50"},
        "allocatable": {"cpu": "4", "memory": "8Gi", "pods": "50"},
        "conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady"}],
    },
}


@pytest.fixture(scope="module")
def kubectl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kubectl]:
    with running_master(tmp_path_factory.mktemp("master")) as master:
        yield master.kubectl


def test_discovery_and_explain(kubectl: Kubectl) -> None:
    listed = kubectl("api-resources", "--no-headers")
    assert "deployments" in listed and "po" in listed.split()
    assert "apps/v1" in kubectl("api-versions")
    assert "image" in kubectl("explain", "pod.spec.containers")
    assert "podvisor" in kubectl("version")
    assert "ok" in kubectl("get", "--raw", "/readyz?verbose")


def test_create_of_every_sort(kubectl: Kubectl) -> None:
    kubectl("create", "configmap", "made", "--from-literal=a=b")
    kubectl("create", "secret", "generic", "hidden", "--from-literal=a=b")
    kubectl("create", "serviceaccount", "robot")
    kubectl("create", "job", "once", "--image=busybox", "--", "true")
    assert kubectl.get("configmap", "made")["data"] == {"a": "b"}
    assert kubectl.get("secret", "hidden")["data"] == {"a": "Yg=="}
    assert kubectl.get("job", "once")["spec"]["template"]["spec"]["containers"][0]["command"] == ["true"]
    assert "already exists" in kubectl("create", "configmap", "made", code=1)


def test_apply_diff_and_server_side(kubectl: Kubectl) -> None:
    kubectl("apply", "-f", "-", stdin=CONFIG % "red")
    assert "unchanged" in kubectl("apply", "-f", "-", stdin=CONFIG % "red")
    assert "+  colour: blue" in kubectl("diff", "-f", "-", stdin=CONFIG % "blue", code=1)
    kubectl("apply", "-f", "-", stdin=CONFIG % "blue")
    assert kubectl.get("cm", "applied")["data"] == {"colour": "blue"}
    server_side = (CONFIG % "green").replace("applied", "owned")
    kubectl("apply", "--server-side", "-f", "-", stdin=server_side)
    kubectl("patch", "cm", "owned", "-p", '{"data":{"colour":"grey"}}')
    assert "conflict" in kubectl("apply", "--server-side", "-f", "-", stdin=server_side, code=1)
    kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=server_side)
    assert kubectl.get("cm", "owned")["data"] == {"colour": "green"}


def test_unknown_fields_as_kubectl_asks(kubectl: Kubectl) -> None:
    body = (CONFIG % "red").replace("applied", "odd") + "dada: {}\n"
    assert 'unknown field "dada"' in kubectl("apply", "-f", "-", stdin=body, code=1)
    assert 'unknown field "dada"' in kubectl("apply", "--validate=warn", "-f", "-", stdin=body)
    assert "odd" not in kubectl("get", "cm", "-o", "name", "--field-selector=metadata.name=other")
    kubectl("apply", "--validate=ignore", "-f", "-", stdin=body)


def test_deployment_scale_and_output_forms(kubectl: Kubectl) -> None:
    kubectl("apply", "-f", "-", stdin=DEPLOYMENT)
    until(lambda: len(kubectl.get("pods", "-l", "app=web")["items"]) == 2)
    kubectl("scale", "deployment/web", "--replicas=3")
    until(lambda: len(kubectl.get("pods", "-l", "app=web")["items"]) == 3)
    assert "IP" in kubectl("get", "pods", "-o", "wide").splitlines()[0]
    assert "replicas: 3" in kubectl("get", "deployment", "web", "-o", "yaml")
    assert kubectl("get", "deployment", "web", "-o", "jsonpath={.spec.replicas}") == "3"
    assert kubectl("get", "deploy", "-o", "custom-columns=N:.metadata.name", "--no-headers").split() == ["web"]
    assert "busybox:1" in kubectl("describe", "deployment", "web")
    until(lambda: "Scaled up replica set" in kubectl("describe", "deployment", "web"))
    until(lambda: "Created pod" in kubectl("describe", "replicaset", "-l", "app=web"))
    kubectl("delete", "deployment", "web")
    until(lambda: kubectl.get("pods", "-l", "app=web")["items"] == [])


def test_a_list_is_checked_and_applied(kubectl: Kubectl) -> None:
    """kubectl checks lists against the Swagger document in protobuf, and nothing else."""
    good = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "listed"}, "data": {"a": "1"}}
    bad = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": {"containerz": []}}
    many = {"apiVersion": "v1", "kind": "List", "items": [good]}
    assert "configmap/listed created" in kubectl("apply", "-f", "-", stdin=json.dumps(many))
    refused = kubectl("apply", "-f", "-", stdin=json.dumps(many | {"items": [good, bad]}), code=1)
    assert 'unknown field "containerz" in io.k8s.api.core.v1.PodSpec' in refused


def test_label_annotate_patch_and_edit(kubectl: Kubectl, tmp_path: Path) -> None:
    kubectl("create", "configmap", "changed", "--from-literal=a=1")
    kubectl("label", "cm", "changed", "team=red")
    kubectl("annotate", "cm", "changed", "note=hello")
    kubectl("patch", "cm", "changed", "--type=merge", "-p", '{"data":{"a":"2"}}')
    kubectl("patch", "cm", "changed", "--type=json", "-p", '[{"op":"add","path":"/data/b","value":"3"}]')
    kubectl("patch", "cm", "changed", "--type=strategic", "-p", '{"data":{"c":"4"}}')
    editor = tmp_path / "editor"
    editor.write_text('#!/bin/sh\nsed -i \'s/a: "2"/a: "5"/\' "$1"\n')
    editor.chmod(0o755)
    kubectl("edit", "cm", "changed", KUBE_EDITOR=str(editor))
    found = kubectl.get("cm", "changed")
    assert found["data"] == {"a": "5", "b": "3", "c": "4"}
    assert found["metadata"]["labels"] == {"team": "red"}
    assert found["metadata"]["annotations"]["note"] == "hello"


def test_watch_and_wait(kubectl: Kubectl) -> None:
    command = [KUBECTL, "get", "cm", "-w", "--field-selector=metadata.name=seen", "-o", "name"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=kubectl.env) as watching:
        try:
            kubectl("create", "configmap", "seen")
            assert watching.stdout is not None
            assert watching.stdout.readline().strip() == "configmap/seen"
        finally:
            watching.terminate()
    kubectl("run", "slow", "--image=busybox")
    waiting = subprocess.Popen([KUBECTL, "wait", "pod/slow", "--for=condition=Ready"], env=kubectl.env)
    ready = {"status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}}
    kubectl("patch", "pod", "slow", "--subresource=status", "--type=merge", "-p", json.dumps(ready))
    assert waiting.wait(20) == 0
    assert "Running" in kubectl("get", "pod", "slow")
    assert "deleted" in kubectl("delete", "pod", "slow", "--force", "--grace-period=0")
    assert "NotFound" in kubectl("get", "pod", "slow", code=1)


def test_who_may_do_what(kubectl: Kubectl) -> None:
    assert "kubernetes-admin" in kubectl("auth", "whoami")
    assert kubectl("auth", "can-i", "delete", "pods").strip() == "yes"
    kubectl("create", "role", "reader", "--verb=get,list", "--resource=pods")
    kubectl("create", "rolebinding", "joe-reads", "--role=reader", "--user=joe")
    assert kubectl("auth", "can-i", "list", "pods", "--as=joe").strip() == "yes"
    assert "no" in kubectl("auth", "can-i", "delete", "pods", "--as=joe", code=1)
    assert 'User "joe" cannot delete' in kubectl("delete", "pod", "any", "--as=joe", code=1)


def test_cordon_schedule_and_drain(kubectl: Kubectl) -> None:
    kubectl("create", "-f", "-", stdin=json.dumps(NODE))
    kubectl("patch", "node", "n1", "--subresource=status", "--type=merge", "-p", json.dumps({"status": NODE["status"]}))
    kubectl("cordon", "n1")
    assert "SchedulingDisabled" in kubectl("get", "node", "n1")
    kubectl("uncordon", "n1")
    assert not kubectl.get("node", "n1")["spec"].get("unschedulable")
    kubectl("run", "bound", "--image=busybox")
    binding = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": "bound"}, "target": {"name": "n1"}}
    kubectl("create", "--raw", "/api/v1/namespaces/default/pods/bound/binding", "-f", "-", stdin=json.dumps(binding))
    assert kubectl.get("pod", "bound")["spec"]["nodeName"] == "n1"
    kubectl("patch", "pod", "bound", "--subresource=status", "-p", '{"status":{"phase":"Succeeded"}}')
    kubectl("drain", "n1", "--force", "--timeout=20s")
    assert kubectl.get("pods", "--field-selector=spec.nodeName=n1,status.phase!=Succeeded")["items"] == []


def test_namespaces_come_and_go(kubectl: Kubectl) -> None:
    kubectl("create", "namespace", "brief")
    inside = Kubectl(Path(kubectl.env["HOME"]), "brief")
    until(lambda: "default" in inside("get", "sa"))
    inside("create", "configmap", "gone")
    kubectl("delete", "namespace", "brief", "--timeout=20s")
    assert "NotFound" in kubectl("get", "namespace", "brief", code=1)
    assert "not found" in inside("create", "configmap", "late", code=1)


def test_services_get_addresses(kubectl: Kubectl) -> None:
    kubectl("create", "service", "nodeport", "door", "--tcp=80:8080")
    spec = kubectl.get("service", "door")["spec"]
    assert spec["clusterIP"].startswith("10.96.")
    assert 30000 <= spec["ports"][0]["nodePort"] <= 32767
    row = kubectl("get", "service", "door").splitlines()[1].split()
    assert row[2] == spec["clusterIP"]
    assert row[4] == f"80:{spec['ports'][0]['nodePort']}/TCP"
    kubectl("delete", "service", "door")


STATEFUL = DEPLOYMENT.replace("kind: Deployment", "kind: StatefulSet").replace(
    "replicas: 2", "replicas: 2\n  serviceName: x"
)


def test_stateful_sets_and_cron_jobs(kubectl: Kubectl) -> None:
    kubectl("apply", "-f", "-", stdin=STATEFUL.replace("name: web,", "name: kept,"))
    until(lambda: "kept-0" in kubectl("get", "pods"))  # kept-1 waits for it
    assert kubectl("get", "sts", "kept").splitlines()[1].split()[1] == "0/2"
    kubectl("set", "image", "sts/kept", "*=busybox:2")
    until(lambda: len(kubectl("rollout", "history", "sts/kept").strip().splitlines()) == 4)
    kubectl("rollout", "undo", "sts/kept")
    assert kubectl.get("sts", "kept")["spec"]["template"]["spec"]["containers"][0]["image"] == "busybox:1"
    kubectl("delete", "sts", "kept")
    kubectl("create", "cronjob", "tick", "--image=busybox", "--schedule=*/5 * * * *", "--", "true")
    assert "*/5 * * * *" in kubectl("get", "cronjob", "tick")
    kubectl("create", "job", "now", "--from=cronjob/tick")
    assert kubectl.get("job", "now")["spec"]["template"]["spec"]["containers"][0]["command"] == ["true"]
    kubectl("delete", "cronjob", "tick")
    until(lambda: "now" not in kubectl("get", "jobs"))  # it was the CronJob's


def test_quotas_are_kept_and_told(kubectl: Kubectl) -> None:
    kubectl("create", "namespace", "small")
    until(lambda: "default" in kubectl("get", "serviceaccounts", "-n", "small"))
    kubectl("create", "quota", "few", "--hard=configmaps=2", "-n", "small")
    until(lambda: "configmaps  1     2" in kubectl("describe", "quota", "few", "-n", "small"))
    kubectl("create", "configmap", "one", "-n", "small")
    assert "exceeded quota: few" in kubectl("create", "configmap", "two", "-n", "small", code=1)
    kubectl("delete", "namespace", "small", "--wait=false")
