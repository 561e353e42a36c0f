"""What must hold of what runs pods from a template, and what of it may not change.

Source: Kubernetes API reference, apps/v1, batch/v1 and policy/v1; wording as upstream's validation.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from zoneinfo import ZoneInfo

from hypervisor.master.kinds.pod_rules import template
from hypervisor.master.kinds.rules import (
    Causes,
    View,
    at_least,
    forbidden,
    invalid,
    label_selector,
    one_of,
    required,
    unchanged,
    unsupported,
)
from hypervisor.master.kinds.schedule import Schedule

_CRON_NAME_MAX = 52
"""A Job's name is that, a dash and ten digits."""
_PERCENT = re.compile(r"[0-9]{1,9}%")


def _spec(obj: View) -> View:
    found: View = obj.get("spec") or {}
    return found


def _selects(spec: View) -> Causes:
    """A selector is there, is not empty, and matches the labels of the template that the pods are made from."""
    selector = spec.get("selector")
    if selector is None:
        yield required("spec.selector")
        return
    yield from label_selector("spec.selector", selector)
    if not selector.get("matchLabels") and not selector.get("matchExpressions"):
        yield invalid("spec.selector", selector, "empty selector is invalid for deployment")
        return
    labels = (((spec.get("template") or {}).get("metadata") or {}).get("labels")) or {}
    if not matches(selector, labels):
        yield invalid("spec.template.metadata.labels", labels, "`selector` does not match template `labels`")


def matches(selector: View, labels: View) -> bool:
    """Whether a LabelSelector that is well formed selects these labels."""
    if any(labels.get(key) != value for key, value in (selector.get("matchLabels") or {}).items()):
        return False
    return all(_holds(rule, labels) for rule in selector.get("matchExpressions") or ())


def _holds(rule: View, labels: View) -> bool:
    key, values = str(rule.get("key")), rule.get("values") or ()
    tests = {
        "In": key in labels and labels[key] in values,
        "NotIn": key not in labels or labels[key] not in values,
        "Exists": key in labels,
        "DoesNotExist": key not in labels,
    }
    return tests.get(str(rule.get("operator")), False)


def _restarts(spec: View, supported: tuple[str, ...]) -> Causes:
    policy = ((spec.get("template") or {}).get("spec") or {}).get("restartPolicy")
    if policy and policy not in supported:
        yield unsupported("spec.template.spec.restartPolicy", policy, supported)


def replica_set(obj: View) -> Causes:
    """A ReplicaSet."""
    spec = _spec(obj)
    yield from at_least("spec.replicas", spec.get("replicas"))
    yield from at_least("spec.minReadySeconds", spec.get("minReadySeconds"))
    yield from _selects(spec)
    yield from template("spec.template", spec.get("template"))
    yield from _restarts(spec, ("Always",))


def deployment(obj: View) -> Causes:
    """A Deployment."""
    yield from replica_set(obj)
    spec = _spec(obj)
    yield from at_least("spec.revisionHistoryLimit", spec.get("revisionHistoryLimit"))
    yield from at_least("spec.progressDeadlineSeconds", spec.get("progressDeadlineSeconds"))
    deadline, ready = spec.get("progressDeadlineSeconds"), spec.get("minReadySeconds", 0)
    if isinstance(deadline, int) and deadline <= ready:
        yield invalid("spec.progressDeadlineSeconds", deadline, "must be greater than minReadySeconds")
    strategy = spec.get("strategy") or {}
    yield from one_of("spec.strategy.type", strategy.get("type"), ("Recreate", "RollingUpdate"))
    if strategy.get("type") == "Recreate" and strategy.get("rollingUpdate") is not None:
        why = "may not be specified when strategy `type` is 'Recreate'"
        yield forbidden("spec.strategy.rollingUpdate", why)
    elif strategy.get("type") == "RollingUpdate":
        yield from _rolling("spec.strategy.rollingUpdate", strategy.get("rollingUpdate") or {}, both_zero=False)


