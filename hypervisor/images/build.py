"""Layers in, one EROFS disk out: what the worker process does."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from hypervisor.errors import HvError, InvalidInput
from hypervisor.images.blobs import Blob, Budget, ByteStream, decoded
from hypervisor.images.disk import DiskWriter, space_error
from hypervisor.images.layers import apply_layer
from hypervisor.images.model import Limits, Progress, ProgressEvent
from hypervisor.images.tree import Tree

_PROGRESS_INTERVAL_S = 0.1


@dataclass(frozen=True)
class Layer:
    """One layer: where it lies, and the sha256 (hex) of its uncompressed tar stream as the image's config has it."""

    blob: Blob
    diff_id: str


@dataclass(frozen=True)
class BuildJob:
    """Make the disk of the image ``image_id`` from its layers, bottom one first, as the new file ``output``."""

    image_id: str
    layers: tuple[Layer, ...]
    output: Path
    limits: Limits


@dataclass(frozen=True)
class ExpandJob:
    """Decompress an archive into the new file ``output``."""

    blob: Blob
    output: Path
    limits: Limits


class _Meter:
    """Tells progress by the bytes that were read, at most ten times a second."""

    def __init__(self, phase: str, total: int, progress: Progress) -> None:
        self._phase, self._total, self._progress = phase, total, progress
        self._next = 0.0
        self.done = 0

    def add(self, count: int, detail: str = "") -> None:
        self.done += count
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _PROGRESS_INTERVAL_S
            self.tell(detail)

    def tell(self, detail: str = "") -> None:
        self._progress(ProgressEvent(self._phase, self.done, self._total, "bytes", detail))


class _MeteredBudget(Budget):
    """A budget that tells how far the reading has come."""

    def __init__(self, limits: Limits, meter: _Meter) -> None:
        super().__init__(limits)
        self._meter = meter
        self.detail = ""

    def stored(self, count: int) -> None:
        super().stored(count)
        self._meter.add(count, self.detail)


def build_disk(job: BuildJob, progress: Progress) -> None:
    """Do the job. Every digest is checked: a disk is stored under the config's digest, and what the config does not
    vouch for (by the layers' ``diff_ids``) must never get there.

    :raises InvalidInput: a layer is damaged, hostile, or another than the config says
    :raises ResourceExhausted: beyond the limits, or no room on the disk
    """
    meter = _Meter("unpack", sum(layer.blob.size for layer in job.layers), progress)
    budget = _MeteredBudget(job.limits, meter)
    tree = Tree(on_new=budget.entry)
    with DiskWriter(job.output) as disk:
        for index, layer in enumerate(job.layers, start=1):
            budget.detail = f"layer {index} of {len(job.layers)}"
            try:
                _apply(layer, tree, disk, budget)
            except InvalidInput as error:
                raise InvalidInput(f"{budget.detail}: {error}") from error
        meter.tell()
        progress(ProgressEvent("write", 0, None, "bytes", "directories and inodes"))
        disk.finish(tree, job.image_id)


def _apply(layer: Layer, tree: Tree, disk: DiskWriter, budget: Budget) -> None:
    stream = ByteStream(decoded(layer.blob, budget), layer.blob.label)
    apply_layer(stream, tree, disk, budget)
    if stream.drain() != layer.diff_id:
        raise InvalidInput(f"{layer.blob.label} is not the layer that the image's config names (diff_id differs)")


def expand(job: ExpandJob, progress: Progress) -> None:
    """Do the job.

    :raises InvalidInput: the archive is damaged
    :raises ResourceExhausted: beyond the limits, or no room on the disk
    """
    meter = _Meter("expand", job.blob.size, progress)
    budget = _MeteredBudget(job.limits, meter)
    try:
        with job.output.open("xb") as file:
            for piece in decoded(job.blob, budget):
                file.write(piece)
    except OSError as error:
        raise space_error(error, job.output) from error


def run(job: BuildJob | ExpandJob, progress: Progress) -> None:
    """Do either job; an error of the operating system that nobody foresaw becomes one of the package's own."""
    try:
        if isinstance(job, BuildJob):
            build_disk(job, progress)
        else:
            expand(job, progress)
    except OSError as error:
        raise HvError(f"cannot read {error.filename or 'the image'}: {error.strerror}") from error
