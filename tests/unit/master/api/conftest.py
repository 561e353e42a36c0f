"""Fixtures over `masterkit`."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator

import aiohttp
import pytest
import pytest_asyncio
from masterkit import Api, MasterThread, tls_of

from hypervisor.master.auth import parties
from hypervisor.master.daemon import Master

_names = itertools.count()


@pytest.fixture(scope="session")
def master(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Master]:
    with MasterThread(tmp_path_factory.mktemp("master")) as thread:
        yield thread.master


@pytest_asyncio.fixture
async def api(master: Master) -> AsyncIterator[Api]:
    """An administrator, and a namespace of the test's own."""
    tls = await asyncio.to_thread(tls_of, master, parties.admin(master.auth.ca))
    namespace = f"t{next(_names)}"
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=tls)) as session:
        made = Api(session, f"https://127.0.0.1:{master.port}", namespace)
        answer = await made.send("POST", "/api/v1/namespaces", {"metadata": {"name": namespace}})
        assert answer.status == 201, answer.body
        yield made