def _rolling(path: str, rolling: View, *, both_zero: bool) -> Causes:
    surge, gone = rolling.get("maxSurge"), rolling.get("maxUnavailable")
    yield from share(f"{path}.maxSurge", surge)
    yield from share(f"{path}.maxUnavailable", gone)
    if isinstance(gone, str) and _PERCENT.fullmatch(gone) and int(gone[:-1]) > 100:
        yield invalid(f"{path}.maxUnavailable", gone, "must not be greater than 100%")
    if not both_zero and _zero(surge) and _zero(gone):
        yield invalid(f"{path}.maxUnavailable", gone, "may not be 0 when `maxSurge` is 0")


def _zero(value: Any) -> bool:
    return value == 0 or (isinstance(value, str) and value.rstrip("%").strip("0") == "")


def share(path: str, value: Any) -> Causes:
    """A number or a percentage of one."""
    if isinstance(value, str) and not _PERCENT.fullmatch(value):
        why = "a valid percent string must be a numeric string followed by an ending '%' (e.g. '1%', or '93%')"
        yield invalid(path, value, why)
    yield from at_least(path, value)


def daemon_set(obj: View) -> Causes:
    """A DaemonSet."""
    spec = _spec(obj)
    yield from _selects(spec)
    yield from template("spec.template", spec.get("template"))
    yield from _restarts(spec, ("Always",))
    yield from at_least("spec.minReadySeconds", spec.get("minReadySeconds"))
    yield from at_least("spec.revisionHistoryLimit", spec.get("revisionHistoryLimit"))
    strategy = spec.get("updateStrategy") or {}
    yield from one_of("spec.updateStrategy.type", strategy.get("type"), ("RollingUpdate", "OnDelete"))
    if strategy.get("type") == "RollingUpdate":
        rolling = strategy.get("rollingUpdate") or {}
        yield from _rolling("spec.updateStrategy.rollingUpdate", rolling, both_zero=False)


def stateful_set(obj: View) -> Causes:
    """A StatefulSet. Claims of volumes would wait for a provisioner that there is not."""
    spec = _spec(obj)
    for name in ("replicas", "minReadySeconds", "revisionHistoryLimit"):
        yield from at_least(f"spec.{name}", spec.get(name))
    yield from _selects(spec)
    yield from template("spec.template", spec.get("template"))
    yield from _restarts(spec, ("Always",))
    yield from one_of("spec.podManagementPolicy", spec.get("podManagementPolicy"), ("OrderedReady", "Parallel"))
    strategy = spec.get("updateStrategy") or {}
    yield from one_of("spec.updateStrategy.type", strategy.get("type"), ("OnDelete", "RollingUpdate"))
    partition = (strategy.get("rollingUpdate") or {}).get("partition")
    yield from at_least("spec.updateStrategy.rollingUpdate.partition", partition)
    if spec.get("volumeClaimTemplates"):
        why = "volumes of storage providers are not served; use emptyDir, or leave it out"
        yield forbidden("spec.volumeClaimTemplates", why)


def stateful_set_update(new: View, old: View) -> Causes:
    """A StatefulSet: what makes its identities stays."""
    changing = {"replicas", "ordinals", "template", "updateStrategy", "minReadySeconds", "revisionHistoryLimit"}
    changing.add("persistentVolumeClaimRetentionPolicy")
    after, before = _spec(new), _spec(old)
    if any(after.get(key) != before.get(key) for key in {*after, *before} - changing):
        why = (
            "updates to statefulset spec for fields other than 'replicas', 'ordinals', 'template', 'updateStrategy', "
            "'revisionHistoryLimit', 'persistentVolumeClaimRetentionPolicy' and 'minReadySeconds' are forbidden"
        )
        yield forbidden("spec", why)


