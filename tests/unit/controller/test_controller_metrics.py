"""``/metrics``: what a scraper reads, also when a VM hangs or lies."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from fake_guest import FakeGuest, Script
from pod_bench import Bench, until
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from hypervisor.controller import metrics

RAM = {
    "faults": 7,
    "bytes": 8192,
    "latency": [0] * 12 + [5, 0, 0, 2] + [0] * 20,
    "prefetch_hits": 3,
    "latency_ns": 51_000,
}
PERCPU = {"commits": 9, "restarts": 2, "memory_bytes": 24576}
STATS = {"cpu_ns": 2_000_000_000, "vmx": {"ram": RAM, "vsock": {"connections": 1}, "percpu": PERCPU}, "vmx_replaced": 1}


class Told(FakeGuest):
    """A guest whose VM has counters; None: its vmx hangs."""

    told: Mapping[str, Any] | None = None

    async def stats(self) -> Mapping[str, Any]:
        if self.told is None:
            await asyncio.Event().wait()
        assert self.told is not None
        return {**self.told, "frames": {"template": "t", "vads": 2, "entries": 10}}


@pytest.fixture
async def scraper(bench: Bench) -> AsyncIterator[TestClient[Any, Any]]:
    app = web.Application()
    metrics.add_metrics_route(app, bench.pods)
    async with TestClient(TestServer(app)) as client:
        yield client


async def run_pods(bench: Bench, **told: Mapping[str, Any] | None) -> None:
    bench.machines.scripts = [Script(ends={"c": [None]})]
    for name, stats in told.items():
        pod = await bench.create(name, "Always")
        await until(pod, lambda pod=pod: pod.journal.record.phase == "Running")  # type: ignore[misc]
        guest = bench.machines.started[-1]
        guest.__class__ = Told
        guest.told = stats  # type: ignore[attr-defined]


async def scrape(client: TestClient[Any, Any], accept: str = "") -> str:
    async with client.get("/metrics", headers={"Accept": accept} if accept else {}) as answer:
        assert answer.status == 200
        return await answer.text()


def values(text: str, name: str) -> dict[str, float]:
    """By pod, or by bucket."""
    samples = [s for family in parse(text) for s in family.samples if s.name == name]
    return {s.labels.get("le") or s.labels["pod"]: s.value for s in samples}


async def test_counters_have_names_units_and_labels(bench: Bench, scraper: TestClient[Any, Any]) -> None:
    await run_pods(bench, a=STATS)
    text = await scrape(scraper)
    assert values(text, "podvisor_vm_faults_total") == {"a": 7}
    assert values(text, "podvisor_vm_filled_bytes_total") == {"a": 8192}
    assert values(text, "podvisor_vm_prefetch_hits_total") == {"a": 3}
    assert values(text, "podvisor_vm_vmx_replacements_total") == {"a": 1}
    assert values(text, "podvisor_vm_cpu_seconds_total") == {"a": 2}
    assert values(text, "podvisor_vm_vsock_connections") == {"a": 1}
    assert values(text, "podvisor_vm_percpu_commits_total") == {"a": 9}
    assert values(text, "podvisor_vm_percpu_restarts_total") == {"a": 2}
    assert values(text, "podvisor_vm_percpu_memory_bytes") == {"a": 24576}
    assert values(text, "podvisor_vm_vads") == {"a": 2}
    uid = bench.pods.get("default", "a").stored.uid
    assert f'podvisor_vm_up{{namespace="default",pod="a",uid="{uid}"}} 1.0' in text


async def test_latency_is_a_cumulative_histogram_in_seconds(bench: Bench, scraper: TestClient[Any, Any]) -> None:
    await run_pods(bench, a=STATS)
    text = await scrape(scraper)
    found = values(text, "podvisor_vm_fault_duration_seconds_bucket")
    bounds = [float(bound) for bound in found]
    assert bounds == sorted(bounds) and bounds[0] == pytest.approx(1.024e-6) and bounds[-1] == float("inf")
    assert list(found.values()) == sorted(found.values())
    assert values(text, "podvisor_vm_fault_duration_seconds_sum") == {"a": pytest.approx(51e-6)}
    assert values(text, "podvisor_vm_fault_duration_seconds_count") == {"a": 7}
    assert found["4.096e-06"] == 5 and found["6.5536e-05"] == 7 and found["+Inf"] == 7


async def test_disks_have_a_label_of_their_own(bench: Bench, scraper: TestClient[Any, Any]) -> None:
    disk = {"name": "scratch", "requests": 5, "redirects": 2, "latency_ns": 1500, "latency_p99_ns": None}
    await run_pods(bench, one={**STATS, "disks": [disk]})
    text = await scrape(scraper)
    (sample,) = [line for line in text.splitlines() if line.startswith("podvisor_disk_requests_total{")]
    assert 'disk="scratch"' in sample and 'pod="one"' in sample and sample.endswith(" 5.0")
    assert "podvisor_disk_redirects_total{" in text
    assert "podvisor_disk_latency_p99_seconds{" not in text
    assert "1.5e-06" in next(line for line in text.splitlines() if line.startswith("podvisor_disk_latency_seconds{"))


async def test_a_hung_vmx_costs_the_others_nothing(
    bench: Bench, scraper: TestClient[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "PATIENCE_S", 0.2)
    await run_pods(bench, hung=None, well=STATS)
    began = time.monotonic()
    text = await scrape(scraper)
    assert time.monotonic() - began < 2
    assert values(text, "podvisor_vm_up") == {"hung": 0, "well": 1}
    assert values(text, "podvisor_vm_faults_total") == {"well": 7}


async def test_what_vmx_makes_up_is_left_out(bench: Bench, scraper: TestClient[Any, Any]) -> None:
    lies = {"vmx": {"ram": {"faults": "many", "latency": ["x", -1, 2] * 100, "bytes": [1]}, "vsock": 3}}
    await run_pods(bench, a=lies)
    text = await scrape(scraper)
    assert values(text, "podvisor_vm_faults_total") == {} == values(text, "podvisor_vm_filled_bytes_total")
    assert len(values(text, "podvisor_vm_fault_duration_seconds_bucket")) == len(metrics.LATENCY_BITS) + 1


async def test_frames_are_shared_from_the_second_clone_on(bench: Bench, scraper: TestClient[Any, Any]) -> None:
    await run_pods(bench, a=STATS)
    assert values(await scrape(scraper), "podvisor_vm_shared_page_frames") == {"a": 0}
    await run_pods(bench, b=STATS)
    assert values(await scrape(scraper), "podvisor_vm_shared_page_frames") == {"a": 10, "b": 10}


async def test_openmetrics_where_it_is_asked_for(bench: Bench, scraper: TestClient[Any, Any]) -> None:
    await run_pods(bench, a=STATS)
    text = await scrape(scraper, "application/openmetrics-text; version=1.0.0")
    assert "podvisor_vm_faults" in {family.name for family in parse_openmetrics(text)}


async def test_series_of_pods_that_have_gone_go_too(bench: Bench, scraper: TestClient[Any, Any]) -> None:
    await run_pods(bench, a=STATS)
    pod = bench.pods.get("default", "a")
    await pod.request_delete(0)
    await pod.gone.wait()
    assert 'pod="a"' not in await scrape(scraper)
