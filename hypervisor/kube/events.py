"""Events: what a user reads in ``kubectl describe``. Recording never waits and never fails.

An event that says the same of the same object again within `SAME_S` makes the first one's count grow instead of another
object, as upstream's recorders do. What cannot be written (no server, queue full) is dropped: events are for people.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import structlog

from hypervisor.errors import HvError
from hypervisor.kube.client import ApiClient, Object
from hypervisor.kube.errors import ApiError
from hypervisor.kube.meta import get, now
from hypervisor.kube.resources import EVENTS, Resource

SAME_S = 600.0
QUEUE = 1000
REMEMBERED = 4096
MAX_MESSAGE = 1024
"""Characters; the API server takes no more."""
EventType = Literal["Normal", "Warning"]


@dataclass(frozen=True, slots=True)
class _Said:
    """What makes two events the same."""

    namespace: str
    involved: tuple[tuple[str, str], ...]
    type: EventType
    reason: str
    message: str


@dataclass(slots=True)
class _Known:
    name: str
    count: int
    at: float


def reference(resource: Resource, obj: Mapping[str, Any], field_path: str = "") -> Object:
    """The ``ObjectReference`` of an object, or of a part of it as ``spec.containers{web}``."""
    return _reference_of({**obj, "apiVersion": resource.api_version, "kind": resource.kind}, field_path)


def _reference_of(obj: Mapping[str, Any], field_path: str = "") -> Object:
    """The same of an object that says itself of which kind it is, as all of an informer do."""
    parts = {
        "apiVersion": obj.get("apiVersion"),
        "kind": obj.get("kind"),
        "name": get(obj, "metadata", "name", default=""),
        "namespace": get(obj, "metadata", "namespace", default=""),
        "uid": get(obj, "metadata", "uid", default=""),
        "resourceVersion": get(obj, "metadata", "resourceVersion", default=""),
        "fieldPath": field_path,
    }
    return {key: value for key, value in parts.items() if value}


class EventRecorder:
    """Writes events as one component on one host. `run` is to be run as a task."""

    def __init__(self, client: ApiClient, component: str, host: str = "") -> None:
        self._client = client
        self._source = {"component": component} | ({"host": host} if host else {})
        self._queue: asyncio.Queue[_Said] = asyncio.Queue(QUEUE)
        self._known: OrderedDict[_Said, _Known] = OrderedDict()
        self.dropped = 0
        self._log = structlog.get_logger()

    def record(self, involved: Mapping[str, Any], kind: EventType, reason: str, message: str) -> None:
        """Notes that something happened to this object, or to what this `reference` names."""
        named = _reference_of(involved) if "metadata" in involved else involved
        kept = tuple(sorted((k, str(v)) for k, v in named.items() if k != "resourceVersion"))
        namespace = str(named.get("namespace") or "default")
        try:
            self._queue.put_nowait(_Said(namespace, kept, kind, reason, message[:MAX_MESSAGE]))
        except asyncio.QueueFull:
            self.dropped += 1

    async def run(self) -> None:
        """Writes for ever what was recorded, one after the other."""
        while True:
            said = await self._queue.get()
            try:
                await self._write(said)
            except (HvError, OSError) as e:
                self.dropped += 1
                self._log.debug("event dropped", reason=said.reason, error=str(e))
            finally:
                self._queue.task_done()

    async def flush(self) -> None:
        """Waits until everything recorded so far was written or dropped."""
        await self._queue.join()

    async def _write(self, said: _Said) -> None:
        known = self._known.get(said)
        if known is not None and time.monotonic() - known.at < SAME_S and await self._again(said, known):
            return
        created = await self._client.create(EVENTS, self._object(said), said.namespace)
        self._known[said] = _Known(str(get(created, "metadata", "name")), 1, time.monotonic())
        self._known.move_to_end(said)
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)

    async def _again(self, said: _Said, known: _Known) -> bool:
        """False when the event that is to be counted has gone."""
        known.count += 1
        known.at = time.monotonic()
        change = {"count": known.count, "lastTimestamp": now()}
        try:
            await self._client.patch(EVENTS, known.name, said.namespace, change, how="strategic")
        except ApiError as e:
            if e.code == 404:
                return False
            raise
        return True

    def _object(self, said: _Said) -> Object:
        involved = dict(said.involved)
        moment = now()
        digest = hashlib.sha256(f"{said}{time.time_ns()}".encode()).hexdigest()[:16]
        return {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": f"{involved.get('name', 'unknown')[:200]}.{digest}", "namespace": said.namespace},
            "involvedObject": involved,
            "reason": said.reason,
            "message": said.message,
            "type": said.type,
            "count": 1,
            "firstTimestamp": moment,
            "lastTimestamp": moment,
            "source": self._source,
            "reportingComponent": self._source["component"],
            "reportingInstance": self._source.get("host") or self._source["component"],
        }
