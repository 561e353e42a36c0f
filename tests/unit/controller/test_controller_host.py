"""The daemon's own files, static pods, and what containers are given: small parts, without guests."""

from __future__ import annotations

import asyncio
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pod_bench import Bench, manifest

from hypervisor.controller.backoff import BackoffPolicy
from hypervisor.controller.hostfiles import announce, only_daemon, prepare, token, withdraw
from hypervisor.controller.manifest import parse_pod
from hypervisor.controller.paths import MAX_STATE_DIR, HostPaths, state_directory
from hypervisor.controller.podstatus import qos_class
from hypervisor.controller.runtime_spec import command_line, container_arguments, environment, expand, setup_arguments
from hypervisor.controller.sizing import (
    CONTAINER_MEMORY,
    DEFAULT_DISK,
    FILE_SYSTEM,
    GUEST_OVERHEAD,
    MAX_IMPLIED_DISK,
    MIB,
    VmSize,
    vm_size,
)
from hypervisor.controller.static_pods import StaticPods
from hypervisor.errors import Conflict, InvalidInput
from hypervisor.images.model import Image, ImageConfig

# ---- files -----------------------------------------------------------------------------------------------------------


def test_state_directory_is_chosen_in_this_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HV_STATE_DIR", "/env")
    assert state_directory("/given").root == Path("/given")
    assert state_directory().root == Path("/env")


def test_long_state_directory_is_refused() -> None:
    assert state_directory("/" + "x" * (MAX_STATE_DIR - 1))
    with pytest.raises(InvalidInput, match="choose a shorter one with --state-dir"):
        state_directory("/" + "x" * MAX_STATE_DIR)


def test_token_is_private_and_lasts(tmp_path: Path) -> None:
    paths = HostPaths(tmp_path / "s")
    prepare(paths)
    first = token(paths)
    assert stat.S_IMODE(paths.token.stat().st_mode) == 0o600
    assert token(paths) == first
    paths.token.chmod(0o644)
    assert token(paths) != first  # others may have read it


def test_second_daemon_is_refused_with_the_firsts_pid(tmp_path: Path) -> None:
    paths = HostPaths(tmp_path)
    with only_daemon(paths), pytest.raises(Conflict, match=f"process {os.getpid()}"), only_daemon(paths):
        pass
    with only_daemon(paths):
        pass


def test_announcement_comes_and_goes(tmp_path: Path) -> None:
    paths = HostPaths(tmp_path)
    announce(paths, "127.0.0.1", 4)
    assert json.loads(paths.host.read_text())["port"] == 4
    withdraw(paths)
    assert not paths.host.exists()
    paths.host.write_text('{"pid": 1}')
    withdraw(paths)
    assert paths.host.exists()


# ---- static pods -----------------------------------------------------------------------------------------------------


async def test_static_pods_follow_the_folder(bench: Bench) -> None:
    static = StaticPods(bench.paths.manifests, bench.pods)
    file = bench.paths.manifests / "a.json"
    file.write_text(json.dumps(manifest("a")))
    await static.look()
    assert list(bench.pods) == []  # it may still be being written
    await static.look()
    pod = bench.pods.get("default", "a")
    await static.look()
    assert bench.pods.get("default", "a") is pod
    file.write_text(json.dumps(manifest("a", "Always")))
    await static.look()
    await static.look()
    await asyncio.wait_for(pod.gone.wait(), 5)
    await static.look()
    changed = bench.pods.get("default", "a")
    assert changed.pod.restart_policy == "Always"
    file.unlink()
    await static.look()
    await asyncio.wait_for(changed.gone.wait(), 5)


async def test_broken_static_pod_is_reported_until_it_is_mended(bench: Bench) -> None:
    static = StaticPods(bench.paths.manifests, bench.pods)
    file = bench.paths.manifests / "a.yaml"
    (bench.paths.manifests / ".hidden.yaml").write_text("[")
    (bench.paths.manifests / "notes.txt").write_text("[")
    file.write_text("kind: Pod\napiVersion: v1\nmetadata: {name: a}\nspec: {containers: [{name: c}]}\n")
    for _ in range(3):
        await static.look()
    assert static.broken == {"a.yaml": "spec.containers[0].image: required, and missing"}
    file.write_text(json.dumps(manifest("a")))
    await static.look()
    await static.look()
    assert static.broken == {}
    assert bench.pods.get("default", "a").stored.static_file == "a.yaml"


