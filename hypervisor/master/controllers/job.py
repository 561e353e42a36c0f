"""Jobs: pods that run to their end, so many of them, some of them again.

Source: Kubernetes, "Jobs" (completions, parallelism, completion mode, back-off limit, deadline, suspend, pod failure
policy is not served) and "Automatic Cleanup for Finished Jobs".

Theory of operation
-------------------
::

    (suspended) --resume--> running --enough succeeded--> Complete --ttl over--> removed
                               | too many failed, or deadline over
                               v
                             Failed: what still runs is deleted

A pod that has ended is counted once: it carries a finalizer of ours until it is in the status's
``uncountedTerminatedPods`` or counts, so that a pod removed at the wrong moment is not forgotten, and a controller
killed at any step counts none twice (the counts and the uids counted are written in one update).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hypervisor.kube import meta
from hypervisor.kube.client import Object
from hypervisor.kube.meta import Key
from hypervisor.kube.resources import JOBS, PODS
from hypervisor.master.controllers import pods as podctl
from hypervisor.master.controllers.base import Context, Unseen, is_gone, own_key, owner_key, unless_gone
from hypervisor.master.controllers.batch import slow_start
from hypervisor.master.controllers.indexes import INDEX, index_of, parse_completed, render_completed, wanted_indexes
from hypervisor.master.controllers.pods import Pod

TRACKING = "batch.kubernetes.io/job-tracking"
FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 10.0, 360.0


@dataclass(frozen=True)
class Tally:
    """A Job's pods, told apart. Succeeded and failed ones include those counted earlier and removed since."""

    active: Sequence[Pod]
    newly_ended: Sequence[Pod]
    succeeded: int
    failed: int
    done_indexes: frozenset[int]


class JobController:
    """Makes pods until enough have succeeded."""

    name = "job"

    def __init__(self, context: Context) -> None:
        self._context = context
        self._unseen = Unseen()
        self.watches = {JOBS: own_key, PODS: owner_key(JOBS)}
        context.caches[PODS].add_handler(self._unseen.handler)

    async def sync(self, key: Key) -> float | None:
        """One turn for one Job."""
        job = self._context.cached(JOBS, *key)
        if job is None:
            return None
        pods = self._unseen.overlay(meta.uid_of(job), self._context.owned(PODS, job))
        if finished(job) is not None or meta.is_deleting(job):
            await self._untrack(pods)
            return await self._expire(job)
        tally = count(job, pods)
        verdict = _verdict(job, tally, time.time())
        wait: float | None = None
        if verdict is not None or meta.get(job, "spec", "suspend", default=False):
            await self._delete(job, tally.active)
        else:
            wait = await self._run(job, tally, pods)
        await self._tell(job, tally, verdict)
        await self._untrack([*tally.newly_ended, *filter(_is_abandoned, pods)])
        return _sooner(wait, _deadline_in_s(job, time.time()))

    # ---- pods --------------------------------------------------------------------------------------------------------

    async def _run(self, job: Mapping[str, Any], tally: Tally, pods: Sequence[Pod]) -> float | None:
        spec = job["spec"]
        parallelism = int(spec.get("parallelism", 1))
        left = _left(job, tally)
        wanted = min(parallelism, left)
        if len(tally.active) > wanted:
            surplus = sorted(tally.active, key=lambda p: podctl.deletion_order(p, {}))[: len(tally.active) - wanted]
            await self._delete(job, surplus)
            return None
        missing = wanted - len(tally.active)
        if missing <= 0:
            return None
        delay = backoff_in_s(pods, time.time())
        if delay > 0:
            return delay
        await self._make(job, tally, missing)
        return None

    async def _make(self, job: Mapping[str, Any], tally: Tally, count: int) -> None:
        indexes = wanted_indexes(job, tally.active, tally.done_indexes)[:count] if _indexed(job) else []
        if _indexed(job):
            count = len(indexes)

        async def one() -> None:
            pod = _pod_of(job, indexes.pop(0) if indexes else None)
            made = await self._context.client.create(PODS, pod, meta.get(job, "metadata", "namespace"))
            self._unseen.made(meta.uid_of(job), made)
            message = f"Created pod: {meta.get(made, 'metadata', 'name')}"
            self._context.events.record(job, "Normal", "SuccessfulCreate", message)

        error = await slow_start(count, one)
        if error is not None and not is_gone(error):
            self._context.events.record(job, "Warning", "FailedCreate", f"Error creating: {error}")
            raise error

    async def _delete(self, job: Mapping[str, Any], pods: Sequence[Pod]) -> None:
        for pod in pods:
            namespace, name = meta.key_of(pod)
            await unless_gone(self._context.client.delete(PODS, name, namespace, uid=meta.uid_of(pod)))
            self._context.events.record(job, "Normal", "SuccessfulDelete", f"Deleted pod: {name}")

    async def _untrack(self, pods: Sequence[Pod]) -> None:
        for pod in pods:
            finalizers = meta.get(pod, "metadata", "finalizers", default=[])
            if TRACKING not in finalizers:
                continue
            namespace, name = meta.key_of(pod)
            rest = [f for f in finalizers if f != TRACKING]
            patch = {"metadata": {"uid": meta.uid_of(pod), "finalizers": rest or None}}
            await unless_gone(self._context.client.patch(PODS, name, namespace, patch))

    # ---- what it tells -----------------------------------------------------------------------------------------------

    async def _tell(self, job: Mapping[str, Any], tally: Tally, verdict: tuple[str, str, str] | None) -> None:
        old: Mapping[str, Any] = job.get("status") or {}
        status = _status(job, tally, verdict)
        if status == old:
            return
        # An update, not a patch: counts and uids are right only together, and only after the state that was read.
        obj: Object = {**job, "status": status}
        # A conflict is raised: pods whose end is not written down keep their finalizer.
        await self._context.client.update(JOBS, obj, subresource="status")
        if verdict is not None:
            kind, reason, message = verdict
            if kind == "Complete":
                self._context.events.record(job, "Normal", "Completed", "Job completed")
            else:
                self._context.events.record(job, "Warning", reason, message)

    async def _expire(self, job: Mapping[str, Any]) -> float | None:
        ttl, ended = meta.get(job, "spec", "ttlSecondsAfterFinished"), finished(job)
        if ttl is None or ended is None or meta.is_deleting(job):
            return None
        left = meta.parse_time(ended["lastTransitionTime"]) + float(ttl) - time.time()
        if left > 0:
            return left
        namespace, name = meta.key_of(job)
        await unless_gone(
            self._context.client.delete(JOBS, name, namespace, uid=meta.uid_of(job), propagation="Foreground")
        )
        return None


