"""CronJobs: a Job each time that their schedule comes round.

Theory of operation
-------------------
::

    next time in the future --> wait
    a time has passed --> suspended, too late, or another Job runs (Forbid)? left out
                      --> Replace: what runs is deleted
                      --> Job <name>-<minute>, named after its time: made once, whoever tries again --> lastScheduleTime

Of several times that were missed only the latest counts. Finished Jobs beyond the limits of the history go, the oldest
first. Source: Kubernetes, "CronJob".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any
from zoneinfo import ZoneInfo

from hypervisor.kube import meta
from hypervisor.kube.client import Object
from hypervisor.kube.errors import ApiError
from hypervisor.kube.meta import Key
from hypervisor.kube.resources import CRON_JOBS, JOBS
from hypervisor.master.controllers.base import Context, own_key, owner_key, unless_gone
from hypervisor.master.controllers.job import finished
from hypervisor.master.kinds.schedule import Schedule

TIME_ANNOTATION = "batch.kubernetes.io/cronjob-scheduled-timestamp"
LONGEST_S = 3600.0
"""It looks again at the latest after so long: clocks are set."""
MOST_MISSED = 100
Job = Mapping[str, Any]


class CronJobController:
    """See the module.

    :param now: the time of day
    """

    name = "cronjob"

    def __init__(self, context: Context, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._context = context
        self._now = now
        self.watches = {CRON_JOBS: own_key, JOBS: owner_key(CRON_JOBS)}

    async def sync(self, key: Key) -> float | None:
        """One turn for one CronJob."""
        cron = self._context.cached(CRON_JOBS, *key)
        if cron is None or meta.is_deleting(cron):
            return None
        jobs = self._context.owned(JOBS, cron)
        active = [j for j in jobs if finished(j) is None]
        await self._forget(cron, jobs)
        status: Object = {"active": [_reference(j) for j in sorted(active, key=meta.key_of)]}
        done = [str(t) for j in jobs if (t := meta.get(j, "status", "completionTime"))]
        status |= {"lastSuccessfulTime": max(done)} if done else {}
        wait = None
        if not meta.get(cron, "spec", "suspend", default=False):
            wait = await self._turn(cron, active, status)
        await self._tell(cron, status)
        return wait

    async def _turn(self, cron: Mapping[str, Any], active: Sequence[Job], status: Object) -> float | None:
        schedule, zone, now = _schedule(cron), zone_of(cron), self._now()
        due = latest(cron, schedule, zone, now)
        if due is not None and self._may(cron, due, now, active):
            if meta.get(cron, "spec", "concurrencyPolicy") == "Replace":
                for job in active:
                    await self._delete(cron, job)
                status["active"] = []
            made = await self._make(cron, due)
            status["lastScheduleTime"] = meta.rfc3339(due.timestamp())
            status["active"] = [*status["active"], *([_reference(made)] if made else [])]
        following = schedule.after(now, zone)
        left = (following - self._now()).total_seconds() + 0.05 if following is not None else LONGEST_S
        return min(max(left, 0.05), LONGEST_S)

    def _may(self, cron: Mapping[str, Any], due: datetime, now: datetime, active: Sequence[Job]) -> bool:
        deadline = meta.get(cron, "spec", "startingDeadlineSeconds")
        if deadline is not None and due + timedelta(seconds=int(deadline)) < now:
            self._context.events.record(cron, "Warning", "MissSchedule", f"Missed scheduled time to start a job: {due}")
            return False
        if active and meta.get(cron, "spec", "concurrencyPolicy") == "Forbid":
            why = "Not starting job because prior execution is running and concurrency policy is Forbid"
            self._context.events.record(cron, "Normal", "JobAlreadyActive", why)
            return False
        return True

    async def _make(self, cron: Mapping[str, Any], due: datetime) -> Object | None:
        job = job_of(cron, due)
        try:
            made = await self._context.client.create(JOBS, job, meta.key_of(cron)[0])
        except ApiError as error:
            if error.reason == "AlreadyExists":
                return None  # made by one before us, who was killed before he said so
            self._context.events.record(cron, "Warning", "FailedCreate", f"Error creating job: {error}")
            raise
        self._context.events.record(cron, "Normal", "SuccessfulCreate", f"Created job {meta.key_of(made)[1]}")
        return made

    async def _delete(self, cron: Mapping[str, Any], job: Job) -> None:
        namespace, name = meta.key_of(job)
        await unless_gone(
            self._context.client.delete(JOBS, name, namespace, uid=meta.uid_of(job), propagation="Background")
        )
        self._context.events.record(cron, "Normal", "SuccessfulDelete", f"Deleted job {name}")

    async def _forget(self, cron: Mapping[str, Any], jobs: Sequence[Job]) -> None:
        for verdict, field in (("Complete", "successfulJobsHistoryLimit"), ("Failed", "failedJobsHistoryLimit")):
            ended = sorted((j for j in jobs if (finished(j) or {}).get("type") == verdict), key=_started)
            limit = int(meta.get(cron, "spec", field, default=0))
            for job in ended[: max(0, len(ended) - limit)]:
                await self._delete(cron, job)

    async def _tell(self, cron: Mapping[str, Any], status: Object) -> None:
        old = cron.get("status") or {}
        if {k: v for k, v in old.items() if v} != {k: v for k, v in ({**old, **status}).items() if v}:
            namespace, name = meta.key_of(cron)
            patch = {"status": {**status, "active": status["active"] or None}}
            await unless_gone(self._context.client.patch(CRON_JOBS, name, namespace, patch, subresource="status"))


def zone_of(cron: Mapping[str, Any]) -> tzinfo:
    """The zone of its schedule's times."""
    name = meta.get(cron, "spec", "timeZone", default="")
    return ZoneInfo(name) if name else UTC


