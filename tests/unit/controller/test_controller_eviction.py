"""Limits of what a pod takes of its disk: which one is exceeded, and what follows."""

from __future__ import annotations

from typing import Any

import pytest
from fake_guest import Script
from pod_bench import Bench, manifest, until

from hypervisor.controller.eviction import exceeded, pod_limit
from hypervisor.controller.manifest import parse_pod

MIB = 1024 * 1024


def limited(name: str, limit: str | None = None, **more: Any) -> dict[str, Any]:
    return (
        {"name": name, "image": "x"} | more | ({"resources": {"limits": {"ephemeral-storage": limit}}} if limit else {})
    )


def pod(**spec: Any) -> Any:
    volumes = [
        {"name": "v", "emptyDir": {"sizeLimit": "1Mi"}},
        {"name": "free", "emptyDir": {}},
        {"name": "m", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}},
    ]
    return parse_pod(manifest(**{"containers": [limited("a", "4Mi"), limited("b", "4Mi")], "volumes": volumes} | spec))


def taken(*, a: int = 0, logs: int = 0, v: int = 0, free: int = 0, m: int = 0) -> dict[str, Any]:
    volumes = {name: {"used_bytes": used} for name, used in (("v", v), ("free", free), ("m", m))}
    return {"containers": {"a": {"disk_bytes": a, "log_bytes": logs}}, "volumes": volumes}


@pytest.mark.parametrize(
    ("used", "said"),
    [
        ({}, ""),
        ({"a": 4 * MIB, "v": MIB, "m": MIB}, ""),
        ({"v": MIB + 1}, 'Usage of EmptyDir volume "v" exceeds the limit "1Mi". '),
        ({"a": 4 * MIB + 1}, 'Container a exceeded its local ephemeral storage limit "4Mi". '),
        ({"a": 4 * MIB - 10, "logs": 11}, 'Container a exceeded its local ephemeral storage limit "4Mi". '),
        ({"free": 9 * MIB}, "Pod ephemeral local storage usage exceeds the total limit of containers 8Mi. "),
        ({"m": 9 * MIB}, 'Usage of EmptyDir volume "m" exceeds the limit "1Mi". '),
    ],
)
def test_which_limit_is_exceeded(used: dict[str, int], said: str) -> None:
    assert exceeded(pod(), taken(**used)) == said


def test_a_pods_limit_is_that_of_containers_that_run_together() -> None:
    sidecar = limited("s", "1Mi", restartPolicy="Always")
    assert pod_limit(pod(initContainers=[sidecar, limited("i", "2Mi")])) == 9 * MIB
    assert pod_limit(pod(initContainers=[sidecar, limited("i", "20Mi")])) == 21 * MIB
    assert pod_limit(pod(containers=[limited("a")])) == 0


async def test_a_pod_over_its_limit_is_evicted_whatever_its_policy(bench: Bench) -> None:
    bench.machines.scripts = [Script(stats=taken(v=2 * MIB))]
    volumes = [{"name": "v", "emptyDir": {"sizeLimit": "1Mi"}}]
    made = await bench.create(policy="Always", volumes=volumes)
    await until(made, lambda: made.journal.record.closed)
    status = made.view()["status"]
    assert (status["phase"], status["reason"]) == ("Failed", "Evicted")
    assert status["message"].startswith('Usage of EmptyDir volume "v"')
    (target,) = [c for c in status["conditions"] if c["type"] == "DisruptionTarget"]
    assert (target["status"], target["reason"]) == ("True", "TerminationByKubelet")
    assert len(bench.machines.started) == 1


async def test_a_pod_without_limits_is_not_asked(bench: Bench) -> None:
    bench.machines.scripts = [Script(ends={"c": [0]}, stats=taken(v=2 * MIB))]
    made = await bench.create()
    await until(made, lambda: made.journal.record.closed)
    assert "container.stats" not in [call for call, _ in bench.machines.started[0].calls]
