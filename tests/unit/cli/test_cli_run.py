"""hv run and hv attach: real processes of hv against the stand-in."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hostd_standin import HV, Hv, StandIn

from hypervisor.cli import podspec, run
from hypervisor.cli.podspec import RunOptions, build_pod
from hypervisor.errors import InvalidInput

# ---- the manifest ----------------------------------------------------------------------------------------------------


def test_smallest_manifest() -> None:
    container = {"name": "a", "image": "busybox", "imagePullPolicy": "IfNotPresent"}
    spec = {"restartPolicy": "Never", "containers": [container]}
    assert build_pod(RunOptions(image="busybox", name="a")) == {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "a"},
        "spec": spec,
    }


def test_stdin_ends_with_the_first_client_only_where_it_is_a_pipe_of_ours(hv: Hv, host: StandIn) -> None:
    """With a terminal, or in the background, one can leave and come back."""
    for flags, once in ((["-i"], True), (["-di"], False), (["-dit"], False)):
        name = "once" + "".join(flags).replace("-", "")
        hv("run", *flags, "--name", name, "busybox", "true")
        pods = json.loads(hv("ps", "-o", "json").stdout)["items"]
        container = next(p for p in pods if p["metadata"]["name"] == name)["spec"]["containers"][0]
        assert (container["stdin"], container.get("stdinOnce", False)) == (True, once)


def test_every_option(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MINE", "own")
    monkeypatch.delenv("NOTHERE", raising=False)
    file = tmp_path / "env"
    file.write_text("# a comment\n\nA=from file\nB=b=c\nMINE\n")
    pod = build_pod(
        RunOptions(
            image="web:1",
            name="a.b",
            command=["x", "-y"],
            entrypoint="/bin/z",
            stdin=True,
            stdin_once=True,
            tty=True,
            memory="128Mi",
            cpus="0.5",
            env=["A=1", "MINE", "NOTHERE", "E="],
            env_files=[str(file)],
            net="none",
            disk_size="1Gi",
            pull="never",
            volumes=["data:/d", "fast:/f:ro,memory", "data:/again"],
            workdir="/w",
            user="1000:100",
            hostname="h",
            read_only=True,
            restart="on-failure",
            labels=["k=v"],
        )
    )
    assert pod["metadata"] == {"name": "a.b", "labels": {"k": "v"}, "annotations": {"podvisor.dev/net": "none"}}
    assert pod["spec"] == {
        "restartPolicy": "OnFailure",
        "hostname": "h",
        "volumes": [{"name": "data", "emptyDir": {}}, {"name": "fast", "emptyDir": {"medium": "Memory"}}],
        "containers": [
            {
                "name": "a-b",
                "image": "web:1",
                "imagePullPolicy": "Never",
                "command": ["/bin/z"],
                "args": ["x", "-y"],
                "env": [
                    {"name": "A", "value": "1"},
                    {"name": "B", "value": "b=c"},
                    {"name": "MINE", "value": "own"},
                    {"name": "E", "value": ""},
                ],
                "workingDir": "/w",
                "resources": {"limits": {"memory": "128Mi", "cpu": "0.5", "ephemeral-storage": "1Gi"}},
                "volumeMounts": [
                    {"name": "data", "mountPath": "/d"},
                    {"name": "fast", "mountPath": "/f", "readOnly": True},
                    {"name": "data", "mountPath": "/again"},
                ],
                "securityContext": {"readOnlyRootFilesystem": True, "runAsUser": 1000, "runAsGroup": 100},
                "stdin": True,
                "stdinOnce": True,
                "tty": True,
            }
        ],
    }


def test_hostd_takes_the_manifest() -> None:
    """The controller's own parser is the judge."""
    from hypervisor.controller.manifest import parse_pod

    options = RunOptions(
        image="web", name="a", command=["x"], stdin=True, memory="1Gi", cpus="2", volumes=["v:/v:ro"], user="1:2",
        net="none", disk_size="2Gi", env=["A=b"], labels=["a=b"], hostname="h", read_only=True, workdir="/",
    )  # fmt: skip
    spec = parse_pod(build_pod(options))
    assert (spec.network.mode, spec.containers[0].args, spec.restart_policy) == ("none", ("x",), "Never")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"user": "root"}, "--user: 'root' is no UID"),
        ({"user": "1:wheel"}, "--user"),
        ({"volumes": ["/host:/path"]}, "not shared with a pod VM"),
        ({"volumes": ["name"]}, "--volume: 'name' is no NAME:/PATH"),
        ({"volumes": ["name:relative"]}, "--volume"),
        ({"volumes": ["name:/p:exec"]}, "--volume"),
        ({"volumes": ["name:/p:fast"]}, "NAME:/PATH:ro or NAME:/PATH:memory"),
        ({"env": ["=x"]}, "--env: '=x' is no NAME=VALUE"),
        ({"env": ["1 A=1"]}, "--env: '1 A=1' is no NAME=VALUE"),
        ({"env_files": ["/nowhere"]}, "--env-file: cannot read /nowhere: No such file"),
        ({"labels": ["x"]}, "--label: 'x' is no KEY=VALUE"),
    ],
)
def test_options_that_no_manifest_can_say(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        build_pod(RunOptions(image="a", name="a", **given))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--name", "Bad_Name"], "hv: --name: 'Bad_Name' is no DNS name"),
        (["--memory", "12x"], "hv: --memory: '12x' has the unknown unit 'x'"),
        (["--cpus", "many"], "hv: --cpus: 'many' is no quantity"),
        (["--disk-size", "-1"], "hv: --disk-size: '-1' is negative"),
        (["-v", "/here:/there"], "hv: --volume: '/here:/there': folders of this machine"),
        (["-u", "root"], "hv: --user: 'root' is no UID"),
        (["--env-file", "/nowhere"], "hv: --env-file: cannot read /nowhere"),
    ],
)
def test_a_wrong_option_is_named_before_anything_is_done(hv: Hv, host: StandIn, given: list[str], message: str) -> None:
    done = hv("run", *given, "busybox")
    assert (done.returncode, done.stdout, host.requests) == (2, "", [])
    assert done.stderr.startswith(message) and done.stderr.endswith("; see: hv run --help\n")


