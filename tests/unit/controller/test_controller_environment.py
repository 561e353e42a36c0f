"""Environments out of config maps, secrets and resources, read at each start; credentials out of imagePullSecrets."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from fake_guest import Script
from pod_bench import Bench, manifest, until

from hypervisor.controller import keeper
from hypervisor.controller.environment import fetch_external
from hypervisor.controller.manifest import parse_pod
from hypervisor.controller.podobjects import HostObjects
from hypervisor.controller.podvm import PodVm
from hypervisor.controller.record import Running
from hypervisor.controller.runtime_spec import environment
from hypervisor.errors import NotFound


class Objects(HostObjects):
    """Config maps and secrets of a cluster."""

    def __init__(self) -> None:
        self.config_maps: dict[str, Mapping[str, bytes]] = {}
        self.secrets: dict[str, Mapping[str, bytes]] = {}

    async def config_map(self, namespace: str, name: str) -> Mapping[str, bytes]:
        if name not in self.config_maps:
            raise NotFound(f'configmap "{name}" not found')
        return self.config_maps[name]

    async def secret(self, namespace: str, name: str) -> Mapping[str, bytes]:
        if name not in self.secrets:
            raise NotFound(f'secret "{name}" not found')
        return self.secrets[name]


@pytest.fixture
def objects(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Objects:
    """What the bench's pods get theirs from."""
    made = Objects()
    bench.pods._services = replace(bench.pods._services, objects=made)
    monkeypatch.setattr(keeper, "CONFIG_RETRY_S", (0.02, 0.02))
    return made


def key(kind: str, name: str, of: str, **more: Any) -> dict[str, Any]:
    return {"valueFrom": {f"{kind}KeyRef": {"name": name, "key": of} | more}}


async def variables(objects: Objects, **container: Any) -> dict[str, str]:
    pod = parse_pod(manifest(containers=[{"name": "c", "image": "x"} | container]))
    external = await fetch_external(objects, pod, pod.containers[0])
    return environment(pod.containers[0], pod, "u", external)


async def test_env_from_comes_first_and_a_prefix_before_its_keys() -> None:
    objects = Objects()
    objects.config_maps["m"] = {"A": b"1", "B": b"2"}
    objects.secrets["s"] = {"B": b"secret"}
    made = await variables(
        objects,
        envFrom=[
            {"configMapRef": {"name": "m"}},
            {"secretRef": {"name": "s"}, "prefix": "S_"},
            {"secretRef": {"name": "none", "optional": True}},
        ],
        env=[{"name": "A", "value": "own"}, {"name": "ALL", "value": "$(A) $(B) $(S_B)"}],
    )
    assert made == {"A": "own", "B": "2", "S_B": "secret", "ALL": "own 2 secret"}


async def test_keys() -> None:
    objects = Objects()
    objects.config_maps["m"] = {"a": b"1"}
    objects.secrets["s"] = {"k": b"hidden"}
    optional = [
        {"name": "GONE", **key("configMap", "m", "b", optional=True)},
        {"name": "GONE2", **key("secret", "none", "b", optional=True)},
    ]
    given = [{"name": "A", **key("configMap", "m", "a")}, {"name": "K", **key("secret", "s", "k")}, *optional]
    assert await variables(objects, env=given) == {"A": "1", "K": "hidden"}
    with pytest.raises(NotFound, match="couldn't find key b in configMap default/m"):
        await variables(objects, env=[{"name": "A", **key("configMap", "m", "b")}])


async def test_resources() -> None:
    def of(resource: str, **more: Any) -> dict[str, Any]:
        return {"name": "N", "valueFrom": {"resourceFieldRef": {"resource": resource} | more}}

    resources = {"limits": {"cpu": "1500m", "memory": "100Mi"}, "requests": {"cpu": "250m"}}
    expected = {
        "2": of("limits.cpu"),
        "1500": of("limits.cpu", divisor="1m"),
        "1": of("requests.cpu"),
        str(100 << 20): of("limits.memory"),
        "100": of("limits.memory", divisor="1Mi"),
        str(100 << 10): of("requests.memory", divisor="1Ki"),
        "0": of("requests.ephemeral-storage"),
    }
    for value, variable in expected.items():
        assert await variables(Objects(), env=[variable], resources=resources) == {"N": value}
    assert int((await variables(Objects(), env=[of("limits.memory")]))["N"]) > 128 << 20


async def made(bench: Bench, policy: str = "Never", **more: Any) -> PodVm:
    container = {"name": "c", "image": "x", "env": [{"name": "A", **key("configMap", "m", "a")}]}
    return await bench.create(policy=policy, containers=[container], **more)


def started(bench: Bench) -> list[dict[str, Any]]:
    return [args for call, args in bench.machines.started[0].calls if call == "container.start"]


