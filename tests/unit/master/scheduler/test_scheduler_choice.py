"""Where a pod goes, and why not: one scheduler, nodes and pods as plain objects, no API server."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from hypervisor.master.scheduler.image_names import full_name
from hypervisor.master.scheduler.requests import OVERHEAD_ANNOTATION, pod_request
from hypervisor.master.scheduler.scheduler import Scheduler, why_nowhere
from hypervisor.master.scheduler.scores import TEMPLATES_ANNOTATION
from hypervisor.master.scheduler.state import ClusterState

_uids = (f"uid-{n}" for n in itertools.count())
GIB = 1024**3


class NoEvents:
    def record(self, *_: Any) -> None:
        """Nobody reads them here."""


def node(name: str, *, cpu: str = "4", memory: str = "8Gi", **extra: Any) -> dict[str, Any]:
    labels = {"kubernetes.io/hostname": name, **extra.pop("labels", {})}
    return {
        "metadata": {"name": name, "labels": labels, "annotations": extra.pop("annotations", {})},
        "spec": extra.pop("spec", {}),
        "status": {"allocatable": {"cpu": cpu, "memory": memory, "pods": "110"}, **extra},
    }


def pod(name: str = "p", *, requests: dict[str, str] | None = None, **spec: Any) -> dict[str, Any]:
    labels = spec.pop("labels", {})
    owners = spec.pop("owners", [])
    container = {"name": "c", "image": "i", "resources": {"requests": requests or {}}}
    return {
        "metadata": {"name": name, "namespace": "ns", "uid": next(_uids), "labels": labels, "ownerReferences": owners},
        "spec": {"containers": [container], **spec},
    }


def scheduler(*nodes: dict[str, Any]) -> Scheduler:
    made = Scheduler(None, NoEvents())  # type: ignore[arg-type]
    made.namespace_changed({"metadata": {"name": "ns", "labels": {"team": "a"}}})
    for one in nodes:
        made.node_changed(one)
    return made


def place(into: Scheduler, what: dict[str, Any], on: str) -> None:
    into.pod_changed({**what, "spec": {**what["spec"], "nodeName": on}})


def choose(of: Scheduler, what: dict[str, Any]) -> tuple[str | None, str]:
    name, refusals = of._choose(what)
    return name, "" if name else why_nowhere(refusals)


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (node("n", cpu="1"), pod(requests={"cpu": "1001m"}), "Insufficient cpu"),
    (node("n", memory="1Gi"), pod(requests={"memory": "2Gi"}), "Insufficient memory"),
    (node("n"), pod(requests={"example.com/gpu": "1"}), "Insufficient example.com/gpu"),
    (node("n", spec={"unschedulable": True}), pod(), "node(s) were unschedulable"),
    (
        node("n", spec={"taints": [{"key": "k", "value": "v", "effect": "NoSchedule"}]}),
        pod(tolerations=[{"key": "k", "operator": "Equal", "value": "other"}]),
        "node(s) had untolerated taint {k: v}",
    ),
    (node("n"), pod(nodeSelector={"disk": "ssd"}), "node(s) didn't match Pod's node affinity/selector"),
    (
        node("n", annotations={OVERHEAD_ANNOTATION: str(256 * 1024**2)}, memory="512Mi"),
        pod(requests={"memory": "300Mi"}),
        "Insufficient memory",
    ),
]


@pytest.mark.parametrize(("there", "wanted", "reason"), REFUSED, ids=[r for _, _, r in REFUSED])
def test_refused_with_the_reason_that_people_search_for(
    there: dict[str, Any], wanted: dict[str, Any], reason: str
) -> None:
    assert choose(scheduler(there), wanted) == (None, f"0/1 nodes are available: 1 {reason}.")


def test_no_nodes_at_all() -> None:
    assert choose(scheduler(), pod()) == (None, "no nodes available to schedule pods")


def test_a_tolerated_taint_lets_in() -> None:
    tainted = node("n", spec={"taints": [{"key": "k", "value": "v", "effect": "NoSchedule"}]})
    for toleration in ({"operator": "Exists"}, {"key": "k", "value": "v"}, {"key": "k", "operator": "Exists"}):
        assert choose(scheduler(tainted), pod(tolerations=[toleration]))[0] == "n"


def test_what_is_assumed_counts_before_the_api_server_says_so() -> None:
    one = scheduler(node("n", cpu="1"))
    first, second = pod("a", requests={"cpu": "600m"}), pod("b", requests={"cpu": "600m"})
    one._cluster.assume(first, "n")
    assert choose(one, second)[0] is None
    one.pod_gone(first)
    assert choose(one, second)[0] == "n"


def test_an_ended_pod_takes_nothing() -> None:
    one = scheduler(node("n", cpu="1"))
    first = pod("a", requests={"cpu": "1"})
    place(one, first, "n")
    assert choose(one, pod(requests={"cpu": "1"}))[0] is None
    ended = {**first, "spec": {**first["spec"], "nodeName": "n"}, "status": {"phase": "Succeeded"}}
    one.pod_changed(ended)
    assert choose(one, pod(requests={"cpu": "1"}))[0] == "n"


def test_the_emptier_node_is_taken() -> None:
    one = scheduler(node("a"), node("b"))
    place(one, pod("x", requests={"cpu": "2", "memory": "4Gi"}), "a")
    assert choose(one, pod(requests={"cpu": "1"}))[0] == "b"


def test_the_node_with_the_image_is_taken_of_equals() -> None:
    with_image = node("b", images=[{"names": ["i"], "sizeBytes": 5}])
    assert choose(scheduler(node("a"), with_image), pod())[0] == "b"


def test_images_are_the_same_however_they_are_written() -> None:
    named = {"i": "docker.io/library/i:latest", "me/i": "docker.io/me/i:latest", "localhost/i": "localhost/i:latest"}
    named |= {"r:5000/i": "r:5000/i:latest", "i:1": "docker.io/library/i:1", "r.x/a/i@sha256:1": "r.x/a/i@sha256:1"}
    assert {short: full_name(short) for short in named} == named
    with_image = node("b", images=[{"names": ["docker.io/library/i:latest"], "sizeBytes": 5}])
    assert choose(scheduler(node("a"), with_image), pod())[0] == "b"


def test_the_node_with_a_template_is_taken_of_equals() -> None:
    with_template = node("b")
    with_template["metadata"]["annotations"] = {TEMPLATES_ANNOTATION: "512"}
    assert choose(scheduler(node("a"), with_template), pod())[0] == "b"


@pytest.mark.parametrize(
    ("operator", "values", "good"),
    [
        ("In", ["1", "2"], True),
        ("In", ["3"], False),
        ("NotIn", ["3"], True),
        ("Exists", [], True),
        ("DoesNotExist", [], False),
        ("Gt", ["1"], True),
        ("Gt", ["2"], False),
        ("Lt", ["3"], True),
    ],
)
def test_node_affinity(operator: str, values: list[str], good: bool) -> None:
    term = {"matchExpressions": [{"key": "size", "operator": operator, "values": values}]}
    required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}
    wanted = pod(affinity={"nodeAffinity": required})
    assert (choose(scheduler(node("n", labels={"size": "2"})), wanted)[0] == "n") is good


def anti(app: str) -> dict[str, Any]:
    term = {"labelSelector": {"matchLabels": {"app": app}}, "topologyKey": "kubernetes.io/hostname"}
    return {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}


def test_anti_affinity_keeps_apart_in_both_directions() -> None:
    one = scheduler(node("a"), node("b"))
    place(one, pod("x", labels={"app": "web"}), "a")
    assert choose(one, pod(labels={"app": "db"}, affinity=anti("web")))[0] == "b"
    place(one, pod("y", labels={"app": "db"}, affinity=anti("web")), "b")
    name, why = choose(one, pod(labels={"app": "web"}, affinity=anti("web")))
    assert name is None
    assert "1 node(s) didn't match pod anti-affinity rules" in why
    assert "1 node(s) didn't satisfy existing pods anti-affinity rules" in why


def test_affinity_goes_where_the_others_are_and_the_first_goes_anywhere() -> None:
    term = {"labelSelector": {"matchLabels": {"app": "web"}}, "topologyKey": "zone"}
    together = {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}
    one = scheduler(node("a", labels={"zone": "1"}), node("b", labels={"zone": "2"}))
    assert choose(one, pod(labels={"app": "web"}, affinity=together))[0] is not None
    assert choose(one, pod(labels={"app": "db"}, affinity=together))[0] is None
    place(one, pod("x", labels={"app": "web"}), "b")
    assert choose(one, pod(labels={"app": "db"}, affinity=together))[0] == "b"


def test_affinity_by_namespace_labels() -> None:
    term = {
        "labelSelector": {"matchLabels": {"app": "web"}},
        "namespaceSelector": {"matchLabels": {"team": "a"}},
        "topologyKey": "kubernetes.io/hostname",
    }
    one = scheduler(node("a"), node("b"))
    place(one, pod("x", labels={"app": "web"}), "b")
    wanted = pod(affinity={"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}})
    wanted["metadata"]["namespace"] = "elsewhere"
    assert choose(one, wanted)[0] == "b"


def test_spread_holds_the_skew() -> None:
    constraint = {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "DoNotSchedule",
        "labelSelector": {"matchLabels": {"app": "web"}},
    }
    one = scheduler(node("a"), node("b"), node("c"))
    counts: dict[str, int] = {}
    for _ in range(9):
        wanted = pod(labels={"app": "web"}, topologySpreadConstraints=[constraint])
        name, _ = choose(one, wanted)
        assert name is not None
        one._cluster.assume(wanted, name)
        counts[name] = counts.get(name, 0) + 1
        assert max(counts.values()) - min(counts.get(n, 0) for n in "abc") <= 1


def test_siblings_spread_without_being_asked() -> None:
    one = scheduler(node("a"), node("b"))
    owner = [{"kind": "ReplicaSet", "name": "r", "uid": "r", "controller": True}]
    names = []
    for _ in range(6):
        wanted = pod(labels={"app": "web"}, owners=owner)
        name, _ = choose(one, wanted)
        assert name is not None
        one._cluster.assume(wanted, name)
        names.append(name)
    assert sorted(names) == ["a"] * 3 + ["b"] * 3


def test_host_ports_clash() -> None:
    def with_port(address: str = "") -> dict[str, Any]:
        made = pod()
        made["spec"]["containers"][0]["ports"] = [{"containerPort": 80, "hostPort": 80, "hostIP": address}]
        return made

    one = scheduler(node("a"))
    place(one, with_port("10.0.0.1"), "a")
    assert choose(one, with_port())[0] is None
    assert choose(one, with_port("10.0.0.2"))[0] == "a"


def test_a_request_is_the_larger_of_sum_and_largest_init_container() -> None:
    wanted = pod(requests={"cpu": "1", "memory": "1Gi"})
    wanted["spec"]["initContainers"] = [
        {"name": "side", "restartPolicy": "Always", "resources": {"requests": {"cpu": "500m"}}},
        {"name": "big", "resources": {"requests": {"cpu": "200m", "memory": "3Gi"}}},
    ]
    wanted["spec"]["overhead"] = {"memory": "256Mi"}
    assert pod_request(wanted) == {"cpu": 1500, "memory": 3 * GIB + 256 * 1024**2, "pods": 1}


# ---- preemption ------------------------------------------------------------------------------------------------------


def plan(of: Scheduler, what: dict[str, Any]) -> tuple[str, set[str]] | None:
    _, refusals = of._choose(what)
    found = of._plan_preemption(what, refusals)
    return None if found is None else (found.node, {v["metadata"]["name"] for v in found.victims})


def test_as_few_and_as_low_pods_as_do_are_sent_away() -> None:
    one = scheduler(node("a", cpu="4"), node("b", cpu="4"))
    place(one, pod("low", requests={"cpu": "2"}, priority=1), "a")
    place(one, pod("lower", requests={"cpu": "2"}, priority=0), "a")
    place(one, pod("mid", requests={"cpu": "4"}, priority=5), "b")
    assert plan(one, pod(requests={"cpu": "2"}, priority=10)) == ("a", {"lower"})
    assert plan(one, pod(requests={"cpu": "4"}, priority=10)) == ("a", {"low", "lower"})
    assert plan(one, pod(requests={"cpu": "4"}, priority=1)) is None
    assert plan(one, pod(requests={"cpu": "4"}, priority=10, preemptionPolicy="Never")) is None
    assert plan(one, pod(requests={"cpu": "40"}, priority=10)) is None


def test_a_budget_is_broken_only_where_nothing_else_does() -> None:
    from hypervisor.kube.selectors import LabelSelector

    one = scheduler(node("a", cpu="2"), node("b", cpu="2"))
    place(one, pod("guarded", requests={"cpu": "2"}, labels={"app": "db"}, priority=0), "a")
    place(one, pod("free", requests={"cpu": "2"}, priority=3), "b")
    one.budgets.put("ns", "db", LabelSelector.of({"matchLabels": {"app": "db"}}), 0)
    assert plan(one, pod(requests={"cpu": "2"}, priority=10)) == ("b", {"free"})


def test_nobody_lower_takes_the_room_of_a_nominated_pod() -> None:
    one = scheduler(node("a", cpu="2"))
    high = pod("high", requests={"cpu": "2"}, priority=10)
    one._nominated[high["metadata"]["uid"]] = (high, "a")
    assert choose(one, pod(requests={"cpu": "1"}, priority=1))[0] is None
    assert choose(one, high)[0] == "a"
    assert choose(one, pod(requests={"cpu": "1"}, priority=11))[0] == "a"


# ---- the state -------------------------------------------------------------------------------------------------------


def test_counts_come_out_even_whatever_the_order() -> None:
    state = ClusterState()
    state.set_node(node("a"))
    pods = [pod(f"p{n}", requests={"cpu": "100m"}, labels={"n": str(n % 2)}) for n in range(6)]
    for one in pods:
        state.assume(one, "a")
        state.assume(one, "a")
    assert state.nodes["a"].requested["cpu"] == 600
    assert sorted(state.nodes["a"].groups.values()) == [3, 3]
    state.drop_node("a")
    state.drop_pod(pods[0]["metadata"]["uid"])
    state.set_node(node("a"))
    assert state.nodes["a"].requested["cpu"] == 500
    for one in pods:
        state.drop_pod(one["metadata"]["uid"])
    assert not state.nodes["a"].groups
    assert state.nodes["a"].requested["cpu"] == 0