@pytest.mark.parametrize(
    ("option", "flag"),
    [
        ({"name": "Bad_Name"}, "--name"),
        ({"memory": "1"}, "--memory"),
        ({"cpus": "0"}, "--cpus"),
        ({"disk_size": "1x"}, "--disk-size"),
        ({"hostname": "A_b"}, "--hostname"),
        ({"labels": ["a b=c"]}, "--label"),
        ({"volumes": ["A_b:/x"]}, "--volume"),
        ({"workdir": "relative"}, "--workdir"),
    ],
)
def test_what_hostd_refuses_is_told_in_terms_of_options(option: dict[str, Any], flag: str) -> None:
    from hypervisor.controller.manifest import parse_pod

    with pytest.raises(InvalidInput) as refused:
        parse_pod(build_pod(RunOptions(**{"image": "a", "name": "a", **option})))
    said = podspec.in_terms_of_flags(str(refused.value))
    assert said is not None and said.startswith(f"{flag}: ")


def test_an_image_that_cannot_be_pulled_comes_from_a_file(
    hv: Hv, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert "hv image import FILE" in hv("run", "missing").stderr
    samples = tmp_path / "guest-images/out/samples"
    samples.mkdir(parents=True)
    (samples / "busybox.tar").touch()
    monkeypatch.setattr(run, "__file__", str(tmp_path / "hypervisor/cli/run.py"))
    monkeypatch.chdir(tmp_path)
    assert run.import_hint("busybox").endswith("hv image import guest-images/out/samples/busybox.tar")
    assert run.import_hint("../busybox").endswith("hv image import FILE")


def test_generated_names_are_labels() -> None:
    from hypervisor.controller.names import dns_label

    assert {dns_label(podspec.generate_name(), where="name") for _ in range(50)}


# ---- running ---------------------------------------------------------------------------------------------------------


def test_streams_and_exit_code(hv: Hv, host: StandIn) -> None:
    done = hv("run", "--rm", "busybox", "--", "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.stdout, done.returncode) == ("out\n", 7)
    assert done.stderr.endswith("err\n")
    assert list(host.pods) == ["hello"]


def test_output_of_a_container_that_is_over_is_not_lost(hv: Hv, host: StandIn) -> None:
    """Its VM is off before hv can attach: the log has what it wrote."""
    host.attach_refused = True
    done = hv("run", "--rm", "busybox", "--", "sh", "-c", "echo out; exit 7")
    assert (done.stdout, done.returncode) == ("out\n", 7)


def test_pull_progress_is_lines_without_a_terminal(hv: Hv) -> None:
    done = hv("run", "--rm", "busybox", "true")
    assert (done.stderr, done.returncode) == ("hv: busybox: download (2.0Ki)\n", 0)


def test_stdin_goes_to_the_container(hv: Hv) -> None:
    done = hv("run", "--rm", "-i", "busybox", "--", "wc", "-c", input="12345")
    assert (done.stdout.strip(), done.returncode) == ("5", 0)


def test_without_rm_the_pod_stays(hv: Hv, host: StandIn) -> None:
    assert hv("run", "--name", "kept", "busybox", "true").returncode == 0
    assert "kept" in host.pods


def test_detached(hv: Hv, host: StandIn) -> None:
    done = hv("run", "-d", "busybox", "--", "sleep", "60")
    assert done.returncode == 0
    assert done.stdout.strip() in host.pods


def test_timing(hv: Hv) -> None:
    done = hv("run", "--rm", "--timing", "--name", "t", "busybox", "true")
    timing = json.loads(done.stderr.splitlines()[-1])
    assert timing["pod"] == "t"
    assert list(timing["hv"]) == ["connect", "image", "create", "start", "run", "remove", "total"]
    assert timing["host"] == {"boot": 1.5}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("missing",), "hv: image missing: not found; to take it from a file: hv image import FILE\n"),
        (("--name", "hello", "busybox"), "hv: pod hello exists\n"),
        (("--rm", "--name", "b", "broken"), "hv: pod b cannot run: CreateContainerError: no such entrypoint\n"),
    ],
)
def test_own_errors(hv: Hv, host: StandIn, args: tuple[str, ...], message: str) -> None:
    done = hv("run", *args)
    assert (done.stdout, done.returncode) == ("", 125)
    assert done.stderr.endswith(message)
    assert "Traceback" not in done.stderr
    assert list(host.pods) == ["hello"]


