"""Fixtures of the controller's tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from pod_bench import Bench


@pytest.fixture
async def bench(short_path: Path) -> AsyncIterator[Bench]:
    it = Bench(short_path / "s")
    yield it
    await it.pods.close()
    for guest in it.machines.started:
        await guest.die("end of the test")
