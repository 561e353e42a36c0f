"""The registry over etcd, alone and with another master beside it."""

from __future__ import annotations

import random

import pytest
from etcd_server import EtcdServer
from registry_objects import KINDS, POD, pod
from test_registry_properties import compete

from hypervisor.kube.errors import ApiError
from hypervisor.master.registry.registry import Registry
from hypervisor.master.store.etcd import EtcdStore


async def test_list_and_watch_are_the_state_on_etcd(etcd: EtcdServer) -> None:
    store = await EtcdStore.connect([etcd.url])
    registry = await Registry.open(store, KINDS)
    await compete(registry, random.Random(7))
    await registry.close()
    await store.close()


async def test_two_masters_see_each_others_writes_at_once(etcd: EtcdServer) -> None:
    stores = [await EtcdStore.connect([etcd.url]) for _ in range(2)]
    one, two = [await Registry.open(store, KINDS) for store in stores]
    for n in range(20):
        made = await one.create(POD, pod(f"p{n}"), "ns")
        assert await two.get(POD, "ns", f"p{n}") == made
        changed = await two.update(POD, "ns", f"p{n}", lambda o: o | {"status": {"phase": "Running"}})
        assert await one.get(POD, "ns", f"p{n}") == changed
        await one.delete(POD, "ns", f"p{n}")
        with pytest.raises(ApiError, match="not found"):
            await two.delete(POD, "ns", f"p{n}")
    for registry, store in zip((one, two), stores, strict=True):
        await registry.close()
        await store.close()
