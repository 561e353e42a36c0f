"""Parts of ``hv cluster`` and ``hv host drain`` that need no VM."""

from __future__ import annotations

import base64
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from hypervisor.cli import cluster, cluster_down, cluster_up, nodes
from hypervisor.cli.cluster_state import MASTER, ClusterPaths, ClusterSpec, HostSpec, hosts_of
from hypervisor.cli.cluster_token import seconds_of
from hypervisor.cli.cluster_up import Wanted, planned
from hypervisor.errors import Conflict, InvalidInput, NotFound, Timeout
from hypervisor.kube import bootstrap_tokens
from hypervisor.kube.errors import ApiError
from hypervisor.vmx.process import ProcessId


@pytest.fixture
def paths(tmp_path: Path) -> ClusterPaths:
    found = ClusterPaths(tmp_path)
    found.master.mkdir(parents=True)
    return found


def test_what_is_saved_is_loaded(paths: ClusterPaths) -> None:
    spec = ClusterSpec(7000, "sqlite", hosts_of(2))
    paths.save(spec)
    assert paths.load() == spec
    assert paths.spec.stat().st_mode & 0o777 == 0o600
    assert [h.address for h in spec.hosts] == ["127.0.0.2", "127.0.0.3"]


@pytest.mark.parametrize("text", ["", "[]", '{"port": "x"}', '{"port": 1, "store": "sqlite"}'])
def test_a_damaged_file_says_what_to_do(paths: ClusterPaths, text: str) -> None:
    paths.spec.write_text(text)
    with pytest.raises(InvalidInput, match=r"cluster\.json: is damaged .* hv cluster up"):
        paths.load()


def test_no_cluster(paths: ClusterPaths) -> None:
    assert paths.load() is None
    with pytest.raises(NotFound, match="hv cluster up"):
        paths.must_load()


def test_a_cluster_grows_and_does_not_shrink(paths: ClusterPaths) -> None:
    paths.save(planned(paths, Wanted(hosts=2)))
    grown = planned(paths, Wanted(hosts=3))
    assert [h.name for h in grown.hosts] == ["host-1", "host-2", "host-3"]
    assert len(planned(paths, Wanted()).hosts) == 2
    with pytest.raises(InvalidInput, match="hv host rm host-2"):
        planned(paths, Wanted(hosts=1))
    with pytest.raises(InvalidInput, match="--store"):
        planned(paths, Wanted(store="etcd:127.0.0.1:2379"))


