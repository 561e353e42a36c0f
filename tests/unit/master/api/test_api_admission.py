"""What admission does to objects on their way in, and what it refuses; and eviction, over the wire."""

from __future__ import annotations

from typing import Any

import pytest
from masterkit import Api, pod

MOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
POLICY = "/apis/policy/v1/namespaces"
CLASSES = "/apis/scheduling.k8s.io/v1/priorityclasses"


async def made(api: Api, name: str, **spec: Any) -> Any:
    """The spec of a new pod, as it was stored."""
    answer = await api.send("POST", api.pods, pod(name, **spec))
    assert answer.status == 201, answer.body
    return answer.json["spec"]


async def refused(api: Api, name: str, **spec: Any) -> str:
    """Why a pod may not be made."""
    answer = await api.send("POST", api.pods, pod(name, **spec))
    assert (answer.status, answer.json["reason"]) == (403, "Forbidden"), answer.body
    assert (await api.get(f"{api.pods}/{name}")).status == 404
    return str(answer.json["message"])


async def test_a_pod_gets_the_token_of_its_account(api: Api) -> None:
    spec = await made(api, f"token-{api.namespace}")
    assert (spec["serviceAccountName"], spec["serviceAccount"]) == ("default", "default")
    (volume,) = [v for v in spec["volumes"] if v["name"].startswith("kube-api-access-")]
    assert [next(iter(s)) for s in volume["projected"]["sources"]] == [
        "serviceAccountToken",
        "configMap",
        "downwardAPI",
    ]
    assert [m["mountPath"] for m in spec["containers"][0]["volumeMounts"]] == [MOUNT]


async def test_a_pod_that_wants_no_token_gets_none(api: Api) -> None:
    spec = await made(api, f"tokenless-{api.namespace}", automountServiceAccountToken=False)
    assert not spec.get("volumes")
    assert not spec["containers"][0].get("volumeMounts")


async def test_a_pod_of_an_account_that_is_not_there_is_refused(api: Api) -> None:
    why = await refused(api, f"no-account-{api.namespace}", serviceAccountName="nobody")
    assert 'serviceaccount "nobody" not found' in why


NOT_READY = "node.kubernetes.io/not-ready"
UNREACHABLE = "node.kubernetes.io/unreachable"


async def test_a_pod_tolerates_a_lost_node_for_five_minutes(api: Api) -> None:
    own = {"key": NOT_READY, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 7}
    bare = await made(api, f"bare-{api.namespace}")
    assert {t["key"]: t["tolerationSeconds"] for t in bare["tolerations"]} == {NOT_READY: 300, UNREACHABLE: 300}
    told = await made(api, f"told-{api.namespace}", tolerations=[own])
    assert {t["key"]: t["tolerationSeconds"] for t in told["tolerations"]} == {NOT_READY: 7, UNREACHABLE: 300}


async def test_a_priority_class_gives_the_number(api: Api) -> None:
    name = f"high-{api.namespace}"
    body = {"metadata": {"name": name}, "value": 1000, "preemptionPolicy": "Never"}
    assert (await api.send("POST", CLASSES, body)).status == 201
    spec = await made(api, name, priorityClassName=name)
    assert (spec["priority"], spec["preemptionPolicy"]) == (1000, "Never")
    assert (await made(api, f"plain-{name}"))["priority"] == 0
    critical = await made(api, f"critical-{name}", priorityClassName="system-node-critical")
    assert critical["priority"] == 2_000_001_000
    assert "must not be provided" in await refused(api, f"other-{name}", priorityClassName=name, priority=5)
    assert "no PriorityClass with name none" in await refused(api, f"none-{name}", priorityClassName="none")


async def test_nothing_is_made_in_a_namespace_that_is_not_there_or_goes(api: Api) -> None:
    answer = await api.send("POST", "/api/v1/namespaces/nowhere/configmaps", {"metadata": {"name": "x"}})
    assert (answer.status, answer.json["details"]["kind"]) == (404, "namespaces")
    assert (await api.send("DELETE", f"/api/v1/namespaces/{api.namespace}")).status == 200
    answer = await api.send("POST", api.maps, {"metadata": {"name": "x"}})
    assert answer.status == 403
    assert answer.json["details"]["causes"][0]["reason"] == "NamespaceTerminating"


