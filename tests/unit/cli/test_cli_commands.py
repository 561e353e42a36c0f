"""The other commands against the stand-in: what they ask for, what they print, how they fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from hostd_standin import ROOT, Hv, StandIn
from hypothesis import given
from hypothesis import strategies as st

from hypervisor.cli import app, host, image, main, manual, output, pods, ps, starter, top, version
from hypervisor.cli.logs import since_query
from hypervisor.errors import InvalidInput, VmFailed

# ---- ps, top, version ------------------------------------------------------------------------------------------------


def test_ps(hv: Hv, host: StandIn) -> None:
    host.add_pod("another", phase="Failed", reason="VmFailed", containerStatuses=[])
    lines = hv("ps").stdout.splitlines()
    assert [line.split() for line in lines] == [
        ["NAME", "STATUS", "RESTARTS", "AGE", "IMAGE"],
        ["another", "VmFailed", "0", lines[1].split()[3], "busybox,", "web"],
        ["hello", "Running", "0", lines[2].split()[3], "busybox,", "web"],
    ]
    assert lines[1].index("VmFailed") == lines[2].index("Running")
    assert hv("ps", "-o", "name").stdout == "another\nhello\n"
    assert [p["metadata"]["name"] for p in json.loads(hv("ps", "-o", "json").stdout)["items"]] == ["hello", "another"]
    assert yaml.safe_load(hv("ps", "-o", "yaml").stdout)["kind"] == "PodList"
    assert "CONTAINERS" in hv("ps", "-o", "wide").stdout


def test_reader_that_stops_reading(hv: Hv, environment: dict[str, str]) -> None:
    script = f"{sys.executable} -m hypervisor.cli.main ps | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, check=False)
    assert done.stderr == b""
    assert done.returncode in (0, 141)


def ended(code: int, reason: str) -> dict[str, Any]:
    return {"containerStatuses": [{"state": {"terminated": {"exitCode": code, "reason": reason}}}]}


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ({}, "Unknown"),
        ({"phase": "Pending"}, "Pending"),
        ({"phase": "Failed", "reason": "VmFailed"}, "VmFailed"),
        ({"containerStatuses": [{"state": {"waiting": {"reason": "ImagePullBackOff"}}}]}, "ImagePullBackOff"),
        (ended(0, "Completed"), "Exited (0)"),
        (ended(7, "Error"), "Exited (7)"),
        (ended(137, "OOMKilled"), "OOMKilled (137)"),
    ],
)
def test_status_words(status: dict[str, Any], expected: str) -> None:
    pod = {"metadata": {"name": "a"}, "spec": {"containers": [{"name": "a"}]}, "status": status}
    assert pods.describe(pod) == expected


def test_top(hv: Hv, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line.split() for line in hv("top").stdout.splitlines()]
    assert lines[1:] == [
        ["hello", "(VM)", "1.50s", "200Mi", "-", "-", "-", "-", "-"],
        ["hello", "main", "0.02s", "3.0Mi", "4.0Mi", "2", "4.0Ki", "-", "-"],
    ]
    assert json.loads(hv("top", "-o", "json").stdout)["pods"][0]["name"] == "hello"
    top.print_top({"pods": [{"name": "x", "namespace": "n", "vm": None, "containers": None}]}, "table")
    assert "n/x" in capsys.readouterr().out


def test_version(hv: Hv, capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads(hv("version", "-o", "json").stdout)["hostd"]["version"] == "0.1.0"
    version.print_version({"hv": "1", "python": "3", "hostd": None}, "table")
    assert capsys.readouterr().out.endswith("hostd    not running\n")


# ---- logs, console ---------------------------------------------------------------------------------------------------


def test_logs_asks_as_the_kubelet_is_asked(hv: Hv) -> None:
    done = hv("logs", "-f", "--tail", "5", "--since", "5m", "--previous", "--timestamps", "hello")
    path, _, query = done.stdout.partition("?")
    assert path == "/containerLogs/default/hello/main"
    assert query == "follow=true&previous=true&timestamps=true&tailLines=5&sinceSeconds=300"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", ("sinceSeconds", "90")),
        ("90s", ("sinceSeconds", "90")),
        ("1h30m", ("sinceSeconds", "5400")),
        ("0.5m", ("sinceSeconds", "30")),
        ("0s", ("sinceSeconds", "1")),
        ("2d", ("sinceSeconds", "172800")),
        ("2026-01-31T12:00:00+00:00", ("sinceTime", "2026-01-31T12:00:00+00:00")),
    ],
)
def test_since(text: str, expected: tuple[str, str]) -> None:
    assert since_query(text) == expected


@pytest.mark.parametrize("text", ["", "m", "5x", "5m3", "-5m", "yesterday"])
def test_bad_since(text: str) -> None:
    with pytest.raises(click.BadParameter, match="no duration"):
        since_query(text)


def test_console_that_is_empty_says_why(hv: Hv, host: StandIn) -> None:
    host.console = ""
    done = hv("console", "hello")
    assert (done.stdout, done.returncode) == ("", 0)
    assert "cloned from a template" in done.stderr


def test_ps_names_an_image_once() -> None:
    pod = {"metadata": {"name": "a"}, "spec": {"containers": [{"image": "web"}, {"image": "web"}, {"image": "b"}]}}
    assert ps._row(pod, wide=False)[-1] == "web, b"


def test_summaries_fit_the_terminal() -> None:
    for group in (image.image, host.host):
        for command in group.commands.values():
            assert not command.get_short_help_str(limit=66).endswith("..."), command.name


def test_a_state_folder_that_is_too_long_is_not_made(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 120)
    with pytest.raises(InvalidInput, match="at most"):
        starter.start_host(str(folder), None)
    assert not folder.exists()


def test_a_failure_of_a_vm_is_a_line_and_what_was_said_last_below_it(capsys: pytest.CaptureFixture[str]) -> None:
    error = VmFailed(
        "pod a cannot run: VmFailed: VM a: the guest panicked\nthe guest's console said last:\none\n\x1btwo"
    )
    assert main._report(error, ["run"]) == 125
    lines = ["hv: pod a cannot run: VmFailed: VM a: the guest panicked"]
    lines += ["    the guest's console said last:", "    one", "     two"]
    assert capsys.readouterr().err.splitlines() == lines
    main._report(VmFailed("no agent within 9 s; last of the console: one | two"), ["run"])
    lines = ["hv: no agent within 9 s", "    last of the console:", "    one", "    two"]
    assert capsys.readouterr().err.splitlines() == lines


def test_console(hv: Hv) -> None:
    assert hv("console", "-n", "3", "hello").stdout == "Linux booted tail=3\n"
    assert hv("console", "-f", "hello").stdout == "Linux booted follow=1\n"


# ---- stop, rm --------------------------------------------------------------------------------------------------------


def test_stop_and_rm(hv: Hv, host: StandIn) -> None:
    assert hv("stop", "-t", "3", "hello").stdout == "hello\n"
    assert host.requests[-1] == ("POST", "/hv/v1/pods/default/hello/stop?gracePeriodSeconds=3")
    refused = hv("rm", "hello")
    assert (refused.returncode, refused.stderr) == (1, "hv: pod hello is running; run: hv stop hello, or add --force\n")
    assert hv("rm", "-f", "hello").returncode == 0
    assert host.requests[-1] == ("DELETE", "/hv/v1/pods/default/hello?gracePeriodSeconds=0&wait=1")
    assert not host.pods


def test_one_failure_does_not_stop_the_others(hv: Hv, host: StandIn) -> None:
    done = hv("rm", "-f", "nothere", "hello")
    assert (done.stdout, done.returncode) == ("hello\n", 1)
    assert "no pod nothere" in done.stderr


# ---- apply -----------------------------------------------------------------------------------------------------------

POD = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": {"containers": [{"name": "c"}]}}
POD["spec"]["containers"][0] |= {"image": "busybox", "command": ["true"]}  # type: ignore[index]


def test_apply(hv: Hv, host: StandIn, tmp_path: Path) -> None:
    (tmp_path / "pods.yaml").write_text(yaml.safe_dump_all([POD, None, POD | {"metadata": {"name": "b"}}]))
    assert hv("apply", "-f", "pods.yaml").stdout == "pod/a created\npod/b created\n"
    assert hv("apply", "-f", "pods.yaml").stdout == "pod/a unchanged\npod/b unchanged\n"
    changed = POD | {"spec": {**POD["spec"], "hostname": "h"}}  # type: ignore[dict-item]
    done = hv("apply", "-f", "-", input=json.dumps(changed))
    assert done.returncode == 1
    assert done.stderr == "hv: pod a exists and is not what this manifest says; run: hv rm --force a\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not YAML"),
        ("- 1", "must be a mapping"),
        ("kind: Service", "document 1 is a Service"),
        ("kind: Pod", "document 1 has no metadata.name"),
        ("", "no manifest in"),
    ],
)
def test_apply_refuses_before_anything_is_started(hv: Hv, host: StandIn, text: str, message: str) -> None:
    done = hv("apply", "-f", "-", input=text)
    assert done.returncode == 1
    assert message in done.stderr
    assert list(host.pods) == ["hello"]


def test_apply_of_a_file_that_is_not_there(hv: Hv) -> None:
    assert hv("apply", "-f", "nothere").stderr == "hv: nothere: cannot read it: No such file or directory\n"


# ---- images ----------------------------------------------------------------------------------------------------------


def test_images(hv: Hv, host: StandIn) -> None:
    names = ["docker.io/library/b:latest", "localhost/podvisor/b:latest"]
    host.images = [
        {"id": "ab" * 32, "names": names, "digest": "sha256:x", "size_bytes": 5 << 20, "created": None},
        {"id": "cd" * 32, "names": [], "digest": "", "size_bytes": 1, "created": "2026-01-01T00:00:00Z"},
    ]
    rows = [line.split() for line in hv("image", "ls").stdout.splitlines()]
    assert [row[:3] for row in rows[1:]] == [
        ["(none)", "cdcdcdcdcdcd", "1B"],
        [names[0], "abababababab", "5.0Mi"],
        [names[1], "abababababab", "5.0Mi"],
    ]
    assert hv("image", "ls", "-o", "name").stdout.splitlines() == ["cd" * 32, *names]
    assert "sha256:x" in hv("image", "ls", "-o", "wide").stdout


def test_pull_and_import(hv: Hv, tmp_path: Path) -> None:
    done = hv("image", "pull", "busybox")
    assert (done.stdout, done.stderr) == ("docker.io/library/busybox:latest\n", "hv: busybox: download (2.0Ki)\n")
    done = hv("image", "pull", "missing")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, "hv: image missing: not found")
    (tmp_path / "x.tar").write_text("")
    assert hv("image", "import", "x.tar").stdout == "docker.io/library/x.tar:latest\n"
    assert hv("image", "import", "y.tar").stderr == "hv: there is no file y.tar\n"


def test_remove_and_prune(hv: Hv) -> None:
    done = hv("image", "rm", "used", "busybox")
    assert (done.stdout, done.returncode) == ("busybox\n", 1)
    assert done.stderr == "hv: image used is in use by pod web\n"
    assert hv("image", "prune").stdout == "docker.io/library/old:latest\n"
    assert json.loads(hv("image", "prune", "-o", "json").stdout)["removed"]


def test_pruned_images_by_name_or_id(capsys: pytest.CaptureFixture[str]) -> None:
    image.print_pruned({"removed": [{"id": "x", "names": []}, {"id": "y", "names": ["a", "b"]}]}, "table")
    assert capsys.readouterr().out == "x\na, b\n"


def test_login_wants_a_terminal_or_a_pipe(hv: Hv) -> None:
    done = hv("image", "login", "registry.example")
    assert done.returncode == 1
    assert "skopeo" in done.stderr or "--password-stdin" in done.stderr


# ---- host ------------------------------------------------------------------------------------------------------------


def test_host_status(hv: Hv, host: StandIn, environment: dict[str, str]) -> None:
    found = json.loads(hv("host", "status", "-o", "json").stdout)
    assert (found["running"], found["pods"]) == (True, 1)
    done = hv("--state-dir", "/nowhere/x", "host", "status")
    assert done.returncode == 1
    assert "no" in done.stdout


def test_stop_of_a_host_that_does_not_run(hv: Hv, tmp_path: Path) -> None:
    for args in ((), ("--pods",)):
        done = hv("--state-dir", str(tmp_path / "empty"), "host", "stop", *args)
        assert (done.stdout, done.returncode) == ("hostd does not run\n", 0)
    assert not (tmp_path / "empty").exists()


def test_status_table(capsys: pytest.CaptureFixture[str]) -> None:
    host.print_status({"running": False, "state": "/s"}, "table")
    assert capsys.readouterr().out == "WHAT      VALUE\nrunning   no\nstate     /s\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is damaged"), ("[]", "is damaged"), ('{"address": "127.0.0.1"}', "is damaged")],
)
def test_damaged_state(hv: Hv, host: StandIn, content: str, message: str) -> None:
    (host.state / "host.json").write_text(content)
    done = hv("ps")
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_state_folder_that_cannot_be_made(hv: Hv) -> None:
    done = hv("--state-dir", "/proc/nothing", "ps")
    assert done.returncode == 1
    assert "cannot use the state folder /proc/nothing" in done.stderr


def test_wrong_token(hv: Hv, host: StandIn) -> None:
    (host.state / "token").write_text("other")
    assert "hostd refused the token" in hv("ps").stderr


# ---- completion ------------------------------------------------------------------------------------------------------


def complete(hv: Hv, line: str) -> list[str]:
    words = line.split()
    at = len(words) - (not line.endswith(" "))
    env = {"_HV_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(at)}
    return [x.partition(",")[2] for x in hv(env=env).stdout.splitlines() if x]


def test_completion(hv: Hv, host: StandIn) -> None:
    host.add_pod("help")
    host.images = [{"names": ["localhost/podvisor/python:latest"]}]
    assert complete(hv, "hv ho") == ["hostd", "host"]
    assert complete(hv, "hv exec h") == ["hello", "help"]
    assert complete(hv, "hv rm hello ") == ["help"]
    assert complete(hv, "hv logs hello -c ") == ["main", "side"]
    assert complete(hv, "hv run py") == ["python"]
    assert complete(hv, "hv image ") == ["import", "login", "ls", "prune", "pull", "rm"]
    assert "--memory" in complete(hv, "hv run --m")


def test_completion_starts_no_daemon(hv: Hv, tmp_path: Path) -> None:
    assert complete(hv, f"hv --state-dir {tmp_path}/none exec ") == []
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_code(hv: Hv, shell: str) -> None:
    code = hv("completion", shell).stdout
    assert f"_HV_COMPLETE={shell}_complete" in code
    if shell == "bash":
        assert subprocess.run(["bash", "-n"], input=code, text=True, check=False).returncode == 0


# ---- help ------------------------------------------------------------------------------------------------------------


def test_the_page_is_what_the_commands_say() -> None:
    page = (ROOT / "docs/cli.md").read_text()
    assert page == manual.manual(), "run: python -m hypervisor.cli.manual > docs/cli.md"


def test_short_help_in_the_table_is_the_commands_own() -> None:
    context = click.Context(app.cli)
    for name, (_, _, short) in app.COMMANDS.items():
        command = app.cli.get_command(context, name)
        assert command is not None
        assert (command.help or "").partition("\n")[0] == short, name
        assert command.name == name


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("nope",), 2, "hv: No such command 'nope'; see: hv --help\n"),
        (("ps", "--nope"), 2, "hv: No such option '--nope'; see: hv ps --help\n"),
        (("logs", "hello", "--tail", "x"), 2, "see: hv logs --help\n"),
        (("image", "nope"), 2, "see: hv image --help\n"),
    ],
)
def test_wrong_usage(hv: Hv, args: tuple[str, ...], code: int, message: str) -> None:
    done = hv(*args)
    assert done.returncode == code
    assert done.stderr.endswith(message)
    assert done.stderr.startswith("hv: ")


def test_debug_shows_where(hv: Hv) -> None:
    assert "Traceback" in hv("logs", "nothere", env={"HV_DEBUG": "1"}).stderr


# ---- what tables are made of -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(-5, "0s"), (45, "45s"), (119, "119s"), (120, "2m"), (190, "3m10s"), (3600, "1h"), (3700, "1h1m"),
     (50 * 3600, "2d2h"), (30 * 86400, "30d"), (11 * 3600 + 60, "11h")],
)  # fmt: skip
def test_age(seconds: float, expected: str) -> None:
    assert output.age(seconds) == expected


def test_age_since() -> None:
    assert output.age_since("1970-01-01T00:00:10Z", now=15) == "5s"
    assert (output.age_since(None), output.age_since("x")) == ("-", "?")


@pytest.mark.parametrize(
    ("count", "expected"),
    [(None, "-"), (0, "0B"), (1023, "1023B"), (1536, "1.5Ki"), (12 << 30, "12Gi"), (1 << 41, "2.0Ti")],
)
def test_size(count: int | None, expected: str) -> None:
    assert output.size(count) == expected


@given(st.lists(st.lists(st.text(), min_size=2, max_size=2)))
def test_tables_have_a_line_a_row(rows: list[list[str]]) -> None:
    """Control characters in what a pod is called or says never reach the terminal."""
    text = output.table(("A", "B"), rows)
    assert len(text.split("\n")) == len(rows) + 1
    assert all(c.isprintable() for c in text.replace("\n", ""))


def test_top_of_disks(capsys: pytest.CaptureFixture[str]) -> None:
    disk = {"name": "scratch", "served_by": "vmx", "requests": 12, "read_bytes": 2**20, "written_bytes": 0}
    disk |= {"redirects": 3, "errors": 0, "latency_ns": 1_500_000, "latency_p99_ns": None, "filters": ["stats", "null"]}
    own = {"name": "debian", "requests": 7}
    top.print_disks({"pods": [{"name": "web", "vm": {"disks": [disk]}}], "disks": [own]}, "table")
    header, of_pod, of_host = capsys.readouterr().out.splitlines()
    assert header.split()[:2] == ["POD", "DISK"]
    assert of_pod.split()[:5] == ["web", "scratch", "vmx", "12", "1.0Mi"] and of_pod.split()[-1] == "stats,null"
    assert "1.50ms" in of_pod
    assert of_host.split()[:4] == ["(host)", "debian", "itself", "7"]


def test_top_shows_the_warm_pool(capsys: pytest.CaptureFixture[str]) -> None:
    top.print_top({"pods": [], "host": {"pool": {"wanted": 2, "ready": 1, "memory_bytes": 2**20}}}, "table")
    assert capsys.readouterr().out.splitlines()[-1].split()[:7] == ["(warm", "pool)", "1", "of", "2", "VMs", "ready"]
