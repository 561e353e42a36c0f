"""Server-side apply: ownership, conflicts, removal, and the record of ordinary writes beside it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypervisor.kube.errors import ApiError
from hypervisor.master.patch.apply import LAST_APPLIED, apply
from hypervisor.master.patch.fieldset import FieldSet, compare, set_of
from hypervisor.master.patch.managers import ANCIENT, BEFORE_FIRST_APPLY, MAX_UPDATERS
from hypervisor.master.patch.track import track_update
from hypervisor.master.patch.values import copy
from hypervisor.master.schema.load import Schema

DEPLOYMENT = Schema.load().type_of("io.k8s.api.apps.v1.Deployment")
CONFIG_MAP = Schema.load().type_of("io.k8s.api.core.v1.ConfigMap")
SERVICE = Schema.load().type_of("io.k8s.api.core.v1.Service")
Obj = dict[str, Any]


def deployment(containers: list[Obj] | None = None, **spec: Any) -> Obj:
    made: Obj = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "d"}, "spec": spec}
    if containers is not None:
        spec["template"] = {"spec": {"containers": containers}}
    return made


def config(**data: str) -> Obj:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c"}, "data": data}


def owners(obj: Obj) -> dict[str, Any]:
    return {entry["manager"]: entry["fieldsV1"] for entry in obj["metadata"].get("managedFields", ())}


def containers(obj: Obj) -> list[Obj]:
    listed: list[Obj] = obj["spec"]["template"]["spec"]["containers"]
    return listed


def updated(obj: Obj, manager: str, **spec: Any) -> Obj:
    new = copy(obj)
    new["spec"] |= spec
    track_update(obj, new, manager, kind=DEPLOYMENT)
    return new  # type: ignore[no-any-return]


def test_an_applier_owns_what_it_applied() -> None:
    given = deployment([{"name": "c", "image": "i", "ports": [{"containerPort": 80}]}], replicas=2)
    obj = apply(None, given, "me", DEPLOYMENT)
    entry = obj["metadata"]["managedFields"][0]
    assert (entry["operation"], entry["apiVersion"], entry["fieldsType"]) == ("Apply", "apps/v1", "FieldsV1")
    port = {'k:{"containerPort":80,"protocol":"TCP"}': {".": {}, "f:containerPort": {}}}
    container = {".": {}, "f:name": {}, "f:image": {}, "f:ports": port}
    template = {"f:spec": {"f:containers": {'k:{"name":"c"}': container}}}
    assert entry["fieldsV1"] == {"f:spec": {"f:replicas": {}, "f:template": template}}


def test_two_appliers_share_an_object() -> None:
    obj = apply(None, deployment([{"name": "a", "image": "1"}], replicas=2), "one", DEPLOYMENT)
    obj = apply(obj, deployment([{"name": "b", "image": "2"}]), "two", DEPLOYMENT)
    assert sorted(c["name"] for c in containers(obj)) == ["a", "b"]
    obj = apply(obj, deployment([], replicas=2), "one", DEPLOYMENT)
    assert containers(obj) == [{"name": "b", "image": "2"}]


def test_a_value_that_is_the_same_is_owned_by_both_and_goes_with_the_last() -> None:
    obj = apply(None, deployment(replicas=2), "one", DEPLOYMENT)
    obj = apply(obj, deployment(replicas=2), "two", DEPLOYMENT)
    obj = apply(obj, deployment(), "one", DEPLOYMENT)
    assert obj["spec"] == {"replicas": 2}
    obj = apply(obj, deployment(), "two", DEPLOYMENT)
    assert "replicas" not in obj.get("spec", {})


def test_a_conflict_names_manager_and_field() -> None:
    obj = updated(apply(None, deployment(replicas=2), "me", DEPLOYMENT), "kubectl-scale", replicas=5)
    with pytest.raises(ApiError) as caught:
        apply(obj, deployment(replicas=3), "me", DEPLOYMENT)
    time = obj["metadata"]["managedFields"][-1]["time"]
    who = f'conflict with "kubectl-scale" using apps/v1 at {time}'
    assert str(caught.value) == f"Apply failed with 1 conflict: {who}: .spec.replicas"
    assert (caught.value.reason, caught.value.code) == ("Conflict", 409)
    cause = {"reason": "FieldManagerConflict", "message": who, "field": ".spec.replicas"}
    assert caught.value.details == {"causes": [cause]}


def test_conflicts_are_listed_by_manager() -> None:
    obj = apply(None, deployment([{"name": "c", "image": "1"}], replicas=1), "one", DEPLOYMENT)
    with pytest.raises(ApiError) as caught:
        apply(obj, deployment([{"name": "c", "image": "2"}], replicas=2), "two", DEPLOYMENT)
    assert str(caught.value) == (
        'Apply failed with 2 conflicts: conflicts with "one":\n'
        '- .spec.replicas\n- .spec.template.spec.containers[name="c"].image'
    )


def test_force_takes_the_field_over() -> None:
    obj = apply(None, deployment(replicas=2), "one", DEPLOYMENT)
    obj = apply(obj, deployment(replicas=3), "two", DEPLOYMENT, True)
    assert obj["spec"]["replicas"] == 3
    assert owners(obj) == {"two": {"f:spec": {"f:replicas": {}}}}


def test_an_applier_that_gives_a_field_up_leaves_it_to_its_new_owner() -> None:
    obj = updated(apply(None, deployment(replicas=2, paused=True), "me", DEPLOYMENT), "autoscaler", replicas=5)
    obj = apply(obj, deployment(paused=True), "me", DEPLOYMENT)
    assert obj["spec"] == {"replicas": 5, "paused": True}


def test_a_removed_entry_goes_with_its_defaults() -> None:
    obj = apply(None, deployment([{"name": "a", "image": "1"}, {"name": "b", "image": "2"}]), "me", DEPLOYMENT)
    for container in containers(obj):
        container["imagePullPolicy"] = "Always"  # a default: nobody's
    obj = apply(obj, deployment([{"name": "a", "image": "1"}]), "me", DEPLOYMENT)
    assert containers(obj) == [{"name": "a", "image": "1", "imagePullPolicy": "Always"}]


def test_an_entry_in_which_others_have_fields_stays_with_those() -> None:
    obj = apply(None, deployment([{"name": "a", "image": "1", "tty": True}]), "one", DEPLOYMENT)
    obj = apply(obj, deployment([{"name": "a", "stdin": True}]), "two", DEPLOYMENT)
    obj = apply(obj, deployment([]), "one", DEPLOYMENT)
    assert containers(obj) == [{"name": "a", "stdin": True}]


def test_sets_of_values_have_an_owner_each() -> None:
    one = config() | {"metadata": {"name": "c", "finalizers": ["x/a", "x/b"]}}
    two = config() | {"metadata": {"name": "c", "finalizers": ["x/b", "x/c"]}}
    obj = apply(apply(None, one, "one", CONFIG_MAP), two, "two", CONFIG_MAP)
    assert sorted(obj["metadata"]["finalizers"]) == ["x/a", "x/b", "x/c"]
    obj = apply(obj, config(), "one", CONFIG_MAP)
    assert sorted(obj["metadata"]["finalizers"]) == ["x/b", "x/c"]


def test_atomic_values_have_one_owner() -> None:
    def service(**selector: str) -> Obj:
        return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "s"}, "spec": {"selector": selector}}

    obj = apply(None, service(a="1"), "one", SERVICE)
    assert owners(obj) == {"one": {"f:spec": {"f:selector": {}}}}
    with pytest.raises(ApiError, match=r"\.spec\.selector"):
        apply(obj, service(b="2"), "two", SERVICE)
    assert apply(obj, service(b="2"), "two", SERVICE, True)["spec"]["selector"] == {"b": "2"}


def test_kubectl_may_change_what_it_applied_on_the_clients_side() -> None:
    live = deployment(replicas=2, paused=True)
    live["metadata"]["annotations"] = {LAST_APPLIED: json.dumps(deployment(replicas=2))}
    track_update(None, live, "kubectl-client-side-apply", kind=DEPLOYMENT)
    obj = apply(live, deployment(replicas=3), "kubectl", DEPLOYMENT)
    assert obj["spec"] == {"replicas": 3, "paused": True}
    assert json.loads(obj["metadata"]["annotations"][LAST_APPLIED])["spec"] == {"replicas": 3}
    with pytest.raises(ApiError, match="paused"):
        apply(live, deployment(paused=False), "kubectl", DEPLOYMENT)
    with pytest.raises(ApiError, match="replicas"):
        apply(live, deployment(replicas=3), "other", DEPLOYMENT)


def test_what_may_not_be_written_is_neither_merged_nor_owned() -> None:
    given = deployment(replicas=1) | {"status": {"replicas": 7}}
    obj = apply(None, given, "me", DEPLOYMENT, reset=("status",))
    assert "status" not in obj
    assert owners(obj) == {"me": {"f:spec": {"f:replicas": {}}}}


def test_subresources_are_managers_of_their_own() -> None:
    obj = apply(None, deployment(replicas=1), "me", DEPLOYMENT)
    status = deployment() | {"status": {"replicas": 7}}
    obj = apply(obj, status, "me", DEPLOYMENT, subresource="status", reset=("spec",))
    assert [entry.get("subresource") for entry in obj["metadata"]["managedFields"]] == [None, "status"]
    assert obj["spec"] == {"replicas": 1}


@pytest.mark.parametrize(
    "applied",
    [
        deployment() | {"metadata": {"name": "d", "managedFields": [{}]}},
        deployment([{"name": "a"}, {"name": "a"}]),
    ],
)
def test_what_cannot_be_applied(applied: Obj) -> None:
    with pytest.raises(ApiError) as caught:
        apply(None, applied, "me", DEPLOYMENT)
    assert caught.value.code == 400


def test_an_object_without_a_record_belongs_to_one_before_all() -> None:
    obj = apply(deployment(replicas=2), deployment(replicas=2), "me", DEPLOYMENT)
    assert set(owners(obj)) == {"me", BEFORE_FIRST_APPLY}
    with pytest.raises(ApiError, match=BEFORE_FIRST_APPLY):
        apply(deployment(replicas=2), deployment(replicas=3), "me", DEPLOYMENT)


def test_nothing_given_is_changed() -> None:
    given, live = deployment([{"name": "a"}], replicas=1), deployment([{"name": "b"}], replicas=1)
    before = copy((given, live)[0]), copy(live)
    apply(live, given, "me", DEPLOYMENT)
    assert (given, live) == before


# ---- ordinary writes -------------------------------------------------------------------------------------------------


def test_a_create_is_its_makers() -> None:
    obj = deployment(replicas=1)
    obj["metadata"] |= {"uid": "u", "labels": {"a": "b"}}
    track_update(None, obj, "kubectl-create", kind=DEPLOYMENT)
    assert owners(obj) == {
        "kubectl-create": {"f:metadata": {"f:labels": {".": {}, "f:a": {}}}, "f:spec": {"f:replicas": {}}}
    }


def test_an_update_takes_what_it_changes_and_only_that() -> None:
    obj = apply(None, deployment(replicas=2, paused=True), "me", DEPLOYMENT)
    new = updated(obj, "scaler", replicas=5)
    assert owners(new) == {"me": {"f:spec": {"f:paused": {}}}, "scaler": {"f:spec": {"f:replicas": {}}}}
    assert updated(new, "other") == new


def test_a_client_may_write_the_record_itself_and_may_reset_it() -> None:
    obj = updated(deployment(replicas=2), "a", replicas=3)
    moved = copy(obj)
    moved["metadata"]["managedFields"][0]["manager"] = "b"
    track_update(obj, moved, "a", kind=DEPLOYMENT)
    assert set(owners(moved)) == {"b"}
    moved["metadata"]["managedFields"] = [{}]
    track_update(obj, moved, "a", kind=DEPLOYMENT)
    assert owners(moved) == {}


@pytest.mark.parametrize(
    "record", [[{"manager": "x"}], "x", [3], [{"operation": "Update", "fieldsType": "FieldsV1", "fieldsV1": 3}]]
)
def test_a_record_that_cannot_be_read_is_passed_over(record: Any) -> None:
    obj = updated(deployment(replicas=2), "a", replicas=3)
    new = copy(obj)
    new["metadata"]["managedFields"] = record
    track_update(obj, new, "b", kind=DEPLOYMENT)
    assert owners(new) == owners(obj)


def test_a_status_write_does_not_touch_the_record_of_others() -> None:
    obj = updated(deployment(replicas=2), "a", replicas=3)
    new = copy(obj) | {"status": {"replicas": 1}}
    new["metadata"]["managedFields"] = []
    track_update(obj, new, "controller", subresource="status", kind=DEPLOYMENT)
    assert owners(new) == owners(obj) | {"controller": {"f:status": {"f:replicas": {}}}}


def test_the_record_stays_bounded() -> None:
    obj = deployment(replicas=0)
    for number in range(MAX_UPDATERS * 3):
        new = copy(obj)
        new["metadata"].setdefault("labels", {})[f"l{number}"] = "x"
        track_update(obj, new, f"m{number}", kind=DEPLOYMENT)
        obj = new
    assert len(obj["metadata"]["managedFields"]) <= MAX_UPDATERS
    assert ANCIENT in owners(obj)
    owned = frozenset().union(*(FieldSet.parse(fields).paths for fields in owners(obj).values()))
    assert {("f:metadata", "f:labels", f"f:l{n}") for n in range(MAX_UPDATERS * 3)} <= owned


# ---- properties ------------------------------------------------------------------------------------------------------

DATA = st.dictionaries(st.sampled_from("abcdef"), st.sampled_from("123"), max_size=5)


@given(DATA, DATA)
def test_applying_twice_is_applying_once(live: dict[str, str], wanted: dict[str, str]) -> None:
    made = apply(apply(None, config(**live), "one", CONFIG_MAP), config(**wanted), "two", CONFIG_MAP, True)
    assert apply(made, config(**wanted), "two", CONFIG_MAP) == made


@given(DATA, DATA)
def test_apply_then_remove_is_as_if_never_applied(live: dict[str, str], wanted: dict[str, str]) -> None:
    made = apply(None, config(**live), "one", CONFIG_MAP)
    extra = {key: value for key, value in wanted.items() if key not in live}
    both = apply(made, config(**extra), "two", CONFIG_MAP)
    assert both["data"] == live | extra
    assert apply(both, config(), "two", CONFIG_MAP).get("data", {}) == live


@given(st.lists(st.tuples(st.sampled_from(["x", "y", "z"]), DATA), max_size=6))
def test_forced_applies_against_a_model(steps: list[tuple[str, dict[str, str]]]) -> None:
    """A key has the value of who applied it last; it goes when the last that holds it no longer applies it."""
    obj: Obj | None = None
    values: dict[str, str] = {}
    holders: dict[str, set[str]] = {}
    for manager, data in steps:
        obj = apply(obj, config(**data), manager, CONFIG_MAP, True)
        for key in [k for k, who in holders.items() if manager in who and k not in data]:
            holders[key].discard(manager)
            if not holders[key]:
                del holders[key], values[key]
        for key, value in data.items():
            holders[key] = holders.get(key, set()) | {manager} if values.get(key) == value else {manager}
            values[key] = value
        assert obj.get("data", {}) == values


@given(DATA, DATA)
def test_a_comparison_tells_exactly_what_changed(old: dict[str, str], new: dict[str, str]) -> None:
    found = compare(config(**old), config(**new), CONFIG_MAP)
    path = lambda key: ("f:data", f"f:{key}")  # noqa: E731
    if old and new:
        assert found.added.paths == {path(k) for k in new.keys() - old.keys()}
        assert found.removed.paths == {path(k) for k in old.keys() - new.keys()}
    assert found.modified.paths >= {path(k) for k in old.keys() & new.keys() if old[k] != new[k]}


@given(DATA)
def test_sets_are_read_as_they_were_written(data: dict[str, str]) -> None:
    fields = set_of(config(**data), CONFIG_MAP)
    assert FieldSet.parse(fields.render()) == fields
