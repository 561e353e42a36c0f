"""CronJobs: when they are due, and the Jobs that they make then, each once."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from whole_master import Cluster

from hypervisor.kube import meta
from hypervisor.kube.errors import ApiError
from hypervisor.kube.events import EventRecorder
from hypervisor.kube.resources import CRON_JOBS, JOBS
from hypervisor.master.controllers.base import Context
from hypervisor.master.controllers.cronjob import CronJobController, latest
from hypervisor.master.kinds.schedule import Schedule


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


@pytest.mark.parametrize(
    ("schedule", "after", "due"),
    [
        ("* * * * *", "2026-01-01 00:00:30", "2026-01-01 00:01"),
        ("*/15 * * * *", "2026-01-01 00:50", "2026-01-01 01:00"),
        ("30 4 * * *", "2026-01-01 04:30", "2026-01-02 04:30"),
        ("0 0 1 */3 *", "2026-01-02", "2026-04-01"),
        ("0 0 29 2 *", "2026-03-01", "2028-02-29"),
        ("0 12 * * mon-fri", "2026-01-02 13:00", "2026-01-05 12:00"),
        ("0 0 13 * 5", "2026-02-01", "2026-02-06"),  # the 13th, or a Friday
        ("0 0 * * 7", "2026-01-01", "2026-01-04"),
        ("@hourly", "2026-01-01 23:59", "2026-01-02"),
        ("5,10 1-3/2 * jan *", "2026-01-01 01:06", "2026-01-01 01:10"),
    ],
)
def test_when_a_schedule_comes_round(schedule: str, after: str, due: str) -> None:
    assert Schedule.parse(schedule).after(at(after)) == at(due)


def test_times_of_a_zone() -> None:
    berlin = ZoneInfo("Europe/Berlin")
    assert Schedule.parse("0 9 * * *").after(at("2026-07-01"), berlin) == at("2026-07-01 07:00")
    # 02:30 is skipped when clocks go forward.
    assert Schedule.parse("30 2 * * *").after(at("2026-03-28 12:00"), berlin) == at("2026-03-30 00:30")
    assert Schedule.parse("0 0 30 2 *").after(at("2026-01-01")) is None


@pytest.mark.parametrize(
    "text", ["", "* * * *", "60 * * * *", "* 24 * * *", "* * 0 * *", "5-1 * * * *", "*/0 * * * *", "a * * * *"]
)
def test_what_is_no_schedule(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Schedule.parse(text)


def cron(name: str = "tick", **spec: Any) -> dict[str, Any]:
    pod = {"containers": [{"name": "c", "image": "i"}], "restartPolicy": "Never"}
    job = {"spec": {"template": {"spec": pod}}}
    return {"metadata": {"name": name}, "spec": {"schedule": "* * * * *", "jobTemplate": job, **spec}}


def test_of_many_missed_times_the_latest_counts() -> None:
    made = cron() | {"status": {"lastScheduleTime": "2020-01-01T00:00:00Z"}}
    now = at("2026-01-01 00:00:30")
    assert latest(made, Schedule.parse("* * * * *"), UTC, now) == at("2026-01-01")
    assert latest(made, Schedule.parse("0 0 1 6 *"), UTC, now) == at("2025-06-01")


class Clockwork:
    """The controller by itself, on a clock of the test's, over caches that are filled when it is asked."""

    def __init__(self, cluster: Cluster) -> None:
        self.client = cluster.client
        self.now = datetime.now(UTC)
        self.events = EventRecorder(cluster.client, "test")

    async def turn(self, name: str = "tick") -> float | None:
        caches = {}
        for resource in (CRON_JOBS, JOBS):
            caches[resource] = Filled((await self.client.list(resource)).items)
        context = Context(self.client, self.events, caches)  # type: ignore[arg-type]
        return await CronJobController(context, lambda: self.now).sync(("default", name))

    async def jobs(self) -> list[str]:
        return [meta.key_of(j)[1] for j in (await self.client.list(JOBS, "default")).items if not meta.is_deleting(j)]


