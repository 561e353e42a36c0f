"""A container's start whose connection to the agent breaks, as it does when the VM's device process is replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fake_guest import FakeGuest, Script

from hypervisor.controller.backoff import BackoffPolicy
from hypervisor.controller.concurrency import first
from hypervisor.controller.feed import AgentFeed
from hypervisor.controller.journal import Journal
from hypervisor.controller.keeper import ContainerKeeper, Vm
from hypervisor.controller.paths import PodPaths
from hypervisor.controller.record import ContainerRecord, PodRecord, Terminated
from hypervisor.introspect.agent import AgentClient


class Breaking(FakeGuest):
    """Its first connection for a start breaks, before or after the container has been started."""

    def __init__(self, directory: Path, script: Script, *, after: bool) -> None:
        super().__init__(directory, script)
        self._after = after
        self._broken = False

    async def _container_start(self, args: dict[str, Any]) -> dict[str, Any]:
        if self._broken:
            return await super()._container_start(args)
        self._broken = True
        if self._after:
            await super()._container_start(args)
        self.drop_connections()
        raise ConnectionError


@pytest.mark.parametrize("after", [False, True])
async def test_a_start_whose_connection_breaks(short_path: Path, after: bool) -> None:
    guest = Breaking(short_path / "vm", Script(ends={"main": [0]}), after=after)
    await guest.listen()
    record = PodRecord(containers=(ContainerRecord("main"),))
    (short_path / "pod").mkdir()
    journal = Journal(PodPaths(short_path / "pod"), record, "Never")
    agent = AgentClient(guest.address)
    feed = AgentFeed(agent, patience_s=5)
    keeper = ContainerKeeper(Vm(agent, feed), journal, {"name": "main"}, "Never", BackoffPolicy())
    ended = await first(keeper.run(), feed.run())
    assert isinstance(ended, Terminated)
    assert (ended.exit_code, ended.reason) == (0, "Completed")
    assert [call for call, _ in guest.calls].count("container.start") == (1 if after else 2)
    await guest.die("over")
