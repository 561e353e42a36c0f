"""The Node object, and what it says of this host."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kube_fake_server import FakeServer

from hypervisor.controller.node.config import Beats, NodeConfig
from hypervisor.controller.node.node import images_status
from hypervisor.controller.node.register import TEMPLATES_ANNOTATION, Facts, NodeObject
from hypervisor.kube.http import HttpApiClient
from hypervisor.kube.kubeconfig import KubeConfig
from hypervisor.master.scheduler import scores
from hypervisor.vmm.templates.store import TemplateStore

NODES = "/api/v1/nodes"


@dataclass
class Stored:
    """What `images_status` looks at of an image."""

    names: tuple[str, ...]
    size_bytes: int


class Images:
    """A store with three images, one of which has lost its name."""

    def list(self) -> list[Stored]:
        return [Stored(("a:1",), 5), Stored((), 9), Stored(("b:1", "b:2"), 7)]


@asynccontextmanager
async def registered(url: str, templates: Path) -> AsyncIterator[None]:
    beats = Beats(status_s=0.02, report_s=60, lease_s=1)
    async with HttpApiClient(KubeConfig(url)) as client:
        config = NodeConfig("n1", templates / "kubeconfig", "127.0.0.9")
        facts = Facts("tcg", "podvisor://1", templates.parent)
        node = NodeObject(client, config, facts, list, beats, TemplateStore(templates).sizes)
        task = asyncio.create_task(node.run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def until_told(server: FakeServer, text: str | None) -> None:
    async with asyncio.timeout(20):
        while True:
            node: Any = server.objects.get((NODES, "", "n1"), {})
            if node and node["metadata"].get("annotations", {}).get(TEMPLATES_ANNOTATION) == text:
                return
            await asyncio.sleep(0.02)


def test_images_are_listed_by_size() -> None:
    listed = images_status(Images())  # type: ignore[arg-type]
    assert listed == [{"names": ["b:1", "b:2"], "sizeBytes": 7}, {"names": ["a:1"], "sizeBytes": 5}]


async def test_templates_are_told_to_the_scheduler(tmp_path: Path) -> None:
    assert scores.TEMPLATES_ANNOTATION == TEMPLATES_ANNOTATION
    folders = tmp_path / "templates"
    small, large = folders / "0a", folders / "1b"
    small.mkdir(parents=True)
    large.mkdir()
    server = FakeServer()
    async with server.serve() as url:
        async with registered(url, folders):
            await until_told(server, None)
            for folder, size in ((large, 512), (small, 64)):
                with (folder / "ram").open("wb") as ram:
                    ram.truncate(size << 20)
            await until_told(server, "64,512")
        (large / "ram").unlink()
        async with registered(url, folders):
            await until_told(server, "64")
            (small / "ram").unlink()
            await until_told(server, None)
            server.objects.pop((NODES, "", "n1"))
            await until_told(server, None)
