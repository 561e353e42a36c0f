"""Which ReplicaSet is which revision of a Deployment. Pure.

Source: Kubernetes, "Deployments"; the annotations are those that kubectl's rollout commands read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from hypervisor.kube import meta
from hypervisor.kube.client import Object
from hypervisor.kube.resources import DEPLOYMENTS
from hypervisor.master.controllers.deployment.rollout import DESIRED, MAX_REPLICAS, bounds, by_age

HASH_LABEL = "pod-template-hash"
REVISION = "deployment.kubernetes.io/revision"
HISTORY = "deployment.kubernetes.io/revision-history"
_LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
_NOT_COPIED = frozenset((_LAST_APPLIED, REVISION, HISTORY, DESIRED, MAX_REPLICAS, "deprecated.deployment.rollback.to"))
_ALPHABET = "bcdfghjklmnpqrstvwxz2456789"
"""Upstream's: no vowels, nothing that looks like something else."""

Set = Mapping[str, Any]


def template_hash(template: Mapping[str, Any], collisions: int) -> str:
    """Ten letters that stand for a pod template; `collisions` tells templates apart that would get the same."""
    text = json.dumps([template, collisions], sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(text.encode()).digest()
    return "".join(_ALPHABET[byte % len(_ALPHABET)] for byte in digest[:10])


def without_hash(template: Mapping[str, Any]) -> Object:
    """The template as its Deployment has it."""
    metadata = dict(template.get("metadata") or {})
    labels = {k: v for k, v in (metadata.get("labels") or {}).items() if k != HASH_LABEL}
    metadata["labels"] = labels
    cleaned = {k: v for k, v in metadata.items() if v not in (None, {}, [])}
    return {"metadata": cleaned, "spec": template.get("spec")}


def newest(deployment: Mapping[str, Any], sets: Sequence[Set]) -> Set | None:
    """The ReplicaSet of the Deployment's present template; of several the oldest."""
    wanted = without_hash(deployment["spec"]["template"])
    same = [s for s in sets if without_hash(s["spec"]["template"]) == wanted]
    return min(same, key=by_age, default=None)


def revision(obj: Mapping[str, Any]) -> int:
    """0 where it has none."""
    text = str(meta.get(obj, "metadata", "annotations", REVISION, default="0"))
    return int(text) if text.isdigit() else 0


def annotations_for(deployment: Mapping[str, Any], known: Mapping[str, str], number: int) -> dict[str, str]:
    """What the newest ReplicaSet is to carry: the Deployment's annotations, and its revision."""
    own = meta.get(deployment, "metadata", "annotations", default={})
    wanted = {k: v for k, v in known.items() if k in _NOT_COPIED}
    wanted |= {k: v for k, v in own.items() if k not in _NOT_COPIED}
    before = known.get(REVISION)
    wanted[REVISION] = str(number)
    if before and before != str(number):
        history = [h for h in known.get(HISTORY, "").split(",") if h]
        wanted[HISTORY] = ",".join([*history, before][-20:])
    return wanted


def make_set(deployment: Mapping[str, Any], number: int, replicas: int) -> Object:
    """The ReplicaSet of the present template."""
    spec, metadata = deployment["spec"], deployment["metadata"]
    collisions = int(meta.get(deployment, "status", "collisionCount", default=0))
    digest = template_hash(without_hash(spec["template"]), collisions)
    template = dict(spec["template"])
    template_metadata = dict(template.get("metadata") or {})
    template_metadata["labels"] = {**(template_metadata.get("labels") or {}), HASH_LABEL: digest}
    template["metadata"] = template_metadata
    selector = dict(spec["selector"])
    selector["matchLabels"] = {**(selector.get("matchLabels") or {}), HASH_LABEL: digest}
    return {
        "apiVersion": "apps/v1",
        "kind": "ReplicaSet",
        "metadata": {
            "name": f"{metadata['name']}-{digest}",
            "namespace": metadata["namespace"],
            "labels": template_metadata["labels"],
            "annotations": annotations_for(deployment, {}, number) | replicas_annotations(deployment),
            "ownerReferences": [meta.owner_reference(DEPLOYMENTS, deployment)],
        },
        "spec": {
            "replicas": replicas,
            "selector": selector,
            "template": template,
            "minReadySeconds": int(spec.get("minReadySeconds") or 0),
        },
    }


def replicas_annotations(deployment: Mapping[str, Any]) -> dict[str, str]:
    """What a ReplicaSet remembers of its Deployment's size, so that a change of it in mid-rollout is noticed."""
    limits = bounds(deployment)
    return {DESIRED: str(limits.desired), MAX_REPLICAS: str(limits.most)}