def _schedule(cron: Mapping[str, Any]) -> Schedule:
    return Schedule.parse(cron["spec"]["schedule"])


def latest(cron: Mapping[str, Any], schedule: Schedule, zone: tzinfo, now: datetime) -> datetime | None:
    """The last time that has come and was not acted on."""
    start = datetime.fromisoformat(
        meta.get(cron, "status", "lastScheduleTime") or meta.get(cron, "metadata", "creationTimestamp")
    )
    deadline = meta.get(cron, "spec", "startingDeadlineSeconds")
    if deadline is not None:
        start = max(start, now - timedelta(seconds=int(deadline)))
    found = None
    for count, found in enumerate(schedule.between(start, now, zone)):  # noqa: B007  # the last one counts
        if count >= MOST_MISSED:  # it was away for long: from an hour ago is enough to find the latest
            return latest_of(schedule, zone, now)
    return found


def latest_of(schedule: Schedule, zone: tzinfo, now: datetime) -> datetime | None:
    """The last time before `now`, looking back further and further."""
    for back in (timedelta(hours=1), timedelta(days=1), timedelta(days=32), timedelta(days=366)):
        found = None
        for found in schedule.between(now - back, now, zone):  # noqa: B007
            pass
        if found is not None:
            return found
    return None


def job_of(cron: Mapping[str, Any], due: datetime) -> Object:
    """The Job of a time; its name is made of that time."""
    namespace, name = meta.key_of(cron)
    template = cron["spec"]["jobTemplate"]
    metadata = template.get("metadata") or {}
    annotations = {**(metadata.get("annotations") or {}), TIME_ANNOTATION: meta.rfc3339(due.timestamp())}
    made = {
        "name": f"{name}-{int(due.timestamp()) // 60}",
        "namespace": namespace,
        "annotations": annotations,
        "ownerReferences": [meta.owner_reference(CRON_JOBS, cron)],
    }
    made |= {"labels": metadata["labels"]} if metadata.get("labels") else {}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": made, "spec": template["spec"]}


def _reference(job: Job) -> Object:
    namespace, name = meta.key_of(job)
    return {"apiVersion": "batch/v1", "kind": "Job", "namespace": namespace, "name": name, "uid": meta.uid_of(job)}


def _started(job: Job) -> str:
    return str(meta.get(job, "metadata", "creationTimestamp", default="")) + meta.key_of(job)[1]
