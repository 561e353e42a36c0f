"""A registry over a SQLite store, with a few kinds of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from registry_objects import KINDS

from hypervisor.master.registry.registry import Registry
from hypervisor.master.store.sqlite import SqliteStore


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    store = await SqliteStore.open(tmp_path / "store.db")
    yield store
    await store.close()


@pytest.fixture
async def registry(store: SqliteStore) -> AsyncIterator[Registry]:
    registry = await Registry.open(store, KINDS)
    yield registry
    await registry.close()
