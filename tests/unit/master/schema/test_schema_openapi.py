"""The documents that kubectl reads: whole, and with the paths by which it decides what it may send."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from hypervisor.master.kinds.table import KINDS
from hypervisor.master.schema.openapi import Documents

DOCUMENTS = Documents(KINDS)


def read(path: str) -> Any:
    body = DOCUMENTS.v3(path)
    assert body is not None
    return json.loads(body)


@pytest.mark.parametrize("path", DOCUMENTS.paths())
def test_every_reference_leads_somewhere(path: str) -> None:
    document = read(path)
    named = set(re.findall(r'"#/components/schemas/([^"]*)"', json.dumps(document)))
    assert named <= document["components"]["schemas"].keys()


def test_swagger_is_whole_too() -> None:
    document = json.loads(DOCUMENTS.v2())
    named = set(re.findall(r'"#/definitions/([^"]*)"', json.dumps(document)))
    assert named <= document["definitions"].keys()
    assert "null" not in json.dumps(document["definitions"]["io.k8s.api.core.v1.PodSpec"]["properties"]["hostname"])


def test_the_index_names_every_group_version() -> None:
    index = json.loads(DOCUMENTS.v3_index())["paths"]
    assert set(index) == {"api/v1", *(f"apis/{g}/{v}" for g, vs in KINDS.groups().items() if g for v in vs)}
    assert all("?hash=" in entry["serverRelativeURL"] for entry in index.values())
    assert DOCUMENTS.v3("apis/nobody/v1") is None


def test_kubectl_finds_what_a_patch_may_be() -> None:
    patch = read("apis/apps/v1")["paths"]["/apis/apps/v1/namespaces/{namespace}/deployments/{name}"]["patch"]
    assert patch["x-kubernetes-group-version-kind"] == {"group": "apps", "kind": "Deployment", "version": "v1"}
    assert patch["x-kubernetes-action"] == "patch"
    assert "application/strategic-merge-patch+json" in patch["requestBody"]["content"]
    assert {"dryRun", "fieldValidation", "fieldManager", "force"} <= {p["name"] for p in patch["parameters"]}


def test_the_kind_of_a_schema_is_marked() -> None:
    schema = read("api/v1")["components"]["schemas"]["io.k8s.api.core.v1.Pod"]
    assert schema["x-kubernetes-group-version-kind"] == [{"group": "", "kind": "Pod", "version": "v1"}]
    assert "enum" not in schema["properties"]["kind"]
    assert schema["description"]


@pytest.mark.parametrize("path", DOCUMENTS.paths())
def test_operations_have_names_of_their_own(path: str) -> None:
    items = read(path)["paths"].values()
    names = [o["operationId"] for item in items for key, o in item.items() if key != "parameters"]
    assert len(names) == len(set(names))
