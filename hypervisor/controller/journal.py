"""The one place where a pod's record changes: each change goes to disk, then to whoever watches."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

from hypervisor.controller import store
from hypervisor.controller.concurrency import Topic
from hypervisor.controller.paths import PodPaths
from hypervisor.controller.podstatus import phase_of
from hypervisor.controller.record import ContainerRecord, Intent, PodRecord, Running
from hypervisor.controller.spec import PodSpec, RestartPolicy


def new_record(pod: PodSpec) -> PodRecord:
    """The record of a pod of which nothing has happened."""
    return PodRecord(
        containers=tuple(ContainerRecord(c.name) for c in pod.containers),
        init_containers=tuple(ContainerRecord(c.name, sidecar=c.sidecar) for c in pod.init_containers),
    )


MAX_NOTICES = 64


@dataclass(frozen=True, slots=True)
class Notice:
    """Something worth an Event that leaves no trace in the record: a probe that failed, a hook.

    :ivar number: grows by one with each
    """

    number: int
    kind: Literal["Normal", "Warning"]
    reason: str
    message: str
    container: str = ""


class Journal:
    """A pod's record and its changes. A full disk does not stop the pod: the record in memory goes on."""

    def __init__(self, paths: PodPaths, record: PodRecord, policy: RestartPolicy) -> None:
        self._paths = paths
        self._record = record
        self._policy: RestartPolicy = policy
        self.topic = Topic()
        self.notices: deque[Notice] = deque(maxlen=MAX_NOTICES)
        self.closed = False

    @property
    def record(self) -> PodRecord:
        """As of now."""
        return self._record

    def update(self, **changes: Any) -> None:
        """Replaces fields of the record."""
        self._set(replace(self._record, **changes))

    def container(self, name: str, **changes: Any) -> None:
        """Replaces fields of one container, and the phase by what the containers' states add up to.

        One that does not run is neither started nor ready.
        """
        if not isinstance(changes.get("state", self._record.container(name).state), Running):
            changes |= {"started": False, "ready": False}
        record = self._record.with_container(name, **changes)
        if not record.terminal:
            phase = phase_of(record, self._policy)
            started = record.started_at or (time.time() if phase == "Running" else 0.0)
            record = replace(record, phase=phase, started_at=started)
        if record.ready != self._record.ready:
            record = replace(record, ready_at=time.time())
        self._set(record)

    def note(self, kind: Literal["Normal", "Warning"], reason: str, message: str, container: str = "") -> None:
        """Tells whoever watches of something that the record does not keep."""
        number = self.notices[-1].number + 1 if self.notices else 1
        self.notices.append(Notice(number, kind, reason, message[:1024], container))
        self.topic.publish()

    async def intend(self, intent: Intent) -> None:
        """Records what the user wants; on return it is on stable storage."""
        self.update(intent=intent)
        await asyncio.to_thread(self._sync)

    async def settle(self, **changes: Any) -> None:
        """Replaces fields; on return they are on stable storage."""
        self.update(**changes)
        await asyncio.to_thread(self._sync)

    def _set(self, record: PodRecord) -> None:
        if record == self._record:
            return
        self._record = record
        if not self.closed:
            with suppress(OSError):
                store.save_record(self._paths, record)
        self.topic.publish()

    def _sync(self) -> None:
        with suppress(FileNotFoundError):  # the pod has gone already: nothing is left to be remembered
            store.sync_file(self._paths.status)
            store.sync_directory(self._paths.directory)

    def close(self) -> None:
        """The pod's folder is about to go: nothing is written any more, and watchers hear of it."""
        self.closed = True
        self.topic.publish()
