"""Commands and a cluster's master: when it is used, and what hostd's routes are called there."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from hypervisor.cli import main, route
from hypervisor.cli.state import pod_reference
from hypervisor.cli.upstream import translated
from hypervisor.errors import InvalidInput, NotFound


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state folder whose cluster has this very process for its master."""
    monkeypatch.delenv(route.LOCAL, raising=False)
    root = tmp_path / "cluster"
    (root / "run").mkdir(parents=True)
    (root / "hosts/host-1").mkdir(parents=True)
    (root / "cluster.json").write_text(json.dumps({"port": 7443}))
    record(root, Path("/proc/self/stat").read_text())
    return tmp_path


def record(root: Path, stat: str) -> None:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    (root / "run/master.pid").write_text(f"{boot}{stat}")


def test_a_master_that_runs_is_found(cluster: Path) -> None:
    found = route.find_cluster(str(cluster))
    assert found is not None
    assert (found.port, found.host("host-1")) == (7443, f"{cluster}/cluster/hosts/host-1")


def test_a_dead_master_or_another_process_with_its_pid_is_not(cluster: Path) -> None:
    stat = Path("/proc/self/stat").read_text()
    words = stat.split()
    words[21] = str(int(words[21]) - 1)  # another start time
    record(cluster / "cluster", " ".join(words))
    assert route.find_cluster(str(cluster)) is None
    record(cluster / "cluster", stat.replace(str(os.getpid()), "4194304", 1))
    assert route.find_cluster(str(cluster)) is None


def test_a_master_that_died_is_told_from_one_that_was_stopped(cluster: Path) -> None:
    assert not route.has_died(str(cluster)), "it runs"
    record(cluster / "cluster", Path("/proc/self/stat").read_text().replace(str(os.getpid()), "4194304", 1))
    assert route.has_died(str(cluster))
    (cluster / "cluster/run/master.pid").unlink()
    assert not route.has_died(str(cluster))


def test_local_leaves_it_aside(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(route.LOCAL, "1")
    assert route.find_cluster(str(cluster)) is None


def test_no_cluster_and_a_damaged_one(cluster: Path, tmp_path: Path) -> None:
    assert route.find_cluster(str(tmp_path / "none")) is None
    (cluster / "cluster/cluster.json").write_text("{")
    with pytest.raises(InvalidInput, match=r"cluster\.json: is damaged"):
        route.find_cluster(str(cluster))


@pytest.mark.parametrize("name", ["host-2", "..", "", "../hosts/host-1"])
def test_a_host_that_is_not_there(cluster: Path, name: str) -> None:
    assert route.host_state(str(cluster), "host-1") == f"{cluster}/cluster/hosts/host-1"
    with pytest.raises(NotFound, match="hv cluster status"):
        route.host_state(str(cluster), name)


def test_the_namespace_that_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(route.NAMESPACE, "team")
    assert pod_reference("web") == ("team", "web")
    assert pod_reference("other/web") == ("other", "web")
    monkeypatch.delenv(route.NAMESPACE)
    assert pod_reference("web") == ("default", "web")


@pytest.mark.parametrize(
    ("parts", "query", "expected"),
    [
        ("hv v1 pods", [], "/api/v1/pods"),
        ("hv v1 pods ns p", [("wait", "1"), ("gracePeriodSeconds", "0")],
         "/api/v1/namespaces/ns/pods/p?gracePeriodSeconds=0"),
        ("exec ns p c", [("input", "1"), ("output", "1"), ("command", "a b")],
         "/api/v1/namespaces/ns/pods/p/exec?container=c&stdin=1&stdout=1&command=a%20b"),
        ("attach ns p c", [("error", "1"), ("replay", "1")],
         "/api/v1/namespaces/ns/pods/p/attach?container=c&stderr=1&replay=1"),
        ("containerLogs ns p c", [("tailLines", "3")],
         "/api/v1/namespaces/ns/pods/p/log?container=c&tailLines=3"),
        ("hv v1 pods ns p archive", [], None),
        ("hv v1 pods ns p stop", [], None),
        ("hv v1 images", [], None),
        ("hv v1 top", [], None),
    ],
)  # fmt: skip
def test_routes(parts: str, query: list[tuple[str, str]], expected: str | None) -> None:
    assert translated(parts.split(), query) == expected


def test_global_options_with_values_are_no_commands() -> None:
    assert main.command_of(["-n", "exec", "--host", "run", "--state-dir", "ps", "logs"]) == "logs"
