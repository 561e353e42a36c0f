"""Defaults of what runs pods from a template."""

from __future__ import annotations

import uuid

from hypervisor.master.kinds.defaults import Table, fill
from hypervisor.master.kinds.kind import Object
from hypervisor.master.kinds.pod_defaults import template

REPLICA_SET: Table = {"replicas": 1}
DEPLOYMENT: Table = {"replicas": 1, "revisionHistoryLimit": 10, "progressDeadlineSeconds": 600}
DAEMON_SET: Table = {"revisionHistoryLimit": 10}
STATEFUL_SET: Table = {
    "replicas": 1,
    "podManagementPolicy": "OrderedReady",
    "revisionHistoryLimit": 10,
    "persistentVolumeClaimRetentionPolicy": {"whenDeleted": "Retain", "whenScaled": "Retain"},
}
CRON_JOB: Table = {
    "concurrencyPolicy": "Allow",
    "suspend": False,
    "successfulJobsHistoryLimit": 3,
    "failedJobsHistoryLimit": 1,
}
JOB: Table = {"parallelism": 1, "backoffLimit": 6, "completionMode": "NonIndexed", "suspend": False}
DEPLOYMENT_UPDATE: Table = {"maxSurge": "25%", "maxUnavailable": "25%"}
DAEMON_SET_UPDATE: Table = {"maxSurge": 0, "maxUnavailable": 1}
JOB_UID_LABELS = ("batch.kubernetes.io/controller-uid", "controller-uid")
JOB_NAME_LABELS = ("batch.kubernetes.io/job-name", "job-name")


def replica_set(obj: Object) -> None:
    """Defaults of a ReplicaSet; without labels of its own it has its template's."""
    spec = obj.setdefault("spec", {})
    fill(spec, REPLICA_SET)
    template(spec)
    _template_labels(obj)


def _template_labels(obj: Object) -> None:
    made = obj["spec"].get("template") or {}
    labels = (made.get("metadata") or {}).get("labels")
    metadata = obj.setdefault("metadata", {})
    if labels and not metadata.get("labels"):
        metadata["labels"] = dict(labels)


def deployment(obj: Object) -> None:
    """Defaults of a Deployment."""
    spec = obj.setdefault("spec", {})
    fill(spec, DEPLOYMENT)
    _rolling(spec.setdefault("strategy", {}), DEPLOYMENT_UPDATE)
    template(spec)


def _rolling(strategy: Object, table: Table) -> None:
    fill(strategy, {"type": "RollingUpdate"})
    if strategy["type"] == "RollingUpdate":
        fill(strategy.setdefault("rollingUpdate", {}), table)


def daemon_set(obj: Object) -> None:
    """Defaults of a DaemonSet."""
    spec = obj.setdefault("spec", {})
    fill(spec, DAEMON_SET)
    _rolling(spec.setdefault("updateStrategy", {}), DAEMON_SET_UPDATE)
    template(spec)


def stateful_set(obj: Object) -> None:
    """Defaults of a StatefulSet."""
    spec = obj.setdefault("spec", {})
    fill(spec, STATEFUL_SET)
    _rolling(spec.setdefault("updateStrategy", {}), {"partition": 0})
    template(spec)
    _template_labels(obj)


def cron_job(obj: Object) -> None:
    """Defaults of a CronJob; its Jobs get their own when they are made."""
    spec = obj.setdefault("spec", {})
    fill(spec, CRON_JOB)
    made = spec.get("jobTemplate")
    if isinstance(made, dict) and isinstance(made.get("spec"), dict):
        template(made["spec"])


def job(obj: Object) -> None:
    """Defaults of a Job: one completion, unless it is a work queue (parallelism alone was given)."""
    spec = obj.setdefault("spec", {})
    if spec.get("completions") is None and spec.get("parallelism") is None:
        spec["completions"] = 1
    fill(spec, JOB)
    fill(spec, {"podReplacementPolicy": "Failed" if spec.get("podFailurePolicy") else "TerminatingOrFailed"})
    template(spec)


def new_job(obj: Object) -> None:
    """A new Job selects pods by a uid that is in no other, unless its author answers for another selector."""
    obj["status"] = {}
    spec, metadata = obj.setdefault("spec", {}), obj.get("metadata") or {}
    made = spec.get("template")
    if spec.get("manualSelector") or not isinstance(made, dict):
        return
    uid = metadata.get("uid") or str(uuid.uuid4())
    labels = made.setdefault("metadata", {}).setdefault("labels", {})
    labels |= dict.fromkeys(JOB_UID_LABELS, uid) | dict.fromkeys(JOB_NAME_LABELS, metadata.get("name", ""))
    selector = spec.setdefault("selector", {}).setdefault("matchLabels", {})
    selector[JOB_UID_LABELS[0]] = uid
