"""``metrics.k8s.io/v1beta1``: what nodes and pods use now, for ``kubectl top`` and autoscalers.

Upstream has a server of its own for it (metrics-server). Here the master asks each node's ``/stats/summary`` when
somebody asks, and keeps the answer for `FRESH_S`; a node that does not answer is left out, as its pods are.
Source: Kubernetes, "Resource metrics pipeline".
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import orjson
import structlog
from aiohttp import web

from hypervisor.errors import HvError
from hypervisor.kube.errors import ApiError, not_found
from hypervisor.kube.meta import get
from hypervisor.kube.resources import NODES, PODS
from hypervisor.kube.selectors import LabelSelector, parse_labels
from hypervisor.master.api.exchange import Exchange, not_allowed, unknown
from hypervisor.master.api.inside import Inside

GROUP, VERSION = "metrics.k8s.io", "v1beta1"
GROUP_VERSION = f"{GROUP}/{VERSION}"
FRESH_S = 5.0
PATIENCE_S = 3.0
MAX_ANSWER = 32 << 20
Document = dict[str, Any]


class Usage:
    """Summaries of nodes by name, each with the time of its taking. For one event loop."""

    def __init__(self) -> None:
        self._taken: dict[str, tuple[float, Document]] = {}
        self._asking: dict[str, asyncio.Task[None]] = {}

    async def of(self, inside: Inside, names: Iterable[str]) -> dict[str, Document]:
        """The newest summaries of these nodes; one that cannot be had is left out."""
        names, now = set(names), time.monotonic()
        old = [n for n in names if now - self._taken.get(n, (0.0, {}))[0] > FRESH_S or n not in self._taken]
        await asyncio.gather(*(asyncio.shield(self._ask(inside, name)) for name in old))
        return {n: self._taken[n][1] for n in names if n in self._taken}

    def _ask(self, inside: Inside, name: str) -> asyncio.Task[None]:
        """One question to a node at a time, whoever asks."""
        task = self._asking.get(name)
        if task is None:
            task = self._asking[name] = asyncio.create_task(self._fetch(inside, name), name=f"summary of {name}")
            task.add_done_callback(lambda _: self._asking.pop(name, None))
        return task

    async def _fetch(self, inside: Inside, name: str) -> None:
        self._taken.pop(name, None)
        node = inside.objects.registry.peek(inside.kinds.of(NODES), "", name)
        if node is None:
            return
        try:
            async with asyncio.timeout(PATIENCE_S):
                body = await inside.kubelets.fetch(inside.kubelets.address(node.obj), "/stats/summary", MAX_ANSWER)
            summary = orjson.loads(body)
            list(_node_metrics({name: summary}, {})), list(_pod_metrics(summary, {}))
        except (HvError, ApiError, TimeoutError, OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            structlog.get_logger().info("no figures of a node", node=name, error=str(e) or type(e).__name__)
        else:
            self._taken[name] = (time.monotonic(), summary)


async def answer(exchange: Exchange, usage: Usage) -> web.StreamResponse:
    """A request for the group's resources; authorized already.

    :raises ApiError: no such resource or object, or a verb other than get and list
    """
    info, inside = exchange.info, exchange.inside
    if info.version != VERSION or info.subresource or info.plural not in ("nodes", "pods"):
        raise unknown()
    if info.verb not in ("get", "list") or (info.plural == "pods" and info.name and not info.namespace):
        raise not_allowed()
    resource = NODES if info.plural == "nodes" else PODS
    entries = inside.objects.registry.peek_all(inside.kinds.of(resource), info.namespace)
    selector = parse_labels(info.query.get("labelSelector", ""))
    objects = [e.obj for e in entries if _wanted(e.obj, info.name, selector)]
    nodes = [
        str(get(o, "metadata" if resource is NODES else "spec", _NAMED[resource.plural], default="")) for o in objects
    ]
    found = await usage.of(inside, (n for n in nodes if n))
    items = _items(resource.plural, objects, found)
    if info.verb == "get":
        if not items:
            raise not_found(GROUP, info.plural, info.name)
        return exchange.value(items[0])
    kind = "NodeMetricsList" if resource is NODES else "PodMetricsList"
    return exchange.value({"kind": kind, "apiVersion": GROUP_VERSION, "metadata": {}, "items": items})


_NAMED: Mapping[str, str] = {"nodes": "name", "pods": "nodeName"}


def _wanted(obj: Mapping[str, Any], name: str, selector: LabelSelector) -> bool:
    return (not name or obj["metadata"]["name"] == name) and selector.matches(obj["metadata"].get("labels") or {})


def _items(plural: str, objects: Sequence[Mapping[str, Any]], found: Mapping[str, Document]) -> list[Document]:
    by_key = {_key(o): o for o in objects}
    if plural == "nodes":
        return list(_node_metrics(found, by_key))
    return [item for summary in found.values() for item in _pod_metrics(summary, by_key) if _key(item) in by_key]


def _key(obj: Mapping[str, Any]) -> tuple[str, str]:
    return obj["metadata"].get("namespace", ""), obj["metadata"]["name"]


def _node_metrics(
    found: Mapping[str, Document], objects: Mapping[tuple[str, str], Mapping[str, Any]]
) -> Iterator[Document]:
    for name, summary in sorted(found.items()):
        figures = summary["node"]
        yield _head("NodeMetrics", {"name": name}, objects.get(("", name)), figures) | {"usage": _usage(figures)}


def _pod_metrics(summary: Document, objects: Mapping[tuple[str, str], Mapping[str, Any]]) -> Iterator[Document]:
    for pod in summary["pods"]:
        ref = pod["podRef"]
        of = objects.get((ref["namespace"], ref["name"]))
        containers = [{"name": c["name"], "usage": _usage(c)} for c in pod["containers"]]
        named = {"name": ref["name"], "namespace": ref["namespace"]}
        yield _head("PodMetrics", named, of, pod) | {"containers": containers}


def _head(kind: str, named: Document, of: Mapping[str, Any] | None, figures: Mapping[str, Any]) -> Document:
    at = figures["cpu"]["time"]
    labels = get(of, "metadata", "labels", default=None) if of is not None else None
    metadata = named | {"creationTimestamp": at} | ({"labels": labels} if labels else {})
    window = f"{float(figures.get('windowSeconds', 0)):.3f}s"
    return {"kind": kind, "apiVersion": GROUP_VERSION, "metadata": metadata, "timestamp": at, "window": window}


def _usage(figures: Mapping[str, Any]) -> Document:
    cpu, memory = int(figures["cpu"]["usageNanoCores"]), int(figures["memory"]["workingSetBytes"])
    return {"cpu": f"{cpu}n", "memory": f"{memory // 1024}Ki"}


# ---- discovery -------------------------------------------------------------------------------------------------------

_ROWS = (("nodes", False, "NodeMetrics"), ("pods", True, "PodMetrics"))


def resource_list() -> Document:
    """``/apis/metrics.k8s.io/v1beta1``."""
    rows = [
        {"name": name, "singularName": "", "namespaced": namespaced, "kind": kind, "verbs": ["get", "list"]}
        for name, namespaced, kind in _ROWS
    ]
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": GROUP_VERSION, "resources": rows}


def aggregated() -> Document:
    """The group's item of aggregated discovery."""
    resources = [
        {
            "resource": name,
            "responseKind": {"group": GROUP, "version": VERSION, "kind": kind},
            "scope": "Namespaced" if namespaced else "Cluster",
            "singularResource": "",
            "verbs": ["get", "list"],
        }
        for name, namespaced, kind in _ROWS
    ]
    version = {"version": VERSION, "resources": resources, "freshness": "Current"}
    return {"metadata": {"name": GROUP, "creationTimestamp": None}, "versions": [version]}
