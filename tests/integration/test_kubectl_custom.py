"""Kinds that users define, with real kubectl."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from master_process import Kubectl, running_master, until

DEFINITION = """
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: backups.example.org}
spec:
  group: example.org
  scope: Namespaced
  names: {plural: backups, kind: Backup, shortNames: [bk], categories: [all]}
  versions:
  - name: v1
    served: true
    storage: true
    subresources:
      status: {}
      scale: {specReplicasPath: .spec.copies, statusReplicasPath: .status.copies}
    additionalPrinterColumns:
    - {name: Target, type: string, jsonPath: .spec.target}
    - {name: Done, type: string, jsonPath: '.status.conditions[?(@.type=="Done")].status'}
    - {name: Age, type: date, jsonPath: .metadata.creationTimestamp}
    schema:
      openAPIV3Schema:
        description: Backup copies a volume somewhere.
        type: object
        required: [spec]
        properties:
          spec:
            type: object
            required: [target]
            properties:
              target: {type: string, description: Where the copy goes., minLength: 3}
              copies: {type: integer, default: 1, minimum: 0}
          status:
            type: object
            properties:
              copies: {type: integer}
              conditions:
                type: array
                x-kubernetes-list-type: map
                x-kubernetes-list-map-keys: [type]
                items:
                  type: object
                  required: [type]
                  properties: {type: {type: string}, status: {type: string}}
  - name: v1beta1
    served: true
    storage: false
    schema: {openAPIV3Schema: {type: object, x-kubernetes-preserve-unknown-fields: true}}
"""
BACKUP = """
apiVersion: example.org/v1
kind: Backup
metadata: {name: nightly}
spec: {target: %s}
"""


@pytest.fixture(scope="module")
def kubectl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kubectl]:
    with running_master(tmp_path_factory.mktemp("master")) as master:
        run = master.kubectl
        run("apply", "-f", "-", stdin=DEFINITION)
        run("wait", "--for=condition=Established", "crd/backups.example.org", "--timeout=20s")
        yield run


def test_a_defined_kind_is_discovered_and_explained(kubectl: Kubectl) -> None:
    assert "backups" in kubectl("api-resources", "--api-group=example.org")
    assert "example.org/v1beta1" in kubectl("api-versions")
    said = kubectl("explain", "backups.spec.target")
    assert "Where the copy goes." in said
    assert "Backup copies a volume" in kubectl("explain", "backup")
    assert "backups.example.org" in kubectl("get", "crds")


def test_objects_are_applied_printed_and_changed(kubectl: Kubectl) -> None:
    assert "created" in kubectl("apply", "-f", "-", stdin=BACKUP % "tape")
    assert "unchanged" in kubectl("apply", "-f", "-", stdin=BACKUP % "tape")
    assert "configured" in kubectl("apply", "-f", "-", stdin=BACKUP % "disk")
    done = {"status": {"copies": 1, "conditions": [{"type": "Done", "status": "Yes"}]}}
    kubectl("patch", "bk", "nightly", "--subresource=status", "--type=merge", "-p", json.dumps(done))
    lines = kubectl("get", "bk").splitlines()
    assert lines[0].split() == ["NAME", "TARGET", "DONE", "AGE"]
    assert lines[1].split()[:3] == ["nightly", "disk", "Yes"]
    assert "Target:" in kubectl("describe", "backup", "nightly")
    kubectl("scale", "backup/nightly", "--replicas=3")
    assert kubectl.get("backup", "nightly")["spec"]["copies"] == 3
    assert kubectl.get("backups.v1beta1.example.org", "nightly")["apiVersion"] == "example.org/v1beta1"
    assert "backup.example.org/nightly" in kubectl("get", "all")


def test_bad_objects_are_told_as_kubectl_asks(kubectl: Kubectl) -> None:
    assert "spec.target" in kubectl("apply", "-f", "-", stdin=BACKUP % "x", code=1)
    odd = BACKUP % "tape, odd: 1"
    assert "odd" in kubectl("apply", "-f", "-", stdin=odd, code=1)
    assert 'unknown field "spec.odd"' in kubectl("apply", "--validate=warn", "-f", "-", stdin=odd)
    serverside = ("apply", "--server-side", "--field-manager=ann", "-f", "-")
    kubectl(*serverside, stdin=(BACKUP % "cloud").replace("nightly", "weekly"))
    assert "conflict" in kubectl(
        "apply", "--server-side", "--field-manager=bob", "-f", "-",
        stdin=(BACKUP % "other").replace("nightly", "weekly"), code=1,
    )  # fmt: skip


def test_a_definition_goes_with_its_objects(kubectl: Kubectl) -> None:
    kubectl("apply", "-f", "-", stdin=(BACKUP % "tape").replace("nightly", "last"))
    kubectl("delete", "crd", "backups.example.org", "--timeout=20s")
    said = kubectl("get", "backups", code=1)
    assert "the server doesn't have a resource type" in said or "could not find the requested resource" in said
    kubectl("apply", "-f", "-", stdin=DEFINITION)
    kubectl("wait", "--for=condition=Established", "crd/backups.example.org", "--timeout=20s")
    until(lambda: "No resources found" in kubectl("get", "backups"))