def test_an_option_that_only_hostd_can_judge(hv: Hv, host: StandIn) -> None:
    done = hv("run", "refused")
    assert (done.stdout, done.returncode) == ("", 2)
    assert done.stderr.endswith("hv: IMAGE: refused here; see: hv run --help\n")


def test_detach_and_rm_exclude_each_other(hv: Hv) -> None:
    done = hv("run", "-d", "--rm", "busybox")
    assert done.returncode == 2
    assert "exclude each other" in done.stderr


def started(environment: dict[str, str], *args: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([*HV, "run", *args], stdout=-1, stderr=-1, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_the_pod(environment: dict[str, str], host: StandIn, number: signal.Signals) -> None:
    """What the container still says arrives, its exit code is hv's, and --rm holds."""
    script = "trap 'echo bye; exit 9' TERM; echo up; while :; do sleep 0.05; done"
    process = started(environment, "--rm", "--name", "a", "busybox", "--", "sh", "-c", script)
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    assert (out, process.returncode) == (b"bye\n", 9)
    assert "a" not in host.pods


def test_reader_of_the_output_goes_away(environment: dict[str, str], host: StandIn) -> None:
    process = started(environment, "--rm", "--name", "a", "busybox", "--", "sh", "-c", "echo up; exec yes")
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(30) == -signal.SIGPIPE
    assert "a" not in host.pods


# ---- attach ----------------------------------------------------------------------------------------------------------


def test_attach(hv: Hv, host: StandIn, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    assert (
        hv("run", "-d", "--name", "a", "busybox", "--", "sh", "-c", f"echo 1; read x < {gate}; exit 5").returncode == 0
    )
    process = subprocess.Popen(
        [*HV, "attach", "--replay", "a"], stdout=-1, env=os.environ | {"HV_STATE_DIR": str(host.state)}
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"1\n"
    gate.write_text("go\n")
    assert process.wait(30) == 5


def test_attach_to_what_is_not_there(hv: Hv) -> None:
    done = hv("attach", "nothere")
    assert (done.stderr, done.returncode) == ("hv: there is no pod nothere; hv ps lists them\n", 125)
    assert "it has main, side" in hv("attach", "-c", "x", "hello").stderr
