"""Fixtures of the node's tests; `bench` is the controller's."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "kube"))

from kube_fake_server import FakeServer
from node_bench import Cluster
from pod_bench import Bench


@pytest.fixture
async def cluster(bench: Bench) -> AsyncIterator[Cluster]:
    """A host over made-up guests and a made-up API server."""
    server = FakeServer()
    async with server.serve() as url:
        yield Cluster(bench, url, server)
