"""The subresource scale over the wire: read, set, patched, applied; and whom its field belongs to."""

from __future__ import annotations

from typing import Any

import pytest
from masterkit import Api

APPLY = "application/apply-patch+yaml"


@pytest.fixture
async def deployment(api: Api) -> str:
    """The path of a Deployment of two replicas."""
    path = f"/apis/apps/v1/namespaces/{api.namespace}/deployments"
    template = {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "c", "image": "busybox"}]}}
    spec = {"replicas": 2, "selector": {"matchLabels": {"a": "b"}}, "template": template}
    body = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"}, "spec": spec}
    answer = await api.send("PATCH", f"{path}/web?fieldManager=author", body, APPLY)
    assert answer.status == 201, answer.body
    return f"{path}/web"


def scaled(replicas: Any) -> dict[str, Any]:
    return {
        "apiVersion": "autoscaling/v1",
        "kind": "Scale",
        "metadata": {"name": "web"},
        "spec": {"replicas": replicas},
    }


async def test_an_applied_scale_owns_the_number_and_nothing_else(api: Api, deployment: str) -> None:
    path = f"{deployment}/scale?fieldManager=scaler"
    conflict = await api.send("PATCH", path, scaled(5), APPLY)
    assert (conflict.status, conflict.json["reason"]) == (409, "Conflict")
    assert conflict.json["details"]["causes"][0]["field"] == ".spec.replicas"
    forced = await api.send("PATCH", f"{path}&force=true", scaled(5), APPLY)
    assert (forced.status, forced.json["spec"], forced.json["kind"]) == (200, {"replicas": 5}, "Scale")
    live = (await api.get(deployment)).json
    assert live["spec"]["replicas"] == 5
    assert live["spec"]["template"]["spec"]["containers"][0]["image"] == "busybox"
    (mine,) = [e for e in live["metadata"]["managedFields"] if e["manager"] == "scaler"]
    assert (mine["operation"], mine["subresource"]) == ("Apply", "scale")
    assert mine["fieldsV1"] == {"f:spec": {"f:replicas": {}}}
    again = await api.send("PATCH", path, scaled(6), APPLY)
    assert (again.status, again.json["spec"]) == (200, {"replicas": 6})


async def test_a_scale_that_is_none_is_refused(api: Api, deployment: str) -> None:
    path = f"{deployment}/scale?fieldManager=scaler&force=true"
    for body, code in (({"kind": "Scale"}, 400), (scaled("many"), 400), (scaled(-1), 422)):
        assert (await api.send("PATCH", path, body, APPLY)).status == code, body
    missing = deployment.replace("/web", "/none") + "/scale?fieldManager=scaler"
    assert (await api.send("PATCH", missing, scaled(1) | {"metadata": {"name": "none"}}, APPLY)).status == 404
    assert (await api.get(deployment)).json["spec"]["replicas"] == 2


async def test_a_scale_is_set_by_put_and_merge(api: Api, deployment: str) -> None:
    assert (await api.send("PUT", f"{deployment}/scale", scaled(3))).json["spec"] == {"replicas": 3}
    merge = await api.send(
        "PATCH", f"{deployment}/scale?fieldManager=hand", {"spec": {"replicas": 4}}, "application/merge-patch+json"
    )
    assert merge.json["status"] == {"replicas": 0, "selector": "a=b"}
    fields = (await api.get(deployment)).json["metadata"]["managedFields"]
    assert [e["subresource"] for e in fields if e["manager"] == "hand"] == ["scale"]
    assert (await api.get(f"{deployment}/scale")).json["spec"] == {"replicas": 4}


async def test_keys_of_tokens_are_found_where_the_configuration_says(api: Api) -> None:
    config = (await api.get("/.well-known/openid-configuration")).json
    assert config["jwks_uri"] == f"{api.base}/openid/v1/jwks"
    assert (await api.get(config["jwks_uri"].removeprefix(api.base))).json["keys"]


async def test_a_request_to_a_node_that_cannot_be_reached(api: Api) -> None:
    assert (await api.get("/api/v1/nodes/nowhere/proxy/healthz")).status == 404
    name = f"node-{api.namespace}"
    assert (await api.send("POST", "/api/v1/nodes", {"metadata": {"name": name}})).status == 201
    answer = await api.get(f"/api/v1/nodes/{name}/proxy/healthz")
    assert (answer.status, "where it serves" in answer.json["message"]) == (503, True)
