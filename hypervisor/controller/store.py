"""A pod's folder on disk. What a caller was told is on disk is on disk, whatever happens to this process or the power.

``pod.json`` makes a pod exist and never changes; it is written first and removed first. ``status.json`` may lag behind
the truth by what the agent can tell again.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypervisor.controller.paths import HostPaths, PodPaths
from hypervisor.controller.record import PodRecord, from_json, to_json
from hypervisor.errors import HvError, ResourceExhausted

VERSION = 1
CLUSTER = "cluster"
"""The source of pods that the cluster's API server bound to this node."""


@dataclass(frozen=True, slots=True)
class StoredPod:
    """What was asked for.

    :ivar source: ``api``, ``cluster`` for a pod of the cluster's API server, or ``file:<name>`` for a static pod
    :ivar digest: of a static pod's manifest: another one means another pod
    :ivar created: seconds since the epoch
    """

    uid: str
    created: float
    source: str
    digest: str
    manifest: dict[str, Any]

    @property
    def static_file(self) -> str | None:
        """The name of the static pod's file; None for pods of the API."""
        return self.source.removeprefix("file:") if self.source.startswith("file:") else None


def new_uid(paths: HostPaths) -> str:
    """A uid whose folder is not taken."""
    while True:
        uid = str(uuid.uuid4())
        if not paths.pod(uid).directory.exists():
            return uid


def create(paths: PodPaths, pod: StoredPod, prepare: Callable[[PodPaths], None] | None = None) -> None:
    """Makes the pod's folder; on return ``pod.json`` is on stable storage.

    :param prepare: puts into it what the pod starts with
    :raises ResourceExhausted: the disk is full; nothing is left behind
    """
    try:
        paths.directory.mkdir(mode=0o711)
        if prepare is not None:
            prepare(paths)
        body = {"version": VERSION, "uid": pod.uid, "created": pod.created, "source": pod.source}
        write_durably(paths.pod, body | {"digest": pod.digest, "manifest": pod.manifest})
        sync_directory(paths.directory.parent)
    except OSError as e:
        shutil.rmtree(paths.directory, ignore_errors=True)
        raise ResourceExhausted(f"cannot store the pod in {paths.directory}: {e.strerror}") from e


def load(paths: PodPaths) -> StoredPod:
    """:raises HvError: ``pod.json`` is damaged"""
    try:
        data = json.loads(paths.pod.read_bytes())
        if data["version"] != VERSION:
            raise ValueError(f"version {data['version']}")
        return StoredPod(data["uid"], data["created"], data["source"], data["digest"], data["manifest"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise HvError(f"{paths.pod} is damaged ({e})") from e


def load_record(paths: PodPaths) -> PodRecord | None:
    """The last written status; None when there is none or it is damaged (the pod then begins anew)."""
    try:
        return from_json(json.loads(paths.status.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save_record(paths: PodPaths, record: PodRecord, *, durable: bool = False) -> None:
    """Replaces ``status.json`` as a whole.

    :param durable: on return it is on stable storage (10 ms and more on a disk)
    """
    if durable:
        write_durably(paths.status, to_json(record))
    else:
        _replace(paths.status, to_json(record), sync=False)


def remove(paths: PodPaths) -> None:
    """The pod ceases to exist; harmless if it has. What cannot be removed now is swept at the next start."""
    paths.pod.unlink(missing_ok=True)
    shutil.rmtree(paths.directory, ignore_errors=True)


def write_durably(path: Path, value: object, *, mode: int = 0o600) -> None:
    """JSON to `path`, all or nothing, on stable storage on return."""
    _replace(path, value, sync=True, mode=mode)
    sync_directory(path.parent)


def _replace(path: Path, value: object, *, sync: bool, mode: int = 0o600) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode), "w") as file:
            json.dump(value, file, separators=(",", ":"))
            file.flush()
            if sync:
                os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def sync_directory(path: Path) -> None:
    """Makes renames and creations in `path` last."""
    _sync(path, os.O_DIRECTORY)


def sync_file(path: Path) -> None:
    """Makes the content of `path` last."""
    _sync(path, 0)


def _sync(path: Path, flags: int) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
