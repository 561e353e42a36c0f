"""How long a store remembers what was overwritten or deleted."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass

from hypervisor.errors import Unavailable
from hypervisor.master.store.base import Store


@dataclass(frozen=True, slots=True)
class Keep:
    """How much history there is for late watchers and continued lists.

    :ivar age_s: at least this long, unless there are more than `changes`
    :ivar changes: at most about so many, however young
    :ivar check_s: how often to look
    """

    age_s: float = 600
    changes: int = 100_000
    check_s: float = 30


async def forget_in_time(store: Store, keep: Keep) -> None:
    """Compacts for ever. Of several masters on one etcd each may do it."""
    seen: deque[tuple[float, int]] = deque()
    target = 0
    while True:
        await asyncio.sleep(keep.check_s)
        try:
            now, newest = time.monotonic(), await store.revision()
            seen.append((now, newest))
            target = max(target, newest - keep.changes)
            while seen and seen[0][0] <= now - keep.age_s:
                target = max(target, seen.popleft()[1])
            if target > 0:
                await store.compact(target)
        except Unavailable:
            continue  # no answer, or a full disk: next time
