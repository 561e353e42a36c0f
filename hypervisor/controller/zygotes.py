"""The host's zygote, started again when it has died: it is a convenience, and no VM may miss it."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

import structlog

from hypervisor.vmx.config import VmxConfig, VmxFds
from hypervisor.vmx.process import ProcessId
from hypervisor.vmx.zygote import Zygote


class KeptZygote:
    """An async context manager; within it, `fork` works for as long as a zygote can be started at all."""

    def __init__(self) -> None:
        self._stack = AsyncExitStack()
        self._zygote: Zygote | None = None
        self._lock = asyncio.Lock()

    async def __aenter__(self) -> Self:
        await self._alive()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._zygote = None
        await self._stack.aclose()

    async def fork(self, config: VmxConfig, fds: VmxFds) -> ProcessId:
        """As `Zygote.fork`."""
        return await (await self._alive()).fork(config, fds)

    async def _alive(self) -> Zygote:
        async with self._lock:
            if self._zygote is None or not self._zygote.alive:
                if self._zygote is not None:
                    structlog.get_logger().warning("the zygote has died; another is started")
                await self._stack.aclose()
                self._stack = AsyncExitStack()
                self._zygote = await self._stack.enter_async_context(Zygote.start())
            return self._zygote
