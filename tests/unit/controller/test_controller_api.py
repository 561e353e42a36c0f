"""The HTTP API over pods with made-up guests: answers, Status errors, authentication, streams."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer
from fake_guest import Script
from pod_bench import Bench, manifest, until

from hypervisor.controller.api import Host, make_app
from hypervisor.controller.manifest import MAX_MANIFEST_BYTES
from hypervisor.controller.static_pods import StaticPods
from hypervisor.images.store import ImageStore

TOKEN = "t" * 40


class Api:
    """The application behind a real TCP socket."""

    def __init__(self, bench: Bench, client: TestClient[Any, Any]) -> None:
        self.bench = bench
        self.client = client
        self.stops: list[bool] = []

    async def call(self, method: str, path: str, **more: Any) -> tuple[int, Any]:
        async with self.client.request(method, path, **more) as answer:
            text = await answer.text()
            return answer.status, json.loads(text) if text.startswith(("{", "[")) else text


@pytest.fixture
async def api(bench: Bench, tmp_path: Path) -> AsyncIterator[Api]:
    static = StaticPods(bench.paths.manifests, bench.pods)
    stops: list[bool] = []
    host = Host(TOKEN, str(bench.paths.root), bench.pods, static, ImageStore(tmp_path / "images"), stops.append)
    server = TestServer(make_app(host))
    async with TestClient(server, headers={"Authorization": f"Bearer {TOKEN}"}) as client:
        it = Api(bench, client)
        it.stops = stops
        yield it


async def test_pod_is_made_listed_watched_and_deleted(api: Api) -> None:
    api.bench.machines.scripts = [Script(ends={"c": [None]})]
    code, made = await api.call("POST", "/hv/v1/pods", json=manifest())
    assert (code, made["kind"], made["metadata"]["namespace"]) == (201, "Pod", "default")
    assert (await api.call("GET", "/pods"))[1]["items"][0]["metadata"]["name"] == "p"
    phases = []
    async with api.client.get("/hv/v1/pods/default/p?watch=1") as answer:
        async for text in answer.content:
            phases.append(json.loads(text)["status"]["phase"])
            if phases[-1] == "Running":
                break
    assert phases[0] == "Pending"
    code, gone = await api.call("DELETE", "/hv/v1/pods/default/p?gracePeriodSeconds=0&wait=1")
    assert (code, gone["metadata"]["deletionGracePeriodSeconds"]) == (200, 0)
    assert (await api.call("GET", "/hv/v1/pods/default/p"))[0] == 404


async def test_watch_ends_with_the_pod(api: Api) -> None:
    await api.call("POST", "/hv/v1/pods", json=manifest())
    async with api.client.get("/hv/v1/pods/default/p?watch=1") as answer:
        await answer.content.readline()
        await api.call("DELETE", "/hv/v1/pods/default/p?gracePeriodSeconds=0")
        async with asyncio.timeout(5):
            rest = await answer.content.read()
    assert b"deletionTimestamp" in rest


async def test_stop_waits_for_the_end(api: Api) -> None:
    await api.call("POST", "/hv/v1/pods", json=manifest(policy="Always"))
    pod = api.bench.pods.get("default", "p")
    await until(pod, lambda: pod.journal.record.phase == "Running")
    code, stopped = await api.call("POST", "/hv/v1/pods/default/p/stop?gracePeriodSeconds=1")
    assert (code, stopped["status"]["phase"]) == (200, "Failed")
    assert pod.journal.record.closed


async def test_logs_come_from_the_archive_once_the_vm_is_off(api: Api) -> None:
    api.bench.machines.scripts = [Script(ends={"c": [0]})]
    await api.call("POST", "/hv/v1/pods", json=manifest())
    pod = api.bench.pods.get("default", "p")
    await until(pod, lambda: pod.journal.record.closed)
    assert await api.call("GET", "/containerLogs/default/p/c") == (200, "hello\n")
    assert (await api.call("GET", "/hv/v1/pods/default/p/console"))[1] == "booting\n"
    assert (await api.call("GET", "/hv/v1/pods/default/p/console?follow=1&tail=1"))[1] == "booting\n"


async def test_invalid_pod_is_422_with_the_field(api: Api) -> None:
    code, status = await api.call("POST", "/hv/v1/pods", json=manifest(restartPolcy="Never"))
    assert (code, status["kind"], status["reason"]) == (422, "Status", "Invalid")
    assert status["details"]["causes"][0]["field"] == "spec.restartPolcy"


async def test_taken_name_is_409(api: Api) -> None:
    await api.call("POST", "/hv/v1/pods", json=manifest())
    code, status = await api.call("POST", "/hv/v1/pods", json=manifest())
    assert (code, status["reason"]) == (409, "Conflict")


@pytest.mark.parametrize(
    ("method", "path", "body", "code"),
    [
        ("POST", "/hv/v1/pods", b"{", 422),
        ("POST", "/hv/v1/pods", b"[" * 100_000, 422),
        ("POST", "/hv/v1/pods", b" " * (MAX_MANIFEST_BYTES + 1), 422),
        ("GET", "/hv/v1/pods/default/none", None, 404),
        ("GET", "/no/such/path", None, 404),
        ("PATCH", "/hv/v1/pods", None, 405),
        ("DELETE", "/hv/v1/pods/default/p?gracePeriodSeconds=soon", None, 422),
        ("DELETE", "/hv/v1/pods/default/p?wait=perhaps", None, 422),
        ("GET", "/hv/v1/pods/default/p/console?tail=-1", None, 422),
        ("GET", "/hv/v1/pods/default/p/archive?path=relative", None, 422),
        ("GET", "/hv/v1/pods/default/p/archive?path=/x&container=d", None, 404),
        ("DELETE", "/hv/v1/images", None, 422),
        ("DELETE", "/hv/v1/images?reference=nothing", None, 404),
        ("POST", "/hv/v1/images/pull", b'{"reference": 5}', 422),
        ("POST", "/hv/v1/host/stop?pods=perhaps", None, 422),
    ],
)
async def test_refusals_are_status_objects(api: Api, method: str, path: str, body: bytes | None, code: int) -> None:
    await api.call("POST", "/hv/v1/pods", json=manifest())
    found, status = await api.call(method, path, data=body)
    assert (found, status["kind"], status["status"], status["code"]) == (code, "Status", "Failure", code)
    assert status["message"]


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Basic " + TOKEN, "Bearer é", TOKEN])
async def test_without_the_token_nothing_is_told(api: Api, header: str | None) -> None:
    headers = {"Authorization": header or ""}
    for path in ("/pods", "/hv/v1/version", "/exec/default/p/c", "/no/such/path"):
        code, status = await api.call("GET", path, headers=headers)
        assert (code, status["reason"]) == (401, "Unauthorized")
    assert (await api.call("GET", "/healthz", headers=headers)) == (200, "ok")


async def test_exec_into_a_pod_that_has_ended_says_so(api: Api) -> None:
    api.bench.machines.scripts = [Script(ends={"c": [0]})]
    await api.call("POST", "/hv/v1/pods", json=manifest())
    pod = api.bench.pods.get("default", "p")
    await until(pod, lambda: pod.journal.record.closed)
    upgrade = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Protocol": "v5.channel.k8s.io"}
    code, status = await api.call("GET", "/exec/default/p/c?command=true&output=1", headers=upgrade)
    assert (code, status["message"]) == (503, "pod p has succeeded")


async def test_images_answer_in_lines(api: Api, tmp_path: Path) -> None:
    (tmp_path / "broken.tar").write_bytes(b"no archive")
    code, text = await api.call("POST", "/hv/v1/images/import", json={"path": str(tmp_path / "broken.tar")})
    lines = [text] if isinstance(text, dict) else [json.loads(t) for t in text.splitlines()]
    assert (code, lines[-1]["error"]["reason"]) == (200, "Invalid")
    assert (await api.call("GET", "/hv/v1/images"))[1] == {"images": []}
    assert (await api.call("POST", "/hv/v1/images/prune"))[1] == {"removed": []}


async def test_top_and_host(api: Api) -> None:
    await api.call("POST", "/hv/v1/pods", json=manifest())
    pod = api.bench.pods.get("default", "p")
    await until(pod, lambda: pod.journal.record.phase == "Running")
    top = (await api.call("GET", "/hv/v1/top"))[1]
    assert top["pods"][0]["vm"] == {"cpu_ns": 1}
    host = (await api.call("GET", "/hv/v1/host"))[1]
    assert (host["pods"], host["static_pods"]) == (1, {"broken": []})


async def test_host_stop_removes_the_pods_first(api: Api) -> None:
    await api.call("POST", "/hv/v1/pods", json=manifest())
    assert (await api.call("POST", "/hv/v1/host/stop?pods=1"))[0] == 200
    assert api.stops == [True, False]
    assert list(api.bench.pods) == []
