"""Another machine joins a master: token, certificate by signing request, renewal; and what is refused on the way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from master_process import Kubectl, MasterProcess, running_master, until

from hypervisor.kube import kubeconfig


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MasterProcess]:
    with running_master(tmp_path_factory.mktemp("master")) as made:
        yield made


def join_file(master: MasterProcess, folder: Path, *options: str) -> Path:
    path = folder / "join"
    master.hv("cluster", "token", "create", "--join-file", str(path), *options)
    assert path.stat().st_mode & 0o077 == 0
    return path


def certificate(config: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(kubeconfig.load(config).certificate.read())


def test_a_machine_joins_and_renews_its_certificate(master: MasterProcess, tmp_path: Path) -> None:
    file, own = join_file(master, tmp_path), tmp_path / "n1.kubeconfig"
    master.hv("host", "join", str(file), "--node-name", "n1", "--output", str(own))
    assert own.stat().st_mode & 0o077 == 0
    node = Kubectl(tmp_path, config=own)
    assert "system:node:n1" in node("auth", "whoami")
    manifest = '{"apiVersion": "v1", "kind": "Node", "metadata": {"name": "%s"}}'
    node("create", "-f", "-", stdin=manifest % "n1")
    assert "is not allowed to modify node 'n2'" in node("create", "-f", "-", stdin=manifest % "n2", code=1)
    first = certificate(own)
    master.hv("host", "join", str(own), "--node-name", "n1", "--output", str(own))  # with its own certificate
    assert certificate(own).serial_number != first.serial_number
    assert "n1" in node("get", "node", "n1")
    other = tmp_path / "n2.kubeconfig"
    said = master.hv("host", "join", str(own), "--node-name", "n2", "--output", str(other), "--timeout", "2", code=1)
    assert "approve" in said
    assert not other.exists()


def test_a_token_joins_and_does_nothing_else(master: MasterProcess, tmp_path: Path) -> None:
    joining = Kubectl(tmp_path, config=join_file(master, tmp_path, "--description", "for the rack"))
    for what in (("get", "secrets", "-A"), ("get", "nodes"), ("create", "configmap", "x")):
        assert "forbidden" in joining(*what, code=1).lower()
    assert "for the rack" in master.hv("cluster", "token", "list")


def test_a_revoked_token_and_one_that_has_expired_are_good_for_nothing(master: MasterProcess, tmp_path: Path) -> None:
    file = join_file(master, tmp_path)
    token = kubeconfig.load(file).bearer()
    master.hv("cluster", "token", "delete", token)
    arguments = ("host", "join", str(file), "--node-name", "n3", "--output", str(tmp_path / "n3"))
    assert "Unauthorized" in master.hv(*arguments, code=1)
    assert "there is no token" in master.hv("cluster", "token", "delete", token, code=1)
    short = master.hv("cluster", "token", "create", "--ttl", "1s").strip()
    until(lambda: short[:6] not in master.hv("cluster", "token", "list"))  # removed by the master itself
    assert "no time" in master.hv("cluster", "token", "create", "--ttl", "soon", code=1)
