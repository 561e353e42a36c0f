"""What goes into a pod's resolv.conf."""

from __future__ import annotations

from pathlib import Path

import pytest

from hypervisor.controller.resolving import host_resolver, resolving
from hypervisor.controller.spec import Network

HOST = "# ours\nnameserver 127.0.0.53\nnameserver 192.0.2.1\nnameserver fd00::1\nsearch example.org.\n"


def made(folder: Path, network: Network, *servers: str, host: str = HOST) -> tuple[tuple[str, ...], ...]:
    file = folder / "resolv.conf"
    file.write_text(host)
    found = resolving(network, "shop", "cluster.local", servers, file)
    return found.dns, found.search, found.options


CLUSTER = ("shop.svc.cluster.local", "svc.cluster.local", "cluster.local")


def test_cluster_first(tmp_path: Path) -> None:
    own = Network(dns=("192.0.2.9",), search=("more.org",), options=("timeout:1",))
    assert made(tmp_path, own, "10.96.0.10") == (
        ("10.96.0.10", "192.0.2.9"), (*CLUSTER, "more.org"), ("ndots:5", "timeout:1"),
    )  # fmt: skip
    assert made(tmp_path, Network(options=("ndots:2",)), "10.96.0.10")[2] == ("ndots:2",)


def test_without_a_cluster_and_default_are_the_hosts(tmp_path: Path) -> None:
    host = (("192.0.2.1",), ("example.org",), ())
    assert made(tmp_path, Network()) == host
    assert made(tmp_path, Network(policy="Default"), "10.96.0.10") == host


def test_a_host_that_asks_itself_is_asked_through_the_clusters_server(tmp_path: Path) -> None:
    found = made(tmp_path, Network(policy="Default"), "10.96.0.10", host="nameserver 127.0.0.53\n")
    assert found == (("10.96.0.10",), (), ())


def test_none_is_the_pods_own(tmp_path: Path) -> None:
    own = Network(policy="None", dns=("192.0.2.9",), search=("a.b",))
    assert made(tmp_path, own, "10.96.0.10") == (("192.0.2.9",), ("a.b",), ())


def test_no_more_servers_than_resolvers_look_at(tmp_path: Path) -> None:
    own = Network(dns=("192.0.2.7", "192.0.2.8", "192.0.2.9"))
    assert made(tmp_path, own, "10.96.0.10")[0] == ("10.96.0.10", "192.0.2.7", "192.0.2.8")


@pytest.mark.parametrize("text", ["", "nameserver\n", "nameserver x\nsearch\n", "\0\n"])
def test_a_strange_file(tmp_path: Path, text: str) -> None:
    file = tmp_path / "resolv.conf"
    file.write_text(text)
    assert host_resolver(file) == ((), ())
    assert host_resolver(tmp_path / "none") == ((), ())