# ---- what containers are given ---------------------------------------------------------------------------------------


def spec_of(**container: Any) -> Any:
    return parse_pod(manifest(containers=[{"name": "c", "image": "x"} | container]))


def image(**config: Any) -> Image:
    return Image("ab" * 32, ("x",), "", Path("/x"), 1, "", ImageConfig(**config))


@pytest.mark.parametrize(
    ("given_command", "given_args", "result"),
    [
        (None, None, ["entry", "cmd"]),
        (None, ["a"], ["entry", "a"]),
        (["b"], None, ["b"]),
        (["b"], ["a"], ["b", "a"]),
    ],
)
def test_command_and_args_against_the_images(given_command: Any, given_args: Any, result: list[str]) -> None:
    pod = spec_of(command=given_command, args=given_args)
    config = ImageConfig(entrypoint=("entry",), cmd=("cmd",))
    assert command_line(pod.containers[0], config, {}) == result


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("$(A)", "1"),
        ("$$(A)", "$(A)"),
        ("$(B)", "$(B)"),
        ("a$", "a$"),
        ("$(A", "$(A"),
        ("$A", "$A"),
        ("$(A)$(A)", "11"),
    ],
)
def test_expansion(text: str, result: str) -> None:
    assert expand(text, {"A": "1"}) == result


@given(st.text(alphabet="ab()$", max_size=30))
def test_expansion_leaves_text_without_variables_alone(text: str) -> None:
    assert expand(text.replace("$", ""), {}) == text.replace("$", "")


