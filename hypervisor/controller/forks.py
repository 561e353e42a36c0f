"""A running pod becomes several: children that go on from a snapshot of one moment.

A child is a pod of its own from the start: its folder gets the snapshot as ``suspended/`` and the parent's record as
of a pod that is being resumed, and then the manifest that makes it exist. So whatever happens to the daemon, a child
is either there and goes on, or was never there.
"""

from __future__ import annotations

import asyncio
import copy
import io
import json
import re
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hypervisor.controller import store
from hypervisor.controller.manifest import FORK_ANNOTATION, FORK_OF_ANNOTATION
from hypervisor.controller.paths import PodPaths
from hypervisor.controller.record import Intent, PodRecord
from hypervisor.controller.suspension import remove_folder
from hypervisor.errors import Conflict, InvalidInput
from hypervisor.introspect.agent import AgentClient
from hypervisor.vmm.snapshots.snapshot import Snapshot

if TYPE_CHECKING:
    from hypervisor.controller.pods import Pods
    from hypervisor.controller.podvm import PodVm

MAX_CHILDREN = 100
_NUMBERS = re.compile(r"([0-9]{1,3})/([0-9]{1,3})")
NOTE = "run/podvisor-fork.json"
"""In each container of a child: ``{"parent", "child", "of"}``."""


async def fork(pods: Pods, parent: PodVm, count: int) -> dict[str, Any]:
    """`count` children of a pod that runs; their names, and what the snapshot took. Each is accepted on return.

    :raises InvalidInput: the count; Conflict: the pod does not run; ResourceExhausted: the host cannot hold them
    :raises HvError: what failed; children that had been accepted go on
    """
    if not 1 <= count <= MAX_CHILDREN:
        raise InvalidInput(f"is {count}; give 1 to {MAX_CHILDREN}", where="count")
    if parent.stored.source != "api":
        raise Conflict(f"pod {parent.pod.name} is not this host's own; its owner makes others of it")
    folder = parent.paths.fork
    took = await parent.snapshots.take(parent.machine, folder, "fork")
    try:
        record, names = _record_of(parent), []
        snapshot = await asyncio.to_thread(Snapshot.read, folder)
        for k in range(1, count + 1):
            manifest = _manifest_of(pods, parent, k, count)

            def prepare(paths: PodPaths) -> None:
                snapshot.copy(paths.suspended)
                store.save_record(paths, record, durable=True)

            child = await pods.create(manifest, prepare=prepare)
            names.append(child.pod.name)
    finally:
        await asyncio.to_thread(remove_folder, folder)
    return {"children": names, "took": dict(took)}


def _record_of(parent: PodVm) -> PodRecord:
    return replace(parent.journal.record, intent=Intent(), suspend="resuming", vm_up=False, timing={})


def _manifest_of(pods: Pods, parent: PodVm, k: int, count: int) -> dict[str, Any]:
    manifest: dict[str, Any] = copy.deepcopy(parent.stored.manifest)
    metadata = manifest["metadata"]
    numbers = iter(range(1, 10**6))
    name = parent.pod.name[:56].rstrip("-.")
    names = (f"{name}-{n}" for n in numbers)
    metadata["name"] = next(n for n in names if pods.peek(parent.pod.namespace, n) is None)
    metadata.pop("uid", None)
    metadata["annotations"] = {
        **(metadata.get("annotations") or {}), FORK_OF_ANNOTATION: parent.pod.name, FORK_ANNOTATION: f"{k}/{count}"
    }  # fmt: skip
    return manifest


async def tell_fork(agent: AgentClient, manifest: Mapping[str, Any], containers: Sequence[str]) -> None:
    """Puts the note into a child's containers; does nothing in a pod that is none. Raises `HvError`."""
    annotations = manifest["metadata"].get("annotations") or {}
    numbers = _NUMBERS.fullmatch(str(annotations.get(FORK_ANNOTATION)))
    if numbers is None:
        return
    child, count = map(int, numbers.groups())
    note = {"parent": annotations.get(FORK_OF_ANNOTATION), "child": child, "of": count}
    data = _tar(json.dumps(note).encode() + b"\n")
    for container in containers:
        async with agent.stream("archive.put", {"container": container, "path": "/"}) as stream:
            await stream.send_stdin(data)
            await stream.close_stdin()
            async for _ in stream.frames():
                pass
            if stream.ending is not None and stream.ending.error is not None:
                raise stream.ending.error


def _tar(content: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as archive:
        member = tarfile.TarInfo(NOTE)
        member.size, member.mode = len(content), 0o644
        archive.addfile(member, io.BytesIO(content))
    return file.getvalue()
