"""Strategic merge patch: documented examples, every directive, and a naive model."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypervisor.kube.errors import ApiError
from hypervisor.master.patch.strategic import strategic_merge
from hypervisor.master.patch.values import copy
from hypervisor.master.schema.load import Schema

POD = Schema.load().type_of("io.k8s.api.core.v1.Pod")
DEPLOYMENT = Schema.load().type_of("io.k8s.api.apps.v1.Deployment")


def spec(old: dict[str, Any], patch: dict[str, Any]) -> dict[str, Any]:
    before = copy(old)
    merged: dict[str, Any] = strategic_merge({"spec": old}, {"spec": patch}, POD)["spec"]
    assert old == before
    return merged


def containers(*names: str, **more: Any) -> list[dict[str, Any]]:
    return [{"name": name, **more} for name in names]


def test_a_patched_list_is_merged_by_key_and_new_entries_come_first() -> None:
    # Kubernetes documentation, "Update API Objects in Place Using kubectl patch"
    old = {"containers": [{"name": "patch-demo-ctr", "image": "nginx"}]}
    new = spec(old, {"containers": [{"name": "patch-demo-ctr-2", "image": "redis"}]})
    assert [c["name"] for c in new["containers"]] == ["patch-demo-ctr-2", "patch-demo-ctr"]


def test_an_atomic_list_is_replaced() -> None:
    old = {"tolerations": [{"key": "a"}], "containers": containers("c", args=["x"])}
    new = spec(old, {"tolerations": [{"key": "b"}], "containers": containers("c", args=["y", "z"])})
    assert (new["tolerations"], new["containers"][0]["args"]) == ([{"key": "b"}], ["y", "z"])


def test_an_entry_is_merged_field_by_field_and_null_takes_away() -> None:
    old = {"containers": containers("c", image="i", tty=True, env=[{"name": "A", "value": "1"}])}
    new = spec(old, {"containers": [{"name": "c", "tty": None, "env": [{"name": "B", "value": "2"}]}]})
    assert new["containers"] == [
        {"name": "c", "image": "i", "env": [{"name": "B", "value": "2"}, {"name": "A", "value": "1"}]}
    ]


def test_delete_an_entry() -> None:
    new = spec({"containers": containers("a", "b")}, {"containers": [{"name": "a", "$patch": "delete"}]})
    assert new["containers"] == containers("b")


def test_replace_a_list() -> None:
    new = spec({"containers": containers("a", "b")}, {"containers": [{"$patch": "replace"}, {"name": "c"}]})
    assert new["containers"] == containers("c")


def test_replace_and_delete_an_object() -> None:
    old = {"securityContext": {"runAsUser": 1}, "nodeSelector": {"a": "b"}}
    patch = {"securityContext": {"$patch": "replace", "fsGroup": 2}, "nodeSelector": {"$patch": "delete"}}
    assert spec(old, patch) == {"securityContext": {"fsGroup": 2}, "nodeSelector": {}}


def test_retain_keys() -> None:
    old = {"spec": {"strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1}}}}
    patch = {"spec": {"strategy": {"$retainKeys": ["type"], "type": "Recreate"}}}
    assert strategic_merge(old, patch, DEPLOYMENT) == {"spec": {"strategy": {"type": "Recreate"}}}


def test_delete_from_a_list_of_values() -> None:
    old = {"metadata": {"finalizers": ["a", "b", "c"]}}
    patch = {"metadata": {"$deleteFromPrimitiveList/finalizers": ["b"], "finalizers": ["d"]}}
    assert strategic_merge(old, patch, POD)["metadata"]["finalizers"] == ["d", "a", "c"]


def test_the_order_of_a_list() -> None:
    old = {"containers": containers("a", "b", "server", "c")}
    patch = {"$setElementOrder/containers": containers("c", "a", "b"), "containers": containers("c", image="i")}
    assert [c["name"] for c in spec(old, patch)["containers"]] == ["server", "c", "a", "b"]


def test_the_order_of_a_list_that_is_not_changed() -> None:
    old = {"containers": containers("a", "b")}
    assert spec(old, {"$setElementOrder/containers": containers("b", "a")})["containers"] == containers("b", "a")


def test_the_order_of_values() -> None:
    old = {"metadata": {"finalizers": ["a", "b"]}}
    patch = {"metadata": {"$setElementOrder/finalizers": ["c", "b", "a"], "finalizers": ["c"]}}
    assert strategic_merge(old, patch, POD)["metadata"]["finalizers"] == ["c", "b", "a"]


@pytest.mark.parametrize(
    ("patch", "code"),
    [
        ({"containers": [{"image": "x"}]}, 422),
        ({"containers": ["x"]}, 422),
        ({"securityContext": {"$patch": "frob"}}, 400),
        ({"containers": [{"name": "a", "$patch": "frob"}]}, 400),
        ({"$setElementOrder/containers": [{"name": "a"}], "containers": [{"name": "b"}]}, 400),
        ({"$setElementOrder/containers": "a"}, 400),
        ({"$setElementOrder/containers": ["a"], "containers": [{"name": "a"}]}, 400),
        ({"$retainKeys": ["a"], "hostname": "x"}, 400),
        ({"$frob": 1}, 400),
    ],
)
def test_what_is_refused(patch: dict[str, Any], code: int) -> None:
    with pytest.raises(ApiError) as caught:
        spec({"containers": containers("a")}, patch)
    assert caught.value.code == code


ENV = st.dictionaries(st.sampled_from("ABCDE"), st.sampled_from(["1", "2", None]), max_size=4)


@given(ENV, ENV, st.data())
def test_against_a_naive_model(old: dict[str, Any], change: dict[str, Any], data: st.DataObject) -> None:
    """A keyed list is a dictionary: entries merge, deletions delete, and with an order given the order is that."""
    before = [{"name": k, "value": v} for k, v in old.items() if v is not None]
    model = {k: v for k, v in old.items() if v is not None}
    patch: list[dict[str, Any]] = []
    for key, value in change.items():
        patch.append({"name": key, "$patch": "delete"} if value is None else {"name": key, "value": value})
        if value is None:
            model.pop(key, None)
        else:
            model[key] = value
    wanted = data.draw(st.permutations(sorted(model)))
    patch.sort(key=lambda item: wanted.index(item["name"]) if item["name"] in wanted else -1)
    container = {"name": "c", "env": patch, "$setElementOrder/env": [{"name": k} for k in wanted]}
    new = spec({"containers": containers("c", env=before)}, {"containers": [container]})
    env = new["containers"][0].get("env", [])
    assert [e["name"] for e in env] == wanted
    assert {e["name"]: e["value"] for e in env} == model
