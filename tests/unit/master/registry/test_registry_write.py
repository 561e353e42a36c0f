"""Create, update, delete: metadata, optimistic locking, finalizers, grace."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from registry_objects import MAP, NAMESPACE, NODE, POD, pod

from hypervisor.kube.errors import ApiError
from hypervisor.master.registry.deletion import DeleteOptions
from hypervisor.master.registry.registry import Registry

Object = dict[str, Any]


def with_node(obj: Object) -> Object:
    obj["spec"]["nodeName"] = "n1"
    return obj


def with_finalizers(*names: str) -> Any:
    def change(obj: Object) -> Object:
        obj["metadata"]["finalizers"] = list(names)
        return obj

    return change


async def fails(reason: str, awaitable: Any) -> ApiError:
    with pytest.raises(ApiError) as error:
        await awaitable
    assert error.value.reason == reason
    return error.value


async def test_create_sets_what_only_the_server_knows(registry: Registry) -> None:
    given = pod("a", uid="mine", resourceVersion="7", generation=9)
    made = await registry.create(POD, given, "ns")
    metadata = made["metadata"]
    assert metadata["namespace"] == "ns" and metadata["generation"] == 1
    assert metadata["uid"] not in ("mine", "") and metadata["creationTimestamp"].endswith("Z")
    assert int(metadata["resourceVersion"]) > 1
    assert given == pod("a", uid="mine", resourceVersion="7", generation=9)
    assert await registry.get(POD, "ns", "a") == made


async def test_get_sees_own_write_at_once(registry: Registry) -> None:
    for n in range(50):
        made = await registry.create(POD, pod(f"p{n}"), "ns")
        assert (await registry.get(POD, "ns", f"p{n}")) == made


async def test_create_twice(registry: Registry) -> None:
    await registry.create(POD, pod("a"), "ns")
    error = await fails("AlreadyExists", registry.create(POD, pod("a"), "ns"))
    assert str(error) == 'pods "a" already exists'
    await fails("AlreadyExists", registry.create(POD, pod("a"), "ns", dry_run=True))
    await registry.create(POD, pod("a"), "other")


async def test_generate_name(registry: Registry) -> None:
    names = {(await registry.create(POD, pod(generateName="web-"), "ns"))["metadata"]["name"] for _ in range(20)}
    assert len(names) == 20
    assert all(name.startswith("web-") and len(name) == 9 for name in names)


async def test_create_refuses(registry: Registry) -> None:
    await fails("Invalid", registry.create(POD, pod(), "ns"))
    await fails("BadRequest", registry.create(POD, pod("a", namespace="other"), "ns"))
    await fails("BadRequest", registry.create(POD, pod("a"), ""))
    await fails("BadRequest", registry.create(MAP, {"metadata": {"name": "a"}, "data": {"k": {1, 2}}}, "ns"))
    assert registry.peek_all(POD) == [] and registry.peek_all(MAP) == []


async def test_cluster_scoped(registry: Registry) -> None:
    made = await registry.create(NODE, {"metadata": {"name": "n1"}, "spec": {}})
    assert "namespace" not in made["metadata"]
    assert made["apiVersion"] == "v1" and made["kind"] == "Node"
    assert await registry.get(NODE, "", "n1") == made


async def test_dry_run_changes_nothing(registry: Registry) -> None:
    await registry.create(POD, pod("a"), "ns", dry_run=True)
    await fails("NotFound", registry.get(POD, "ns", "a"))
    made = await registry.create(POD, pod("a"), "ns")
    changed = await registry.update(POD, "ns", "a", with_node, dry_run=True)
    assert changed["spec"]["nodeName"] == "n1"
    assert (await registry.delete(POD, "ns", "a", DeleteOptions(dry_run=True))).removed
    assert await registry.get(POD, "ns", "a") == made


async def test_update_bumps_generation_only_with_spec(registry: Registry) -> None:
    await registry.create(POD, pod("a"), "ns")
    changed = await registry.update(POD, "ns", "a", with_node)
    assert changed["metadata"]["generation"] == 2
    status = await registry.update(POD, "ns", "a", lambda o: o | {"status": {"phase": "Running"}})
    assert status["metadata"]["generation"] == 2
    assert int(status["metadata"]["resourceVersion"]) > int(changed["metadata"]["resourceVersion"])


async def test_update_that_changes_nothing_is_not_written(registry: Registry) -> None:
    made = await registry.create(POD, pod("a"), "ns")
    assert await registry.update(POD, "ns", "a", lambda o: o) == made
    assert str(registry.revision) == made["metadata"]["resourceVersion"]


async def test_stale_resource_version(registry: Registry) -> None:
    made = await registry.create(POD, pod("a"), "ns")
    await registry.update(POD, "ns", "a", with_node)
    error = await fails("Conflict", registry.update(POD, "ns", "a", lambda _: made))
    assert "the object has been modified" in str(error)
    unconditional = {**made, "metadata": {"name": "a"}}
    replaced = await registry.update(POD, "ns", "a", lambda _: unconditional)
    assert replaced["metadata"]["uid"] == made["metadata"]["uid"]
    assert "nodeName" not in replaced["spec"]


@pytest.mark.parametrize("field", ["name", "namespace", "creationTimestamp"])
async def test_frozen_metadata(registry: Registry, field: str) -> None:
    await registry.create(POD, pod("a"), "ns")

    def change(obj: Object) -> Object:
        obj["metadata"][field] = "other"
        return obj

    error = await fails("Invalid", registry.update(POD, "ns", "a", change))
    assert f"metadata.{field}" in str(error)


async def test_another_uid_is_a_conflict(registry: Registry) -> None:
    await registry.create(POD, pod("a"), "ns")
    await fails("Conflict", registry.update(POD, "ns", "a", lambda _: pod("a", uid="another")))
    await fails("Conflict", registry.delete(POD, "ns", "a", DeleteOptions(uid="another")))
    await fails("Conflict", registry.delete(POD, "ns", "a", DeleteOptions(resource_version="1")))


async def test_concurrent_updates_are_all_applied(registry: Registry) -> None:
    await registry.create(MAP, {"metadata": {"name": "m"}, "data": {}}, "ns")

    async def add(n: int) -> None:
        async def change(obj: Object) -> Object:
            await asyncio.sleep(0)
            obj["data"][str(n)] = "x"
            return obj

        await registry.update(MAP, "ns", "m", change)

    await asyncio.gather(*(add(n) for n in range(20)))
    assert len((await registry.get(MAP, "ns", "m"))["data"]) == 20


async def test_an_error_of_the_change_is_raised_and_nothing_written(registry: Registry) -> None:
    made = await registry.create(POD, pod("a"), "ns")

    def change(obj: Object) -> Object:
        raise ApiError("Forbidden", "no")

    await fails("Forbidden", registry.update(POD, "ns", "a", change))
    assert await registry.get(POD, "ns", "a") == made


async def test_update_and_delete_of_nothing(registry: Registry) -> None:
    error = await fails("NotFound", registry.update(POD, "ns", "a", with_node))
    assert str(error) == 'pods "a" not found'
    await fails("NotFound", registry.delete(POD, "ns", "a"))


async def test_delete_at_once(registry: Registry) -> None:
    await registry.create(POD, pod("a"), "ns")
    deleted = await registry.delete(POD, "ns", "a")
    assert deleted.removed
    await fails("NotFound", registry.get(POD, "ns", "a"))


async def test_finalizers_hold_an_object(registry: Registry) -> None:
    await registry.create(MAP, {"metadata": {"name": "m", "finalizers": ["x/y"]}}, "ns")
    deleted = await registry.delete(MAP, "ns", "m")
    assert not deleted.removed and deleted.object["metadata"]["deletionTimestamp"]
    again = await registry.delete(MAP, "ns", "m")
    assert again.object == deleted.object
    error = await fails("Invalid", registry.update(MAP, "ns", "m", with_finalizers("x/y", "new/one")))
    assert "no new finalizers" in str(error)
    await registry.update(MAP, "ns", "m", with_finalizers())
    await fails("NotFound", registry.get(MAP, "ns", "m"))


async def test_a_deletion_cannot_be_taken_back(registry: Registry) -> None:
    await registry.create(MAP, {"metadata": {"name": "m", "finalizers": ["x/y"]}}, "ns")
    deleted = await registry.delete(MAP, "ns", "m")
    plain = {"metadata": {"name": "m", "finalizers": ["x/y"]}, "data": {"a": "b"}}
    updated = await registry.update(MAP, "ns", "m", lambda _: plain)
    assert updated["metadata"]["deletionTimestamp"] == deleted.object["metadata"]["deletionTimestamp"]
    made = await registry.create(MAP, {"metadata": {"name": "n"}}, "ns")
    forged = {"metadata": {"name": "n", "deletionTimestamp": made["metadata"]["creationTimestamp"]}}
    assert "deletionTimestamp" not in (await registry.update(MAP, "ns", "n", lambda _: forged))["metadata"]


@pytest.mark.parametrize(("how", "finalizer"), [("Foreground", "foregroundDeletion"), ("Orphan", "orphan")])
async def test_propagation(registry: Registry, how: Any, finalizer: str) -> None:
    await registry.create(MAP, {"metadata": {"name": "m"}}, "ns")
    deleted = await registry.delete(MAP, "ns", "m", DeleteOptions(propagation=how))
    assert deleted.object["metadata"]["finalizers"] == [finalizer]
    assert (await registry.delete(MAP, "ns", "m", DeleteOptions(propagation="Background"))).removed


async def test_pod_on_a_node_gets_its_grace(registry: Registry) -> None:
    await registry.create(POD, pod("a"), "ns")
    await registry.update(POD, "ns", "a", with_node)
    deleted = await registry.delete(POD, "ns", "a")
    assert not deleted.removed and deleted.object["metadata"]["deletionGracePeriodSeconds"] == 30
    longer = await registry.delete(POD, "ns", "a", DeleteOptions(grace_s=60))
    assert longer.object == deleted.object
    shorter = await registry.delete(POD, "ns", "a", DeleteOptions(grace_s=5))
    assert shorter.object["metadata"]["deletionGracePeriodSeconds"] == 5
    assert shorter.object["metadata"]["deletionTimestamp"] < deleted.object["metadata"]["deletionTimestamp"]
    status = await registry.update(POD, "ns", "a", lambda o: o | {"status": {"phase": "Running"}})
    assert status["metadata"]["deletionGracePeriodSeconds"] == 5
    assert (await registry.delete(POD, "ns", "a", DeleteOptions(grace_s=0))).removed


@pytest.mark.parametrize("change", [{"status": {"phase": "Succeeded"}, "spec": {"nodeName": "n"}}, {"spec": {}}])
async def test_pod_that_no_node_runs_goes_at_once(registry: Registry, change: Object) -> None:
    await registry.create(POD, pod("a"), "ns")
    await registry.update(POD, "ns", "a", lambda o: o | change)
    assert (await registry.delete(POD, "ns", "a")).removed


async def test_pod_with_finalizer_waits_for_node_and_finalizer(registry: Registry) -> None:
    await registry.create(POD, pod("a", finalizers=["x/y"]), "ns")
    await registry.update(POD, "ns", "a", with_node)
    await registry.delete(POD, "ns", "a")
    await registry.update(POD, "ns", "a", with_finalizers())
    await registry.get(POD, "ns", "a")
    assert (await registry.delete(POD, "ns", "a", DeleteOptions(grace_s=0))).removed


async def test_namespace_waits_for_its_spec_finalizers(registry: Registry) -> None:
    body = {"metadata": {"name": "ns"}, "spec": {"finalizers": ["kubernetes"]}, "status": {"phase": "Active"}}
    await registry.create(NAMESPACE, body)
    deleted = await registry.delete(NAMESPACE, "", "ns")
    assert not deleted.removed and deleted.object["status"]["phase"] == "Terminating"
    await registry.update(NAMESPACE, "", "ns", lambda o: o | {"spec": {}})
    await fails("NotFound", registry.get(NAMESPACE, "", "ns"))