def finished(job: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The condition that says that it has ended, well or not."""
    return next(
        (c for kind in ("Complete", "Failed") if (c := meta.condition(job, kind)) and c["status"] == "True"), None
    )


def count(job: Mapping[str, Any], pods: Sequence[Pod]) -> Tally:
    """Told apart, each ended pod counted once however often it is seen."""
    status: Mapping[str, Any] = job.get("status") or {}
    counted = set(meta.get(status, "uncountedTerminatedPods", "succeeded", default=()))
    counted |= set(meta.get(status, "uncountedTerminatedPods", "failed", default=()))
    ended = [
        p
        for p in pods
        if podctl.phase(p) in ("Succeeded", "Failed")
        and TRACKING in meta.get(p, "metadata", "finalizers", default=())
        and meta.uid_of(p) not in counted
    ]
    good = [p for p in ended if podctl.phase(p) == "Succeeded"]
    done = frozenset(i for p in pods if podctl.phase(p) == "Succeeded" and (i := index_of(p)) is not None)
    known = parse_completed(str(status.get("completedIndexes") or ""))
    # Those whose uid is in the status were counted with the numbers beside it.
    return Tally(
        active=[p for p in pods if podctl.is_active(p)],
        newly_ended=[p for p in pods if podctl.phase(p) in ("Succeeded", "Failed")],
        succeeded=len(done | known) if _indexed(job) else int(status.get("succeeded") or 0) + len(good),
        failed=int(status.get("failed") or 0) + len(ended) - len(good),
        done_indexes=done | known,
    )


def _status(job: Mapping[str, Any], tally: Tally, verdict: tuple[str, str, str] | None) -> Object:
    old: Mapping[str, Any] = job.get("status") or {}
    suspended = bool(meta.get(job, "spec", "suspend", default=False))
    tracked = [p for p in tally.newly_ended if TRACKING in meta.get(p, "metadata", "finalizers", default=())]
    numbers = {
        "active": 0 if verdict or suspended else len(tally.active),
        "ready": sum(1 for p in tally.active if podctl.is_ready(p)),
        "succeeded": tally.succeeded,
        "failed": tally.failed,
    }
    status: Object = {k: v for k, v in old.items() if k in ("startTime", "conditions", "completionTime")}
    status |= {k: v for k, v in numbers.items() if v or k == "ready"}
    uids = {
        word: sorted(meta.uid_of(p) for p in tracked if podctl.phase(p) == phase)
        for word, phase in (("succeeded", "Succeeded"), ("failed", "Failed"))
    }
    status["uncountedTerminatedPods"] = {k: v for k, v in uids.items() if v}
    if _indexed(job):
        status["completedIndexes"] = render_completed(tally.done_indexes)
    if not suspended:
        status.setdefault("startTime", meta.now())
    conditions = _conditions(old.get("conditions") or (), suspended, verdict)
    if conditions:
        status["conditions"] = conditions
    if verdict is not None and verdict[0] == "Complete":
        status["completionTime"] = meta.now()
    return status


def _conditions(
    known: Sequence[Mapping[str, Any]], suspended: bool, verdict: tuple[str, str, str] | None
) -> list[Object]:
    listed: list[Object] = [dict(c) for c in known]
    was = any(c["type"] == "Suspended" for c in known)
    if suspended or was:
        word = ("True", "JobSuspended", "Job suspended") if suspended else ("False", "JobResumed", "Job resumed")
        listed = meta.with_condition(
            listed, dict(zip(("type", "status", "reason", "message"), ("Suspended", *word), strict=True))
        )
    if verdict is not None:
        kind, reason, message = verdict
        ended = {"type": kind, "status": "True", "reason": reason, "message": message, "lastProbeTime": meta.now()}
        listed = meta.with_condition(listed, ended)
    return listed


def _verdict(job: Mapping[str, Any], tally: Tally, now: float) -> tuple[str, str, str] | None:
    """How the Job has ended: condition, reason, message."""
    spec = job["spec"]
    limit = int(spec.get("backoffLimit", 6))
    if tally.failed > limit:
        return "Failed", "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    if _deadline_in_s(job, now) == 0:
        return "Failed", "DeadlineExceeded", "Job was active longer than specified deadline"
    completions = spec.get("completions")
    # Without completions it is a work queue: one success means no more work, and what still runs may finish.
    emptied = completions is None and tally.succeeded > 0 and not tally.active
    done = emptied or (completions is not None and tally.succeeded >= int(completions))
    return ("Complete", "CompletionsReached", "Reached expected number of succeeded pods") if done else None


def _left(job: Mapping[str, Any], tally: Tally) -> int:
    """Pods that may be active at most, by what is still to be done."""
    completions = job["spec"].get("completions")
    if completions is None:
        return len(tally.active) if tally.succeeded else int(job["spec"].get("parallelism", 1))
    return max(0, int(completions) - tally.succeeded)


def _is_abandoned(pod: Pod) -> bool:
    """It is being deleted and nobody will tell how it ended: only the finalizer holds it."""
    if not meta.is_deleting(pod):
        return False
    return not meta.get(pod, "spec", "nodeName") or meta.get(pod, "metadata", "deletionGracePeriodSeconds") == 0


def _indexed(job: Mapping[str, Any]) -> bool:
    return bool(meta.get(job, "spec", "completionMode") == "Indexed")


def _pod_of(job: Mapping[str, Any], index: int | None) -> Object:
    pod = podctl.from_template(JOBS, job, job["spec"]["template"])
    pod["metadata"]["finalizers"] = [*pod["metadata"].get("finalizers", ()), TRACKING]
    if index is not None:
        name = meta.get(job, "metadata", "name")
        pod["metadata"]["generateName"] = f"{name[:50]}-{index}-"
        pod["metadata"]["annotations"] = {**(pod["metadata"].get("annotations") or {}), INDEX: str(index)}
        pod["metadata"]["labels"] = {**(pod["metadata"].get("labels") or {}), INDEX: str(index)}
        pod["spec"] = _with_index(pod["spec"], index)
        pod["spec"].setdefault("hostname", f"{name}-{index}"[:63])
    return pod


def _with_index(spec: Object, index: int) -> Object:
    variable = {"name": "JOB_COMPLETION_INDEX", "value": str(index)}
    changed = dict(spec)
    for field in ("containers", "initContainers"):
        if spec.get(field):
            changed[field] = [{**c, "env": [*(c.get("env") or ()), variable]} for c in spec[field]]
    return changed


def _deadline_in_s(job: Mapping[str, Any], now: float) -> float | None:
    limit, began = meta.get(job, "spec", "activeDeadlineSeconds"), meta.get(job, "status", "startTime")
    if limit is None or began is None or meta.get(job, "spec", "suspend", default=False):
        return None
    return max(0.0, meta.parse_time(began) + float(limit) - now)


def backoff_in_s(pods: Sequence[Pod], now: float) -> float:
    """Seconds until the next pod may be made: 10 s after a failure, doubling with each in a row, 6 minutes at most."""
    ends = sorted((_ended_at(p), podctl.phase(p)) for p in pods if podctl.phase(p) in ("Succeeded", "Failed"))
    in_a_row = 0
    for _, phase in reversed(ends):
        if phase != "Failed":
            break
        in_a_row += 1
    if not in_a_row:
        return 0.0
    delay = min(FIRST_BACKOFF_S * 2.0 ** (in_a_row - 1), LONGEST_BACKOFF_S)
    return max(0.0, ends[-1][0] + delay - now)


def _ended_at(pod: Pod) -> float:
    times = [
        ended["finishedAt"]
        for c in meta.get(pod, "status", "containerStatuses", default=())
        if (ended := meta.get(c, "state", "terminated")) and ended.get("finishedAt")
    ]
    text = max(times, default=None) or meta.get(pod, "metadata", "creationTimestamp")
    return meta.parse_time(text)


def _sooner(*waits: float | None) -> float | None:
    return min((w for w in waits if w is not None), default=None)