def job(obj: View) -> Causes:
    """A Job."""
    spec = _spec(obj)
    for name in ("parallelism", "completions", "backoffLimit", "ttlSecondsAfterFinished", "backoffLimitPerIndex"):
        yield from at_least(f"spec.{name}", spec.get(name))
    yield from at_least("spec.activeDeadlineSeconds", spec.get("activeDeadlineSeconds"))
    yield from one_of("spec.completionMode", spec.get("completionMode"), ("NonIndexed", "Indexed"))
    if spec.get("completionMode") == "Indexed" and spec.get("completions") is None:
        yield required("spec.completions", "when completion mode is Indexed")
    yield from label_selector("spec.selector", spec.get("selector"))
    labels = (((spec.get("template") or {}).get("metadata") or {}).get("labels")) or {}
    if spec.get("selector") and not matches(spec["selector"], labels):
        yield invalid("spec.template.metadata.labels", labels, "`selector` does not match template `labels`")
    yield from template("spec.template", spec.get("template"))
    policy = ((spec.get("template") or {}).get("spec") or {}).get("restartPolicy")
    if policy == "Always":
        yield required("spec.template.spec.restartPolicy", 'valid values: "OnFailure", "Never"')


def cron_job(obj: View) -> Causes:
    """A CronJob."""
    spec = _spec(obj)
    schedule, zone = str(spec.get("schedule") or ""), str(spec.get("timeZone") or "")
    if not schedule:
        yield required("spec.schedule")
    elif "TZ" in schedule:
        yield invalid("spec.schedule", schedule, "cannot use TZ or CRON_TZ in schedule, use timeZone field instead")
    else:
        yield from _parsed("spec.schedule", schedule, Schedule.parse)
    if zone:
        yield from _parsed("spec.timeZone", zone, ZoneInfo)
    yield from one_of("spec.concurrencyPolicy", spec.get("concurrencyPolicy"), ("Allow", "Forbid", "Replace"))
    for name in ("startingDeadlineSeconds", "successfulJobsHistoryLimit", "failedJobsHistoryLimit"):
        yield from at_least(f"spec.{name}", spec.get(name))
    if len((obj.get("metadata") or {}).get("name") or "") > _CRON_NAME_MAX:
        yield invalid("metadata.name", obj["metadata"]["name"], f"must be no more than {_CRON_NAME_MAX} characters")
    template_spec = ((spec.get("jobTemplate") or {}).get("spec")) or {}
    for cause in job({"spec": {"completionMode": "NonIndexed", **template_spec}}):
        yield replace(cause, field=cause.field.replace("spec", "spec.jobTemplate.spec", 1))


def _parsed(path: str, value: str, parse: Callable[[str], object]) -> Causes:
    try:
        parse(value)
    except (ValueError, OSError, KeyError) as error:  # ZoneInfo has all three for what is no zone
        yield invalid(path, value, str(error) or "unknown")


def disruption_budget(obj: View) -> Causes:
    """A PodDisruptionBudget."""
    spec = _spec(obj)
    if spec.get("minAvailable") is not None and spec.get("maxUnavailable") is not None:
        yield invalid("spec", "", "minAvailable and maxUnavailable cannot be both set")
    yield from share("spec.minAvailable", spec.get("minAvailable"))
    yield from share("spec.maxUnavailable", spec.get("maxUnavailable"))
    yield from label_selector("spec.selector", spec.get("selector"))


def controller_revision(obj: View) -> Causes:
    """A ControllerRevision."""
    if obj.get("data") is None:
        yield required("data", "data is mandatory")
    yield from at_least("revision", obj.get("revision"))


def same_selector(new: View, old: View) -> Causes:
    """ReplicaSet, Deployment, DaemonSet: the selector stays."""
    yield from unchanged("spec.selector", _spec(new).get("selector"), _spec(old).get("selector"))


def job_update(new: View, old: View) -> Causes:
    """A Job: selector, completions (unless indexed), mode and template stay; a suspended one may be placed anew."""
    after, before = _spec(new), _spec(old)
    if after.get("completionMode") != "Indexed":
        yield from unchanged("spec.completions", after.get("completions"), before.get("completions"))
    for name in ("selector", "completionMode", "podFailurePolicy", "backoffLimitPerIndex"):
        yield from unchanged(f"spec.{name}", after.get(name), before.get(name))
    if not (before.get("suspend") and not (old.get("status") or {}).get("startTime")):
        yield from unchanged("spec.template", after.get("template"), before.get("template"))


def revision_update(new: View, old: View) -> Causes:
    """A ControllerRevision: its data stays."""
    yield from unchanged("data", new.get("data"), old.get("data"))
