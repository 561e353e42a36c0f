"""A guest's clock is brought to the host's, however slowly the guest answers."""

from __future__ import annotations

import time
from typing import Any

import pytest

from hypervisor.errors import ProtocolError
from hypervisor.introspect import clock

MS = 1_000_000


class World:
    """Time that passes only where it is told to: the host's clock, and a guest's that is wrong."""

    def __init__(self, wrong_ns: int, delays: list[tuple[int, int]]) -> None:
        self.now = 1_700_000_000 * 10**9
        self.wrong_ns = wrong_ns
        self.delays = delays  # to the guest and back, of each exchange; the last one's for ever
        self.asked: list[int] = []

    async def request(self, call: str, args: dict[str, Any]) -> dict[str, Any]:
        assert call == "clock"
        there, back = self.delays.pop(0) if len(self.delays) > 1 else self.delays[0]
        self.now += there
        self.wrong_ns += args["add_ns"]
        self.asked.append(args["add_ns"])
        answer = {"clock_ns": self.now + self.wrong_ns}
        self.now += back
        return answer

    async def align(self, monkeypatch: pytest.MonkeyPatch, answer_took: int = 0) -> int:
        monkeypatch.setattr(time, "time_ns", lambda: self.now)
        answer = {"clock_ns": self.now + self.wrong_ns}
        self.now += answer_took
        return await clock.align_clock(self, answer)  # type: ignore[arg-type]


async def test_a_clock_that_is_right_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(-MS // 2, [(MS, MS)])
    await world.align(monkeypatch)
    assert world.asked == []


@pytest.mark.parametrize("wrong", [-600 * MS, 600 * MS, -(10**9) * 3600])
async def test_a_lag_is_made_up_for_in_one_exchange(wrong: int, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(wrong, [(2 * MS, MS)])
    assert await world.align(monkeypatch) <= 2 * MS
    assert abs(world.wrong_ns) < MS
    assert len(world.asked) == 1


async def test_answers_that_dawdle(monkeypatch: pytest.MonkeyPatch) -> None:
    """At first each way takes a third of a second, and the answer to setup did too."""
    world = World(-100 * MS, [(5 * MS, 400 * MS), (MS, MS)])
    unsure = await world.align(monkeypatch, 300 * MS)
    assert abs(world.wrong_ns) <= unsure <= 410 * MS


async def test_it_does_not_go_on_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(-100 * MS, [(MS, MS)])
    monkeypatch.setattr(World, "wrong_ns", property(lambda _: -100 * MS, lambda _, __: None), raising=False)
    await world.align(monkeypatch)
    assert len(world.asked) == 4


async def test_an_agent_that_tells_no_time_is_left_alone() -> None:
    world = World(-100 * MS, [(MS, MS)])
    assert await clock.align_clock(world, {}) == 0  # type: ignore[arg-type]
    assert world.asked == []


async def test_a_time_that_is_none() -> None:
    with pytest.raises(ProtocolError, match="clock_ns"):
        await clock.align_clock(World(0, [(MS, MS)]), {"clock_ns": "noon"})  # type: ignore[arg-type]