class Filled:
    """A cache of what was listed."""

    def __init__(self, items: list[Mapping[str, Any]]) -> None:
        self.items = {meta.key_of(o): o for o in items}
        self.store = self

    def get(self, key: Any) -> Any:
        return self.items.get(key)

    def by_index(self, _index: str, uid: str) -> list[Any]:
        return [o for o in self.items.values() if (meta.controller_of(o) or {}).get("uid") == uid]


async def started(cluster: Cluster, **spec: Any) -> Clockwork:
    """A CronJob that only the test's controller acts on: its times are all in the master's future."""
    year = datetime.now(UTC) + timedelta(days=300)
    await cluster.client.create(CRON_JOBS, cron(schedule=f"* * {year.day} {year.month} *", **spec), "default")
    clock = Clockwork(cluster)
    clock.now = year.replace(hour=5, minute=0, second=10)
    return clock


async def test_a_job_is_made_once_for_each_time(cluster: Cluster) -> None:
    clock = await started(cluster)
    wait = await clock.turn()
    assert wait is not None
    assert 0 < wait <= 51
    (first,) = await clock.jobs()
    assert first == f"tick-{int(clock.now.timestamp()) // 60}"
    await clock.turn()
    status = {"status": {"lastScheduleTime": None}}  # as if its maker had been killed before saying so
    await cluster.client.patch(CRON_JOBS, "tick", "default", status, subresource="status")
    await clock.turn()
    assert await clock.jobs() == [first]
    clock.now += timedelta(minutes=1)
    await clock.turn()
    assert len(await clock.jobs()) == 2
    found = await cluster.client.get(CRON_JOBS, "tick", "default")
    assert len(found["status"]["active"]) == 2


async def test_what_runs_is_left_alone_or_replaced(cluster: Cluster) -> None:
    clock = await started(cluster, concurrencyPolicy="Forbid")
    await clock.turn()
    (first,) = await clock.jobs()
    clock.now += timedelta(minutes=1)
    await clock.turn()
    assert await clock.jobs() == [first]
    await cluster.client.patch(CRON_JOBS, "tick", "default", {"spec": {"concurrencyPolicy": "Replace"}})
    await clock.turn()
    assert await clock.jobs() == [f"tick-{int(clock.now.timestamp()) // 60}"]


async def test_late_and_suspended_ones_make_nothing(cluster: Cluster) -> None:
    clock = await started(cluster, startingDeadlineSeconds=5)
    await clock.turn()  # ten seconds late
    assert await clock.jobs() == []
    await cluster.client.patch(
        CRON_JOBS, "tick", "default", {"spec": {"suspend": True, "startingDeadlineSeconds": None}}
    )
    assert await clock.turn() is None
    assert await clock.jobs() == []


async def test_history_is_kept_within_its_limit(cluster: Cluster) -> None:
    clock = await started(cluster, successfulJobsHistoryLimit=1)
    for _ in range(3):
        await clock.turn()
        for name in await clock.jobs():
            done = {"type": "Complete", "status": "True"}
            await cluster.client.patch(JOBS, name, "default", {"status": {"conditions": [done]}}, subresource="status")
        clock.now += timedelta(minutes=1)
    await cluster.client.patch(CRON_JOBS, "tick", "default", {"spec": {"suspend": True}})
    await clock.turn()
    assert len(await clock.jobs()) == 1


async def test_the_masters_own_loop_makes_a_job_when_it_is_time(cluster: Cluster) -> None:
    await cluster.client.create(CRON_JOBS, cron("now"), "default")
    patch = {"status": {"lastScheduleTime": meta.rfc3339((datetime.now(UTC) - timedelta(minutes=2)).timestamp())}}
    await cluster.client.patch(CRON_JOBS, "now", "default", patch, subresource="status")

    async def made() -> bool:
        return bool((await cluster.client.list(JOBS, "default")).items)

    await cluster.until(made)


async def test_bad_cron_jobs_are_refused(cluster: Cluster) -> None:
    for spec, said in (
        ({"schedule": "61 * * * *"}, "spec.schedule"),
        ({"timeZone": "Atlantis"}, "spec.timeZone"),
        ({"schedule": "TZ=UTC * * * * *"}, "cannot use TZ"),
        ({"concurrencyPolicy": "Maybe"}, "supported values"),
    ):
        with pytest.raises(ApiError, match=said):
            await cluster.client.create(CRON_JOBS, cron(**spec), "default")
