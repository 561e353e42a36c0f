"""Rolling updates, step by step: a small model of ReplicaSets whose pods come, become available and go at random."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hypervisor.master.controllers.deployment import revisions, rollout
from hypervisor.master.controllers.deployment.rollout import Bounds


def deployment(replicas: int, surge: int | str = "25%", unavailable: int | str = "25%") -> dict[str, Any]:
    rolling = {"maxSurge": surge, "maxUnavailable": unavailable}
    return {
        "metadata": {"name": "d", "namespace": "ns", "uid": "u"},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": {"app": "x"}},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": rolling},
            "template": {"metadata": {"labels": {"app": "x"}}, "spec": {"containers": [{"name": "c", "image": "1"}]}},
        },
    }


def replica_set(name: str, asked: int, there: int = 0, available: int = 0) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "creationTimestamp": f"2026-01-01T00:00:0{len(name)}Z", "annotations": {}},
        "spec": {"replicas": asked},
        "status": {"replicas": there, "availableReplicas": available},
    }


@pytest.mark.parametrize(
    ("replicas", "surge", "unavailable", "bounds"),
    [
        (4, "25%", "25%", Bounds(4, 1, 1)),
        (10, "25%", "25%", Bounds(10, 3, 2)),
        (3, 0, 0, Bounds(3, 0, 1)),
        (3, 0, "100%", Bounds(3, 0, 3)),
        (2, 5, 9, Bounds(2, 5, 2)),
    ],
)
def test_bounds(replicas: int, surge: int | str, unavailable: int | str, bounds: Bounds) -> None:
    assert rollout.bounds(deployment(replicas, surge, unavailable)) == bounds


class Model:
    """Pods of ReplicaSets: each turn some of what was asked for happens."""

    def __init__(self, sets: list[dict[str, Any]], dice: random.Random) -> None:
        self.sets = sets
        self.dice = dice

    def apply(self, sizes: rollout.Sizes) -> None:
        for rs in self.sets:
            name = rollout.name_of(rs)
            if name in sizes:
                rs["spec"]["replicas"] = sizes[name]
                status = rs["status"]
                # What is to go goes at once, those that do not answer first.
                status["replicas"] = min(status["replicas"], sizes[name])
                status["availableReplicas"] = min(status["availableReplicas"], sizes[name])

    def live(self) -> None:
        for rs in self.sets:
            status = rs["status"]
            status["replicas"] += self.dice.randint(0, rs["spec"]["replicas"] - status["replicas"])
            status["availableReplicas"] += self.dice.randint(0, status["replicas"] - status["availableReplicas"])

    def total(self, of: str) -> int:
        return sum(int(rs["status"][of]) for rs in self.sets)


@settings(max_examples=150, deadline=None)
@given(
    replicas=st.integers(0, 12),
    surge=st.integers(0, 4),
    unavailable=st.integers(0, 4),
    olds=st.integers(1, 3),
    seed=st.integers(0, 2**32),
)
def test_a_rolling_update_arrives_and_keeps_its_bounds(
    replicas: int, surge: int, unavailable: int, olds: int, seed: int
) -> None:
    dice = random.Random(seed)
    limits = rollout.bounds(deployment(replicas, surge, unavailable))
    shares = [0] * olds
    for _ in range(replicas):
        shares[dice.randrange(olds)] += 1
    old = [replica_set("o" * (n + 1), share, share, share) for n, share in enumerate(shares)]
    size = rollout.new_set_size(limits, old, recreate=False)
    model = Model([*old, replica_set("new", size)], dice)
    for _ in range(400):
        model.apply(rollout.rolling_step(limits, model.sets[-1], model.sets[:-1]))
        assert sum(map(rollout.asked, model.sets)) <= limits.most
        assert model.total("availableReplicas") >= limits.least
        model.live()
    assert rollout.available(model.sets[-1]) == limits.desired
    assert not any(map(rollout.asked, model.sets[:-1]))


def test_recreate_waits_for_the_last_old_pod() -> None:
    limits = Bounds(3, 0, 3)
    old, new = replica_set("o", 3, 3, 3), replica_set("new", 0)
    assert rollout.new_set_size(limits, [old], recreate=True) == 0
    assert rollout.recreate_step(limits, new, [old]) == {"o": 0}
    old["spec"]["replicas"] = 0
    assert rollout.recreate_step(limits, new, [old]) == {}
    old["status"]["replicas"] = 0
    assert rollout.recreate_step(limits, new, [old]) == {"new": 3}


@given(before=st.integers(1, 20), after=st.integers(0, 30), first=st.integers(0, 20))
def test_a_resize_in_mid_rollout_is_shared_out(before: int, after: int, first: int) -> None:
    first = min(first, before)
    sets = [replica_set("a", first), replica_set("bb", before - first)]
    for rs in sets:
        rs["metadata"]["annotations"] = {rollout.DESIRED: str(before), rollout.MAX_REPLICAS: str(before)}
    limits = Bounds(after, 0, 1)
    sizes = rollout.proportional(limits, sets)
    total = sum(sizes.get(rollout.name_of(rs), rollout.asked(rs)) for rs in sets)
    assert total == after
    assert all(v >= 0 for v in sizes.values())


def test_the_hash_stands_for_the_template_alone() -> None:
    one = deployment(1)
    made = revisions.make_set(one, 1, 1)
    labels = made["spec"]["template"]["metadata"]["labels"]
    assert made["metadata"]["name"] == f"d-{labels[revisions.HASH_LABEL]}"
    assert revisions.newest(one, [made]) is made
    one["spec"]["replicas"] = 7
    assert revisions.make_set(one, 2, 1)["metadata"]["name"] == made["metadata"]["name"]
    one["spec"]["template"] = {**one["spec"]["template"], "spec": {"containers": [{"name": "c", "image": "2"}]}}
    assert revisions.newest(one, [made]) is None
    assert revisions.make_set(one, 2, 1)["metadata"]["name"] != made["metadata"]["name"]


def test_history_is_kept_in_the_annotation() -> None:
    known = {revisions.REVISION: "3", revisions.HISTORY: "1,2", "kubernetes.io/change-cause": "old"}
    one = deployment(1)
    one["metadata"]["annotations"] = {"kubernetes.io/change-cause": "undo", revisions.REVISION: "9"}
    wanted = revisions.annotations_for(one, known, 5)
    assert wanted == {revisions.REVISION: "5", revisions.HISTORY: "1,2,3", "kubernetes.io/change-cause": "undo"}