def test_variables_refer_to_earlier_ones_and_to_fields() -> None:
    env = [
        {"name": "A", "value": "x"},
        {"name": "B", "value": "$(A)$(C)"},
        {"name": "C", "value": "z"},
        {"name": "N", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        {"name": "I", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
    ]
    pod = spec_of(env=env)
    found = environment(pod.containers[0], pod, "uid")
    assert found == {"A": "x", "B": "x$(C)", "C": "z", "N": "p", "I": "10.0.2.15"}


def test_arguments_for_the_agent() -> None:
    limits = {"limits": {"cpu": "500m", "memory": "64Mi"}, "requests": {"cpu": "250m"}}
    pod = spec_of(resources=limits, env=[{"name": "PATH", "value": "/mine"}], securityContext={"runAsUser": 7})
    found = container_arguments(
        pod.containers[0], pod, "u", image(cmd=("sh",), env=("IMG=1", "PATH=/img"), user="nobody")
    )
    assert found["image_disk"] == "img-abababababab"
    assert found["env"] == ["PATH=/mine", "HOSTNAME=p", "IMG=1"]
    assert found["user"] == "7"
    assert found["resources"] == {"memory_bytes": 64 * MIB, "cpu_quota_us_per_100ms": 50_000, "cpu_shares": 256}


@pytest.mark.parametrize(
    ("context", "user", "result"),
    [
        ({}, "", "0"),
        ({}, "app:staff", "app:staff"),
        ({"runAsUser": 1, "runAsGroup": 2}, "app", "1:2"),
        ({"runAsNonRoot": True}, "1000", "1000"),
    ],
)
def test_user(context: dict[str, Any], user: str, result: Any) -> None:
    pod = spec_of(securityContext=context)
    assert container_arguments(pod.containers[0], pod, "u", image(cmd=("sh",), user=user))["user"] == result


@pytest.mark.parametrize(
    ("context", "user", "result"),
    [
        ({"runAsUser": 1, "supplementalGroups": [7], "fsGroup": 8}, "app", {"name": "1", "groups": [7, 8]}),
        ({"fsGroup": 8}, "app:staff", {"name": "app:staff", "groups": [8]}),
    ],
)
def test_groups_of_the_pod_come_beside_the_users_own(context: dict[str, Any], user: str, result: Any) -> None:
    pod = parse_pod(manifest(securityContext=context))
    assert container_arguments(pod.containers[0], pod, "u", image(cmd=("sh",), user=user))["user"] == result
    volumes = parse_pod(manifest(securityContext=context, volumes=[{"name": "v", "emptyDir": {}}]))
    assert setup_arguments(volumes)["volumes"][0]["group"] == 8


@pytest.mark.parametrize(
    ("user", "message"), [("", "runs as root"), ("0:5", "runs as root"), ("app", "is the name 'app'")]
)
def test_run_as_non_root_is_checked_against_the_image(user: str, message: str) -> None:
    pod = spec_of(securityContext={"runAsNonRoot": True})
    with pytest.raises(InvalidInput, match=message):
        container_arguments(pod.containers[0], pod, "u", image(cmd=("sh",), user=user))


def test_setup_is_fresh_each_time() -> None:
    pod = spec_of()
    one, two = setup_arguments(pod), setup_arguments(pod)
    assert one["entropy"] != two["entropy"]
    assert one["net"]["address"] == "10.0.2.15/24"
    quiet = parse_pod(manifest() | {"metadata": {"name": "p", "annotations": {"podvisor.dev/net": "none"}}})
    assert setup_arguments(quiet)["net"] is None


# ---- sizes and delays ------------------------------------------------------------------------------------------------


def test_vm_size_adds_up() -> None:
    pod = parse_pod(
        manifest(
            containers=[
                {"name": "a", "image": "x", "resources": {"limits": {"memory": "64Mi", "cpu": "1100m"}}},
                {"name": "b", "image": "x"},
            ],
            initContainers=[{"name": "i", "image": "x", "resources": {"limits": {"memory": "1Gi"}}}],
        )
    )
    size = vm_size(pod, host_cpus=8)
    assert size.vcpus == 2
    assert size.memory_bytes == 1024 * MIB + GUEST_OVERHEAD
    assert vm_size(parse_pod(manifest()), host_cpus=8).memory_bytes == CONTAINER_MEMORY + GUEST_OVERHEAD


def test_sizes_that_cannot_be() -> None:
    many = {"resources": {"requests": {"cpu": "9"}}}
    with pytest.raises(InvalidInput, match="this host has 2000m"):
        vm_size(spec_of(**many), host_cpus=2)
    assert vm_size(spec_of(resources={"limits": {"cpu": 64}}), host_cpus=2).vcpus == 2
    small = manifest() | {"metadata": {"name": "p", "annotations": {"podvisor.dev/disk-size": "1Mi"}}}
    with pytest.raises(InvalidInput, match="needs 16Mi at least"):
        vm_size(parse_pod(small))


def test_a_disk_holds_what_limits_promise() -> None:
    assert vm_size(spec_of()) == VmSize(1, CONTAINER_MEMORY + GUEST_OVERHEAD, DEFAULT_DISK)
    limited = vm_size(spec_of(resources={"limits": {"ephemeral-storage": "64Mi"}}))
    assert limited.quotas and limited.disk_bytes == (64 + 2) * MIB + FILE_SYSTEM
    volumes = [{"name": "v", "emptyDir": {"sizeLimit": "1Ei"}}, {"name": "m", "emptyDir": {"medium": "Memory"}}]
    assert vm_size(parse_pod(manifest(volumes=volumes))).disk_bytes == MAX_IMPLIED_DISK
    assert not vm_size(parse_pod(manifest(volumes=volumes[1:]))).quotas


def test_back_off_is_kubernetes() -> None:
    policy = BackoffPolicy()
    delays: list[float | None] = [None]
    for _ in range(8):
        delays.append(policy.next(delays[-1], ran_s=1))
    assert delays[1:] == [0, 10, 20, 40, 80, 160, 300, 300]
    assert policy.next(300, ran_s=600) == 0


@pytest.mark.parametrize(
    ("resources", "result"),
    [
        ({}, "BestEffort"),
        ({"limits": {"memory": "64Mi"}}, "Burstable"),
        ({"requests": {"cpu": 1}}, "Burstable"),
        ({"limits": {"memory": "64Mi", "cpu": 1}}, "Guaranteed"),
        ({"limits": {"memory": "64Mi", "cpu": 1}, "requests": {"memory": "32Mi"}}, "Burstable"),
    ],
)
def test_qos_class(resources: dict[str, Any], result: str) -> None:
    assert qos_class(spec_of(resources=resources)) == result
