"""Who is scheduled next."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from hypervisor.master.scheduler import queue
from hypervisor.master.scheduler.queue import SchedulingQueue


def pod(uid: str, priority: int = 0, **spec: Any) -> dict[str, Any]:
    return {"metadata": {"uid": uid, "name": uid}, "spec": {"priority": priority, **spec}}


async def test_priority_before_age() -> None:
    waiting = SchedulingQueue()
    for uid, priority in (("old", 0), ("high", 5), ("young", 0)):
        waiting.put(pod(uid, priority))
    assert [(await waiting.pop()).uid for _ in range(3)] == ["high", "old", "young"]


async def test_a_changed_pod_is_there_once() -> None:
    waiting = SchedulingQueue()
    waiting.put(pod("a"))
    waiting.put(pod("a", nodeSelector={"x": "y"}))
    waiting.put(pod("b"))
    assert {(await waiting.pop()).uid for _ in range(2)} == {"a", "b"}
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.02):
            await waiting.pop()


async def test_a_sleeping_pod_wakes_when_the_cluster_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "FIRST_BACKOFF_S", 0.01)
    waiting = SchedulingQueue()
    waiting.put(pod("a"))
    waiting.sleep(await waiting.pop())
    popping = asyncio.create_task(waiting.pop())
    await asyncio.wait([popping], timeout=0.05)
    assert not popping.done()
    waiting.cluster_changed()
    assert (await asyncio.wait_for(popping, 5)).attempts == 1


async def test_news_that_came_while_it_was_tried_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "FIRST_BACKOFF_S", 0.01)
    waiting = SchedulingQueue()
    waiting.put(pod("a"))
    tried = await waiting.pop()
    waiting.cluster_changed()
    waiting.sleep(tried)
    assert (await asyncio.wait_for(waiting.pop(), 5)).uid == "a"


async def test_a_dropped_pod_is_not_popped() -> None:
    waiting = SchedulingQueue()
    waiting.put(pod("a"))
    waiting.put(pod("b"))
    waiting.drop("a")
    assert (await waiting.pop()).uid == "b"


async def test_backoff_doubles_to_its_bound() -> None:
    waiting = SchedulingQueue()
    waiting.put(pod("a"))
    one = await waiting.pop()
    delays = []
    for attempts in range(1, 7):
        one.attempts = attempts
        delays.append(one.backoff_s())
    assert delays == [1, 2, 4, 8, 10, 10]