def test_a_taken_address_is_left_to_its_owner(paths: ClusterPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = {"127.0.0.2", "127.0.0.4"}
    monkeypatch.setattr(cluster_up, "_is_free", lambda address, _port: address not in taken)
    spec = planned(paths, Wanted(hosts=2))
    assert [h.address for h in spec.hosts] == ["127.0.0.5", "127.0.0.3"]
    paths.save(spec)
    taken.add("127.0.0.3")
    monkeypatch.setattr(ClusterPaths, "process", lambda _self, name: 1 if name == "host-2" else None)
    assert planned(paths, Wanted()).hosts == spec.hosts, "a host that runs holds its address itself"


def test_an_address_that_is_taken_while_the_master_starts(paths: ClusterPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = {"127.0.0.3"}
    monkeypatch.setattr(cluster_up, "_is_free", lambda address, _port: address not in taken)
    spec = ClusterSpec(7000, "sqlite", hosts_of(2))
    starter = cluster_up._Starter(paths, spec, print, 0.0)
    starter._place_again()
    found = paths.load()
    assert found is not None
    assert [h.address for h in found.hosts] == ["127.0.0.2", "127.0.0.4"]
    assert f"--node-address {found.hosts[1].address}" in " ".join(starter._host_arguments(starter._spec.hosts[1]))


def test_a_host_that_runs_and_whose_address_is_anothers_is_moved(
    paths: ClusterPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[str] = []
    own, other = ProcessId.of(os.getpid()), ProcessId.of(os.getppid())
    with socket.create_server(("127.0.0.1", 0)) as mine, socket.create_server(("127.0.0.1", 0)) as taken:
        hosts = tuple(HostSpec(f"host-{n}", *s.getsockname()) for n, s in enumerate((mine, taken), 1))
        at = {"host-1": own, "host-2": other}
        monkeypatch.setattr(ClusterPaths, "process", lambda _self, name: at.get(name))
        monkeypatch.setattr(cluster_up, "end", lambda _paths, name: ended.append(name) or at.pop(name))
        starter = cluster_up._Starter(paths, ClusterSpec(7000, "sqlite", hosts), lambda _: None, 0.0)
        starter._place_again()
        assert ended == ["host-2"]
        assert starter._spec.hosts[0] == hosts[0]
        assert starter._spec.hosts[1].address != "127.0.0.1"


def test_the_time_out_of_a_lost_host_is_kept(paths: ClusterPaths) -> None:
    paths.save(planned(paths, Wanted(hosts=1, node_grace_s=12)))
    assert planned(paths, Wanted()).node_grace_s == 12


def test_ranges_stay_as_the_cluster_was_made(paths: ClusterPaths) -> None:
    made = planned(paths, Wanted(hosts=1, services="10.50.0.0/16,fd00:50::/112"))
    paths.save(made)
    assert planned(paths, Wanted()).networks == made.networks
    with pytest.raises(InvalidInput, match="make it anew"):
        planned(paths, Wanted(services="10.51.0.0/16"))
    with pytest.raises(InvalidInput, match="overlap"):
        planned(ClusterPaths(paths.state / "other"), Wanted(services="10.244.0.0/20"))


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90.0), ("1h30m", 5400.0), ("7d", 604800.0), ("0", None), ("24h", 86400.0)]
)
def test_how_long_a_token_is_good(text: str, seconds: float | None) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "-1h", "1.5h", "soon", "10", "5m x"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(InvalidInput, match="is no time"):
        seconds_of(text)


def test_a_tokens_secret_is_read_back() -> None:
    made = bootstrap_tokens.new(3600, "for the rack")
    secret = bootstrap_tokens.secret_of(made)
    stored = secret | {"data": {k: base64.b64encode(v.encode()).decode() for k, v in secret["stringData"].items()}}
    found = bootstrap_tokens.of_secret(stored)
    assert found is not None
    assert (str(found), found.description) == (str(made), "for the rack")
    assert found.expires is not None
    assert abs(found.expires - time.time() - 3600) < 60
    assert bootstrap_tokens.is_token(str(made))
    assert bootstrap_tokens.of_secret(stored | {"type": "Opaque"}) is None
    unreadable = stored["data"] | {"expiration": base64.b64encode(b"soon").decode()}
    assert bootstrap_tokens.expiry_of(stored | {"data": unreadable}) == 0.0


