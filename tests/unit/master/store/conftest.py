"""Stores for tests, each empty."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from hypervisor.master.store.base import Store
from hypervisor.master.store.etcd import EtcdStore
from hypervisor.master.store.sqlite import SqliteStore


@pytest.fixture(params=["sqlite", "etcd"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    store: Store
    if request.param == "sqlite":
        store = await SqliteStore.open(tmp_path / "store.db")
    else:
        store = await EtcdStore.connect([request.getfixturevalue("etcd").url])
    yield store
    await store.close()
