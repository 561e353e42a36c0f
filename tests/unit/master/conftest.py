"""A real etcd for the tests that want one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from etcd_server import EtcdServer


@pytest.fixture(scope="session")
def etcd_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    server = EtcdServer(tmp_path_factory.mktemp("etcd"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def etcd(etcd_process: EtcdServer) -> EtcdServer:
    """A running etcd without keys (its revision goes on)."""
    etcd_process.clear()
    return etcd_process