@pytest.mark.parametrize("name", ["default", "kube-system", "kube-public"])
async def test_namespaces_that_stay(api: Api, name: str) -> None:
    answer = await api.send("DELETE", f"/api/v1/namespaces/{name}")
    assert (answer.status, "may not be deleted" in answer.json["message"]) == (403, True)
    assert (await api.get(f"/api/v1/namespaces/{name}")).json["status"]["phase"] == "Active"


async def budgeted(api: Api, allowed: int) -> str:
    """A pod under a budget that allows so many disruptions; its name."""
    name = f"guarded-{api.namespace}"
    body = pod(name, nodeName="nowhere") | {"metadata": {"name": name, "labels": {"app": name}}}
    assert (await api.send("POST", api.pods, body)).status == 201
    spec = {"minAvailable": 1, "selector": {"matchLabels": {"app": name}}}
    budgets = f"{POLICY}/default/poddisruptionbudgets"
    assert (await api.send("POST", budgets, {"metadata": {"name": name}, "spec": spec})).status == 201
    status = {"disruptionsAllowed": allowed, "observedGeneration": 1, "currentHealthy": 1, "desiredHealthy": 1}
    status |= {"expectedPods": 1}
    patch = {"status": status}
    answer = await api.send("PATCH", f"{budgets}/{name}/status", patch, "application/merge-patch+json")
    assert answer.status == 200, answer.body
    return name


async def evict(api: Api, name: str) -> Any:
    body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name}}
    return await api.send("POST", f"{api.pods}/{name}/eviction", body)


async def make_ready(api: Api, name: str) -> None:
    """A pod that is ready: its budget counts it."""
    ready = {"status": {"conditions": [{"type": "Ready", "status": "True"}]}}
    answer = await api.send("PATCH", f"{api.pods}/{name}/status", ready, "application/merge-patch+json")
    assert answer.status == 200, answer.body


async def test_an_eviction_that_the_budget_forbids_is_429(api: Api) -> None:
    name = await budgeted(api, allowed=0)
    await make_ready(api, name)
    answer = await evict(api, name)
    assert (answer.status, answer.json["reason"]) == (429, "TooManyRequests"), answer.body
    assert answer.json["details"]["causes"][0]["reason"] == "DisruptionBudget"
    assert "deletionTimestamp" not in (await api.get(f"{api.pods}/{name}")).json["metadata"]


async def test_an_eviction_spends_the_budget(api: Api) -> None:
    name = await budgeted(api, allowed=1)
    await make_ready(api, name)
    answer = await evict(api, name)
    assert answer.status == 201, answer.body
    assert (await api.get(f"{api.pods}/{name}")).json["metadata"]["deletionTimestamp"]
    budget = (await api.get(f"{POLICY}/default/poddisruptionbudgets/{name}")).json
    assert (budget["status"]["disruptionsAllowed"], list(budget["status"]["disruptedPods"])) == (0, [name])


async def test_the_labels_of_a_job_hold_its_uid_and_no_client_chooses_it(api: Api) -> None:
    body = pod("j") | {"metadata": {"name": "j", "uid": "mine"}}
    template = {"spec": body["spec"] | {"restartPolicy": "Never"}}
    body["spec"] = {"template": template}
    answer = await api.send("POST", f"/apis/batch/v1/namespaces/{api.namespace}/jobs", body)
    assert answer.status == 201, answer.body
    job = answer.json
    uid = job["metadata"]["uid"]
    assert uid != "mine"
    assert job["spec"]["selector"]["matchLabels"] == {"batch.kubernetes.io/controller-uid": uid}
    labels = job["spec"]["template"]["metadata"]["labels"]
    assert {labels["controller-uid"], labels["batch.kubernetes.io/controller-uid"]} == {uid}
