"""A master whose objects are in three etcd members with TLS, of which one dies, and then another."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from master_process import MasterProcess, running_master, until

sys.path.append(str(Path(__file__).parents[1] / "unit/master"))
from etcd_server import EtcdCluster

from hypervisor.cli.kubeapi import KubeApi
from hypervisor.errors import HvError
from hypervisor.kube.errors import ApiError
from hypervisor.kube.resources import CONFIG_MAPS


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    made = EtcdCluster(tmp_path_factory.mktemp("etcd"))
    made.start()
    yield made
    made.kill()


def options(etcd: EtcdCluster) -> tuple[str, ...]:
    ca, certificate, key = map(str, etcd.files)
    files = ("--etcd-cafile", ca, "--etcd-certfile", certificate, "--etcd-keyfile", key)
    return ("--store", f"etcd:{','.join(etcd.urls)}", *files)


def make(api: KubeApi, name: str) -> bool:
    """Whether it is there: a write that nobody answered for is asked for again."""
    try:
        api.create(CONFIG_MAPS, {"metadata": {"name": name}}, "default")
    except ApiError as error:
        return error.reason == "AlreadyExists"
    except HvError:
        return False
    return True


def test_one_member_may_die_and_two_may_not(etcd: EtcdCluster, tmp_path: Path) -> None:
    with running_master(tmp_path / "master", *options(etcd)) as master, KubeApi(master.kubeconfig, 30) as api:
        for number in range(10):
            until(lambda number=number: make(api, f"a{number}"))
        etcd.kill(0)  # the one that is spoken to
        for number in range(10):
            until(lambda number=number: make(api, f"b{number}"))
        etcd.kill(1)
        with pytest.raises(ApiError) as caught:
            api.create(CONFIG_MAPS, {"metadata": {"name": "minority"}}, "default")
        assert caught.value.code in (503, 504)
        etcd.start(0, 1)
        until(lambda: make(api, "after"))
        names = {m["metadata"]["name"] for m in api.list(CONFIG_MAPS, "default")}
        assert {f"{x}{n}" for x in "ab" for n in range(10)} | {"after"} <= names


def test_a_master_without_the_right_certificate_says_so(etcd: EtcdCluster, tmp_path: Path) -> None:
    ca, certificate, _ = map(str, etcd.files)
    for number, files in enumerate([(), ("--etcd-cafile", ca), ("--etcd-certfile", certificate)]):
        master = MasterProcess(tmp_path / f"m{number}", "--store", f"etcd:{','.join(etcd.urls)}", *files)
        assert master.process.wait(60) == 1
        said = master.log.read_text()
        assert "etcd" in said
        assert len(said.splitlines()) == 1, said
