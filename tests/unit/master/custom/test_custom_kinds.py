"""Kinds that users define, through a whole master: served, checked, completed, changed, and gone with their objects."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from hypervisor.kube import meta
from hypervisor.kube.errors import ApiError
from hypervisor.kube.resources import CONFIG_MAPS, CRDS, NAMESPACES, Resource
from hypervisor.master.daemon import Master, MasterConfig, running

CRON = Resource("example.org", "v1", "crontabs", "CronTab")
SPEC = {
    "type": "object",
    "required": ["schedule"],
    "properties": {
        "schedule": {"type": "string", "pattern": r"^\S+ \S+$"},
        "replicas": {"type": "integer", "minimum": 0, "maximum": 9, "default": 1},
        "mode": {"type": "string", "enum": ["fast", "slow"], "default": "slow"},
        "port": {"x-kubernetes-int-or-string": True},
        "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
        "tags": {"type": "array", "items": {"type": "string"}, "x-kubernetes-list-type": "set"},
        "limits": {"type": "object", "additionalProperties": {"type": "integer"}},
        "nested": {"type": "object", "properties": {"depth": {"type": "integer", "default": 3}}},
    },
}
STATUS = {"type": "object", "properties": {"ready": {"type": "integer"}, "selector": {"type": "string"}}}
Change = Callable[[dict[str, Any]], None]


def definition(plural: str = "crontabs", kind: str = "CronTab", **versions: Any) -> dict[str, Any]:
    """A definition; `versions` in place of v1 with everything."""
    schema = {"type": "object", "properties": {"spec": SPEC, "status": STATUS}}
    scale = {"specReplicasPath": ".spec.replicas", "statusReplicasPath": ".status.ready"}
    whole = {
        "name": "v1",
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": schema},
        "subresources": {"status": {}, "scale": scale | {"labelSelectorPath": ".status.selector"}},
        "additionalPrinterColumns": [
            {"name": "Schedule", "type": "string", "jsonPath": ".spec.schedule"},
            {"name": "Ready", "type": "integer", "jsonPath": ".status.ready", "priority": 1},
        ],
    }
    names = {"plural": plural, "kind": kind, "shortNames": ["ct"] if kind == "CronTab" else []}
    listed = [whole] if not versions else [v | {"name": n} for n, v in versions.items()]
    spec = {"group": "example.org", "scope": "Namespaced", "names": names, "versions": listed}
    return {"metadata": {"name": f"{plural}.example.org"}, "spec": spec}


def cron(name: str = "c", **spec: Any) -> dict[str, Any]:
    body = {"apiVersion": "example.org/v1", "kind": "CronTab", "metadata": {"name": name}}
    return body | {"spec": {"schedule": "* *", **spec}}


@pytest.fixture
async def master(tmp_path: Path) -> AsyncIterator[Master]:
    async with running(MasterConfig(tmp_path, port=0, controllers=False)) as made:
        yield made


async def until(what: Callable[[], Any]) -> Any:
    async with asyncio.timeout(20):
        while True:
            try:
                if found := await what():
                    return found
            except ApiError as error:
                if error.reason != "NotFound":
                    raise
            await asyncio.sleep(0.01)


async def established(master: Master, body: dict[str, Any]) -> Any:
    made = await master.client.create(CRDS, body)
    name = made["metadata"]["name"]

    async def there() -> Any:
        found = await master.client.get(CRDS, name)
        return meta.is_true(found, "Established") and found

    return await until(there)


async def changed(master: Master, change: Change) -> None:
    found = await master.client.get(CRDS, "crontabs.example.org")
    change(found)
    after = await master.client.update(CRDS, found)
    kind = master.inside.kinds.of(CRON)

    async def seen() -> bool:
        return master.inside.kinds.of(CRON) is not kind

    await until(seen)
    assert after["metadata"]["generation"] > 1


async def test_objects_are_pruned_completed_and_kept(master: Master) -> None:
    found = await established(master, definition())
    assert found["status"]["storedVersions"] == ["v1"]
    assert found["status"]["acceptedNames"]["listKind"] == "CronTabList"
    body = cron(unknown=1, port="http", free={"any": [1, {"thing": None}]}, nested={})
    made = await master.client.create(CRON, body, "default")
    assert "unknown" not in made["spec"]
    assert (made["spec"]["replicas"], made["spec"]["mode"], made["spec"]["nested"]) == (1, "slow", {"depth": 3})
    assert made["spec"]["free"] == {"any": [1, {"thing": None}]}
    assert (await master.client.get(CRON, "c", "default")) == made
    assert made["metadata"]["generation"] == 1


MISFITS: list[tuple[dict[str, Any], str, str]] = [
    ({"schedule": "x"}, "spec.schedule", "should match"),
    ({"schedule": 5}, "spec.schedule", "must be of type string"),
    ({"replicas": 10}, "spec.replicas", "should be less than or equal to 9"),
    ({"replicas": 1.5}, "spec.replicas", "must be of type integer"),
    ({"replicas": True}, "spec.replicas", "must be of type integer"),
    ({"mode": "medium"}, "spec.mode", "supported values"),
    ({"port": []}, "spec.port", "must be of type integer,string"),
    ({"tags": ["a", "a"]}, "spec.tags[1]", "Duplicate"),
    ({"limits": {"a": "b"}}, "spec.limits.a", "must be of type integer"),
    ({"limits": "many"}, "spec.limits", "must be of type object"),
    ({"tags": {}}, "spec.tags", "must be of type array"),
]


async def test_objects_that_do_not_fit_are_refused(master: Master) -> None:
    await established(master, definition())
    for spec, path, said in MISFITS:
        with pytest.raises(ApiError) as caught:
            await master.client.create(CRON, cron(**spec), "default")
        assert caught.value.reason == "Invalid", spec
        (cause,) = caught.value.details["causes"]
        assert cause["field"] == path
        assert said in cause["message"]
    assert not (await master.client.list(CRON)).items


async def test_a_missing_field_and_an_unknown_kind(master: Master) -> None:
    with pytest.raises(ApiError, match="could not find"):
        await master.client.create(CRON, cron(), "default")
    await established(master, definition())
    with pytest.raises(ApiError, match=r"spec\.schedule: Required value"):
        await master.client.create(CRON, cron() | {"spec": {}}, "default")


async def test_status_and_scale_are_apart(master: Master) -> None:
    await established(master, definition())
    made = await master.client.create(CRON, cron() | {"status": {"ready": 9}}, "default")
    assert "status" not in made
    status = {"ready": 2, "selector": "a=b", "odd": 1}
    told = await master.client.patch(
        CRON, "c", "default", {"status": status, "spec": {"mode": "fast"}}, subresource="status"
    )
    assert (told["status"], told["spec"]["mode"]) == ({"ready": 2, "selector": "a=b"}, "slow")
    assert told["metadata"]["generation"] == 1
    with pytest.raises(ApiError, match=r"status\.ready"):
        await master.client.patch(CRON, "c", "default", {"status": {"ready": "two"}}, subresource="status")
    scaled = await master.client.patch(CRON, "c", "default", {"spec": {"replicas": 4}}, subresource="scale")
    assert scaled["spec"]["replicas"] == 4
    assert scaled["status"] == {"replicas": 2, "selector": "a=b"}
    assert (await master.client.get(CRON, "c", "default"))["metadata"]["generation"] == 2


async def test_two_versions_show_the_same_objects(master: Master) -> None:
    schema = {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}
    old = {"served": True, "storage": False, "schema": schema}
    await established(master, definition(v1={"served": True, "storage": True, "schema": schema}, v1beta1=old))
    beta = Resource("example.org", "v1beta1", "crontabs", "CronTab")
    await master.client.create(beta, cron() | {"apiVersion": "example.org/v1beta1"}, "default")
    assert (await master.client.get(CRON, "c", "default"))["apiVersion"] == "example.org/v1"
    await master.client.patch(CRON, "c", "default", {"spec": {"schedule": "1 1"}})
    seen = await master.client.get(beta, "c", "default")
    assert (seen["apiVersion"], seen["spec"]["schedule"]) == ("example.org/v1beta1", "1 1")
    assert master.inside.kinds.groups()["example.org"] == ("v1", "v1beta1")

    def other_storage(found: dict[str, Any]) -> None:
        for version in found["spec"]["versions"]:
            version["storage"] = version["name"] == "v1beta1"

    await changed(master, other_storage)
    assert (await master.client.get(CRON, "c", "default"))["spec"]["schedule"] == "1 1"
    async with master.client.watch(beta, "default") as events:
        event = await anext(aiter(events))
    assert event.object["apiVersion"] == "example.org/v1beta1"


async def test_a_changed_schema_is_seen_in_stored_objects(master: Master) -> None:
    await established(master, definition())
    await master.client.create(CRON, cron(limits={"a": 1}), "default")

    def change(found: dict[str, Any]) -> None:
        schema = found["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
        del schema["properties"]["limits"]
        schema["properties"]["colour"] = {"type": "string", "default": "red"}

    await changed(master, change)
    seen = await master.client.get(CRON, "c", "default")
    assert "limits" not in seen["spec"]
    assert seen["spec"]["colour"] == "red"
    await master.client.patch(CRON, "c", "default", {"spec": {"colour": "blue"}})
    assert (await master.client.get(CRON, "c", "default"))["spec"]["colour"] == "blue"


async def test_a_definition_takes_its_objects_with_it(master: Master) -> None:
    await established(master, definition())
    held = cron("held")
    held["metadata"]["finalizers"] = ["example.org/mine"]
    await master.client.create(CRON, held, "default")
    await master.client.create(CRON, cron("plain"), "default")
    await master.client.delete(CRDS, "crontabs.example.org")

    async def only_held() -> bool:
        names = [o["metadata"]["name"] for o in (await master.client.list(CRON)).items]
        return names == ["held"] and "create" not in master.inside.kinds.of(CRON).verbs

    await until(only_held)
    await master.client.patch(CRON, "held", "default", {"metadata": {"finalizers": None}})

    async def gone() -> bool:
        try:
            await master.client.get(CRDS, "crontabs.example.org")
        except ApiError as error:
            return error.reason == "NotFound" and master.inside.kinds.get("example.org", "v1", "crontabs") is None
        return False

    await until(gone)
    await established(master, definition())  # and it may come again, empty
    assert not (await master.client.list(CRON)).items


async def test_objects_are_there_after_a_restart(tmp_path: Path) -> None:
    config = MasterConfig(tmp_path, port=0, controllers=False)
    async with running(config) as master:
        await established(master, definition())
        made = await master.client.create(CRON, cron(), "default")
    async with running(config) as master:
        assert await master.client.get(CRON, "c", "default") == made


async def test_a_namespace_and_an_owner_take_custom_objects_with_them(tmp_path: Path) -> None:
    async with running(MasterConfig(tmp_path, port=0)) as master:
        await established(master, definition())
        await master.client.create(NAMESPACES, {"metadata": {"name": "team"}})
        await master.client.create(CRON, cron("inside"), "team")
        owner = await master.client.create(CRON, cron("owner"), "default")
        reference = {"apiVersion": "example.org/v1", "kind": "CronTab", "name": "owner", "uid": meta.uid_of(owner)}
        owned = {"metadata": {"name": "owned", "ownerReferences": [reference]}}
        await master.client.create(CONFIG_MAPS, owned, "default")
        child = cron("child")
        child["metadata"]["ownerReferences"] = [reference]
        await master.client.create(CRON, child, "default")
        await master.client.delete(NAMESPACES, "team")
        await master.client.delete(CRON, "owner", "default")

        async def gone() -> bool:
            namespaces = {n["metadata"]["name"] for n in (await master.client.list(NAMESPACES)).items}
            maps = {m["metadata"]["name"] for m in (await master.client.list(CONFIG_MAPS, "default")).items}
            return "team" not in namespaces and "owned" not in maps and not (await master.client.list(CRON)).items

        await until(gone)


BAD: list[tuple[Change, str]] = [
    (lambda d: d["metadata"].update(name="other.example.org"), "metadata.name"),
    (lambda d: d["spec"]["versions"].append({"name": "v2", "served": True, "storage": True}), "exactly one version"),
    (lambda d: d["spec"]["versions"][0].pop("schema"), "schemas are required"),
    (
        lambda d: d["spec"]["versions"][0]["schema"]["openAPIV3Schema"].update(type="array"),
        "must be object at the root",
    ),
    (lambda d: spec_of(d)["properties"].update(x={}), "must not be empty for specified object fields"),
    (lambda d: spec_of(d)["properties"].update(x={"type": "array"}), "items: Required"),
    (lambda d: spec_of(d)["properties"].update(x={"type": "string", "pattern": "("}), "regular expression"),
    (lambda d: spec_of(d).update(allOf=[{"type": "object"}]), "must be empty to be structural"),
    (lambda d: d["spec"]["versions"][0]["additionalPrinterColumns"][0].update(jsonPath=".a..b"), "jsonPath"),
    (lambda d: d["spec"].update(conversion={"strategy": "Webhook"}), "webhooks"),
    (lambda d: d["spec"].update(scope="Everywhere"), "supported values"),
]


def spec_of(body: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = body["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    return found


async def test_bad_definitions_are_refused(master: Master) -> None:
    for spoil, said in BAD:
        body = copy.deepcopy(definition())
        spoil(body)
        with pytest.raises(ApiError) as caught:
            await master.client.create(CRDS, body)
        assert caught.value.reason == "Invalid"
        assert said in str(caught.value)


async def test_names_that_are_taken_are_not_served(master: Master) -> None:
    await established(master, definition())
    other = definition("tables", "Table")
    other["spec"]["names"]["shortNames"] = ["ct"]
    await master.client.create(CRDS, other)

    async def refused() -> Any:
        found = await master.client.get(CRDS, "tables.example.org")
        condition = meta.condition(found, "NamesAccepted")
        return condition if condition and condition["status"] == "False" else None

    assert '"ct" is already in use' in (await until(refused))["message"]
    assert master.inside.kinds.get("example.org", "v1", "tables") is None