async def test_a_start_waits_for_what_is_missing(bench: Bench, objects: Objects) -> None:
    pod = await made(bench)
    await until(pod, lambda: "CreateContainerConfigError" in str(pod.journal.record.container("c").state))
    assert 'configmap "m" not found' in str(pod.journal.record.container("c").state)
    assert pod.journal.record.phase == "Pending"
    objects.config_maps["m"] = {"a": b"here"}
    await until(pod, lambda: isinstance(pod.journal.record.container("c").state, Running))
    assert "A=here" in started(bench)[0]["env"]


async def test_each_start_reads_it_anew(bench: Bench, objects: Objects) -> None:
    bench.machines.scripts = [Script()]
    objects.config_maps["m"] = {"a": b"one"}
    pod = await made(bench, "Always")
    await until(pod, lambda: isinstance(pod.journal.record.container("c").state, Running))
    objects.config_maps["m"] = {"a": b"two"}
    bench.machines.started[0].exit("c", 0)
    await until(pod, lambda: pod.journal.record.container("c").restarts == 1)
    assert [next(v for v in args["env"] if v.startswith("A=")) for args in started(bench)] == ["A=one", "A=two"]


async def test_sub_path_of_variables(bench: Bench) -> None:
    mount = {"name": "v", "mountPath": "/v", "subPathExpr": "logs/$(NAME)"}
    env = [{"name": "NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}]
    container = {"name": "c", "image": "x", "env": env, "volumeMounts": [mount]}
    pod = await bench.create(containers=[container], volumes=[{"name": "v", "emptyDir": {}}])
    await until(pod, lambda: isinstance(pod.journal.record.container("c").state, Running))
    assert started(bench)[0]["mounts"][0]["sub_path"] == "logs/p"


async def test_sub_path_that_leads_out_fails_the_pod(bench: Bench) -> None:
    mount = {"name": "v", "mountPath": "/v", "subPathExpr": "$(UP)/x"}
    container = {"name": "c", "image": "x", "env": [{"name": "UP", "value": ".."}], "volumeMounts": [mount]}
    pod = await bench.create(containers=[container], volumes=[{"name": "v", "emptyDir": {}}])
    await until(pod, lambda: pod.journal.record.terminal)
    assert "not a relative path" in pod.journal.record.message


# ---- images ----------------------------------------------------------------------------------------------------------


def docker(**auths: str) -> Mapping[str, bytes]:
    coded = {host: {"auth": base64.b64encode(f"me:{word}".encode()).decode()} for host, word in auths.items()}
    return {".dockerconfigjson": json.dumps({"auths": coded}).encode()}


async def test_pull_secrets_of_the_registry_are_tried_in_turn(bench: Bench, objects: Objects) -> None:
    objects.secrets = {
        "old": docker(**{"https://registry.example/v1/": "wrong"}),
        "other": docker(**{"elsewhere.example": "right"}),
        "good": docker(**{"registry.example": "right"}),
        "broken": {".dockerconfigjson": b"{"},
    }
    bench.images.wants = "right"
    secrets = [{"name": name} for name in ("missing", "broken", "old", "other", "good")]
    container = {"name": "c", "image": "registry.example/app:1"}
    pod = await bench.create(containers=[container], imagePullSecrets=secrets)
    await until(pod, lambda: isinstance(pod.journal.record.container("c").state, Running))
    told = [n.message for n in pod.journal.notices if n.reason == "FailedToRetrieveImagePullSecret"]
    assert [name for name in ("missing", "broken") if any(name in message for message in told)] == ["missing", "broken"]
    assert len(told) == 2


async def test_without_a_secret_for_it_the_pull_backs_off(bench: Bench, objects: Objects) -> None:
    objects.secrets = {"other": docker(**{"elsewhere.example": "right"})}
    bench.images.wants = "right"
    container = {"name": "c", "image": "registry.example/app:1"}
    pod = await bench.create(containers=[container], imagePullSecrets=[{"name": "other"}])
    await until(pod, lambda: "access refused" in str(pod.journal.record.container("c").state))


# ---- hostile ---------------------------------------------------------------------------------------------------------


async def test_variables_that_grow_like_powers_fail_the_pod_at_once(bench: Bench) -> None:
    bomb = [{"name": "A0", "value": "x" * 1000}]
    bomb += [{"name": f"A{i}", "value": f"$(A{i - 1})" * 10} for i in range(1, 12)]
    pod = await bench.create(containers=[{"name": "c", "image": "x", "env": bomb}])
    await until(pod, lambda: pod.journal.record.terminal)
    assert pod.journal.record.reason == "CreateContainerConfigError"
    assert "more than 131071 characters" in pod.journal.record.message
    assert bench.machines.started == []


async def test_very_many_variables_fail_the_pod_at_once(bench: Bench) -> None:
    many = [{"name": "A", "value": "x" * 100_000}]
    many += [{"name": f"B{i}", "value": "$(A)"} for i in range(3000)]
    pod = await bench.create(containers=[{"name": "c", "image": "x", "env": many}])
    await until(pod, lambda: pod.journal.record.terminal)
    assert "more than 2097152 characters" in pod.journal.record.message
