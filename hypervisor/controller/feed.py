"""What the agent says of its containers, kept up to date over broken connections.

Theory of operation
-------------------
`run` holds the agent's event stream: a snapshot, then each change. When the stream breaks it connects again; the new
snapshot carries whatever was missed, so no end of a container is lost. When the agent does not answer for
`patience_s`, `run` raises `VmFailed`: a VM whose agent is gone can neither be seen into nor be stopped in order.

An instance of a container is named by its start time, because a name is used again at each restart.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, NoReturn, cast

from hypervisor.controller.concurrency import Topic
from hypervisor.errors import HvError, ProtocolError, Timeout, VmFailed
from hypervisor.introspect.agent import AgentClient

RETRY_S = 0.2
MAX_MESSAGE = 4096


@dataclass(frozen=True, slots=True)
class Instance:
    """One instance of a container, as the agent tells it."""

    name: str
    state: str
    started_ns: int
    finished_ns: int
    exit_code: int
    signal: int | None
    oom_killed: bool
    message: str
    termination_message: str = ""

    @classmethod
    def parse(cls, data: object) -> Instance:
        """:raises ProtocolError: the agent sent something else"""
        if not isinstance(data, dict) or not isinstance(data.get("name"), str):
            raise ProtocolError("pod VM agent: an event without a container")
        signal = _number(data.get("signal"))
        exit_code = _number(data.get("exit_code"))
        return cls(
            name=data["name"],
            state=str(data.get("state")),
            started_ns=_number(data.get("started_ns")) or 0,
            finished_ns=_number(data.get("finished_ns")) or 0,
            exit_code=(128 + signal if signal else 0) if exit_code is None else exit_code,
            signal=signal,
            oom_killed=data.get("oom_killed") is True,
            message=str(data.get("message") or "")[:MAX_MESSAGE],
            termination_message=str(data.get("termination_message") or "")[:MAX_MESSAGE],
        )

    @property
    def exited(self) -> bool:
        return self.state == "exited"


def _number(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


class AgentFeed:
    """The containers of one VM. `run` must be running for the rest to make progress."""

    def __init__(self, agent: AgentClient, *, patience_s: float) -> None:
        self._agent = agent
        self.patience_s = patience_s
        self._latest: dict[str, Instance] = {}
        self._topic = Topic()
        self._heard_at = asyncio.get_running_loop().time()

    async def run(self) -> NoReturn:
        """Follows the agent for ever.

        :raises VmFailed: the agent does not answer any more
        """
        self._heard_at = asyncio.get_running_loop().time()
        while True:
            error = await self._follow()
            if asyncio.get_running_loop().time() - self._heard_at > self.patience_s:
                raise VmFailed(f"the pod VM agent does not answer any more: {error}") from error
            await asyncio.sleep(RETRY_S)

    async def _follow(self) -> HvError:
        """Follows one event stream to its end; why it ended."""
        try:
            stream = cast("AsyncGenerator[dict[str, Any], None]", self._agent.events())
            async with aclosing(stream) as events:
                async with asyncio.timeout(self.patience_s):
                    self._apply(await anext(events))
                try:
                    async for event in events:
                        self._apply(event)
                finally:  # it was there until now: an agent that has nothing to tell is silent
                    self._heard_at = asyncio.get_running_loop().time()
        except TimeoutError:
            return Timeout(f"no answer for {self.patience_s:g} s")
        except StopAsyncIteration:
            pass
        except HvError as e:
            return e
        return ProtocolError("the event stream ended")

    def _apply(self, event: Mapping[str, Any]) -> None:
        if event.get("type") == "snapshot":
            containers = event.get("containers")
            self._latest = {i.name: i for i in map(Instance.parse, containers if isinstance(containers, list) else ())}
        else:
            instance = Instance.parse(event.get("container"))
            self._latest[instance.name] = instance
        self._heard_at = asyncio.get_running_loop().time()
        self._topic.publish()

    async def wait_ready(self) -> None:
        """Waits for the first snapshot."""
        await self._topic.wait_newer(0)

    def latest(self, name: str) -> Instance | None:
        """The container's newest instance; None when there has been none in this VM."""
        return self._latest.get(name)

    async def wait_exit(self, name: str, started_ns: int) -> Instance:
        """Waits for the end of the instance that started then (or of a later one)."""
        version = 0
        while True:
            version = await self._topic.wait_newer(version)
            instance = self._latest.get(name)
            if instance is not None and instance.exited and instance.started_ns >= started_ns:
                return instance