def test_warm_vms_are_kept_and_change_only_while_no_host_runs(
    paths: ClusterPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths.save(planned(paths, Wanted(hosts=1, warm=3)))
    assert planned(paths, Wanted()).warm == 3
    assert planned(paths, Wanted(warm=0)).warm == 0
    monkeypatch.setattr(ClusterPaths, "process", lambda _self, name: 1 if name == "host-1" else None)
    assert planned(paths, Wanted(warm=3)).warm == 3
    with pytest.raises(InvalidInput, match="host-1 runs with 3; run hv cluster down first"):
        planned(paths, Wanted(warm=2))


def test_a_removed_host_leaves_its_number(paths: ClusterPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_up, "_is_free", lambda *_address: True)
    first, second, third = hosts_of(3)
    paths.save(ClusterSpec(7000, "sqlite", (first, third)))
    assert set(planned(paths, Wanted(hosts=3)).hosts) == {first, second, third}


def test_a_port_that_was_taken_meanwhile_is_replaced(paths: ClusterPaths) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        paths.save(ClusterSpec(taken, "sqlite", hosts_of(1)))
        assert planned(paths, Wanted()).port != taken


def start_version(paths: ClusterPaths, code: str = "version") -> ProcessId | None:
    """Starts a component that is `hv version`, and gives it as recorded when the record is there."""
    child = paths.start(MASTER, [code, "--help"], dict(os.environ))
    deadline = time.monotonic() + 20
    while not paths.record(MASTER).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    found = paths.process(MASTER)
    assert found is None or found.pid == child.pid
    child.wait(30)
    return found


def test_a_component_is_on_record_before_it_begins(paths: ClusterPaths) -> None:
    assert paths.process(MASTER) is None
    found = start_version(paths)
    assert found is not None
    assert paths.process(MASTER) is None  # it has ended
    assert "Usage: hv version" in paths.log(MASTER).read_text()


@pytest.mark.parametrize("change", ["boot", "start", "garbage"])
def test_a_record_never_means_another_process(paths: ClusterPaths, change: str) -> None:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    stat = Path("/proc/self/stat").read_text().strip()
    head, _, tail = stat.rpartition(")")
    fields = tail.split()
    record = paths.record(MASTER)
    record.parent.mkdir()
    record.write_text(f"{boot}\n{stat}\n")
    assert paths.process(MASTER) == ProcessId.of(os.getpid())
    if change == "start":
        fields[22 - 3] = "1"
    stat = f"{head}) {' '.join(fields)}"
    text = {"boot": f"0{boot[1:]}x\n{stat}\n", "start": f"{boot}\n{stat}\n", "garbage": "x"}[change]
    record.write_text(text)
    assert paths.process(MASTER) is None


def test_one_command_at_a_time(paths: ClusterPaths) -> None:
    with paths.locked(), pytest.raises(Conflict, match="another hv cluster command"), paths.locked():
        pass


def test_credentials_are_private_and_kept(paths: ClusterPaths) -> None:
    spec = ClusterSpec(7000, "sqlite", hosts_of(1))
    cluster_up._write_credentials(paths, spec)
    before = paths.kubeconfig.read_bytes()
    cluster_up._write_credentials(paths, spec)
    assert paths.kubeconfig.read_bytes() == before
    for path in (paths.kubeconfig, paths.node_kubeconfig("host-1")):
        assert path.stat().st_mode & 0o777 == 0o600
    assert (paths.host("host-1") / "images").resolve() == paths.state / "images"


def test_following_a_log_that_is_moved_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    log = tmp_path / "log"
    log.write_text("a\nb\n")

    def move(_seconds: float) -> None:
        with log.open("a") as file:
            file.write("c\n")
        log.rename(tmp_path / "log.1")
        log.write_text("d\n")

    def shorten(_seconds: float) -> None:
        log.write_text("e")

    def leave(_seconds: float) -> None:
        raise KeyboardInterrupt

    steps = iter((move, lambda _seconds: None, shorten, lambda _seconds: None, leave))
    monkeypatch.setattr(cluster.time, "sleep", lambda seconds: next(steps)(seconds))
    with pytest.raises(KeyboardInterrupt):
        cluster._print_file(log, follow=True, tail=1)
    assert capfdbinary.readouterr().out == b"b\nc\nd\ne"


def test_down_where_nothing_runs_is_harmless(paths: ClusterPaths) -> None:
    said: list[str] = []
    cluster_down.take_down(paths, said.append, delete=True)
    assert "no master runs" in said
    assert not paths.master.exists()
    nowhere = ClusterPaths(paths.state / "none")
    cluster_down.take_down(nowhere, said.append, delete=False)
    assert said[-1] == f"there is no cluster in {nowhere.root}"
    assert not nowhere.state.exists()
    cluster_down.take_down(paths, said.append, delete=False)


def pod(name: str, *, owner: str = "", phase: str = "Running", volumes: Any = (), **metadata: Any) -> dict[str, Any]:
    owners = [{"kind": owner, "name": "o", "controller": True}] if owner else []
    meta = {"name": name, "namespace": "ns", "uid": f"uid-{name}", "ownerReferences": owners, **metadata}
    return {"metadata": meta, "spec": {"volumes": list(volumes)}, "status": {"phase": phase}}


RS, DS, BARE, DONE = pod("rs", owner="ReplicaSet"), pod("ds", owner="DaemonSet"), pod("bare"), pod("d", phase="Failed")
SCRATCH = pod("scratch", owner="ReplicaSet", volumes=[{"name": "v", "emptyDir": {}}])
MIRROR = pod("static", annotations={nodes.MIRROR: "x"})


@pytest.mark.parametrize(
    ("pods", "how", "expected"),
    [
        ([RS, DONE, MIRROR], nodes.Drain(), ["rs", "d"]),
        ([RS, DS], nodes.Drain(), "ns/ds is a DaemonSet's .--ignore-daemonsets"),
        ([RS, DS], nodes.Drain(ignore_daemonsets=True), ["rs"]),
        ([BARE], nodes.Drain(), "ns/bare has no controller .--force"),
        ([BARE], nodes.Drain(force=True), ["bare"]),
        ([SCRATCH], nodes.Drain(), "--delete-emptydir-data"),
        ([SCRATCH], nodes.Drain(delete_emptydir=True), ["scratch"]),
    ],
)
def test_which_pods_are_evicted(pods: list[dict[str, Any]], how: nodes.Drain, expected: str | list[str]) -> None:
    if isinstance(expected, str):
        with pytest.raises(InvalidInput, match=expected):
            nodes.to_evict(pods, how)
    else:
        assert [p["metadata"]["name"] for p in nodes.to_evict(pods, how)] == expected


class Api:
    """A server on which a pod goes when it is evicted, and evictions are refused `refusals` times."""

    def __init__(self, pods: list[dict[str, Any]], refusals: int = 0, goes: bool = True) -> None:
        self.pods = {p["metadata"]["name"]: p for p in pods}
        self.refusals = refusals
        self.goes = goes
        self.calls: list[str] = []

    def patch(self, _resource: Any, name: str, change: Any) -> None:
        self.calls.append(f"patch {name} {json.dumps(change)}")

    def list(self, _resource: Any, **query: str) -> list[dict[str, Any]]:
        self.calls.append(f"list {query}")
        return list(self.pods.values())

    def create(self, _resource: Any, obj: Any, namespace: str, *, at: str) -> None:
        self.calls.append(f"{namespace}/{at} {obj['deleteOptions']}")
        if self.refusals:
            self.refusals -= 1
            raise ApiError("TooManyRequests", "a budget is in the way")
        if self.goes:
            del self.pods[obj["metadata"]["name"]]

    def get(self, _resource: Any, name: str, _namespace: str) -> dict[str, Any]:
        if name not in self.pods:
            raise ApiError("NotFound", name)
        return self.pods[name]


def test_drain_cordons_first_and_waits_for_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "RETRY_EVICTION", 0.01)
    api: Any = Api([RS], refusals=2)
    nodes.drain_host(api, "h", nodes.Drain(grace_s=3), lambda _: None)
    evict = "ns/rs/eviction {'preconditions': {'uid': 'uid-rs'}, 'gracePeriodSeconds': 3}"
    assert api.calls == [
        'patch h {"spec": {"unschedulable": true}}',
        "list {'fieldSelector': 'spec.nodeName=h'}",
        *[evict] * 3,
    ]


def test_drain_ends_in_time_and_says_what_is_left() -> None:
    api: Any = Api([RS], goes=False)
    with pytest.raises(Timeout, match="left: ns/rs"):
        nodes.drain_host(api, "h", nodes.Drain(timeout_s=0.3), lambda _: None)


def test_a_pod_made_again_is_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    api: Any = Api([RS], goes=False)
    monkeypatch.setattr(api, "get", lambda *_: pod("rs", uid="another"))
    nodes.drain_host(api, "h", nodes.Drain(timeout_s=5), lambda _: None)
