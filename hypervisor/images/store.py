"""The image service of a host: pull, import, look up, lease, remove.

Theory of operation
-------------------
Every image goes through the same steps, whatever its source::

    find out what it is     manifest and config; from now on its id (the config's sha256) is known
    take its building lock  a second task or process that wants the same image waits here, and then finds it made
    fetch                   pulls only: layers into a staging folder
    build                   a worker process checks the layers and makes the disk in the staging folder
    publish                 rename into place, then names point to it

Until "publish" nothing outside of staging has changed; staging goes when the call ends, however it ends, and what a
killed process leaves is swept by :meth:`ImageStore.open`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from hypervisor.errors import InvalidInput, NotFound
from hypervisor.images import sources
from hypervisor.images.blobs import Blob, is_compressed
from hypervisor.images.build import BuildJob, ExpandJob
from hypervisor.images.catalog import DISK, Catalog, Match, Name
from hypervisor.images.credentials import Credentials
from hypervisor.images.fetch import Fetcher, Resolved
from hypervisor.images.files import ArchiveFiles
from hypervisor.images.locks import locked_long
from hypervisor.images.model import Image, Limits, Platform, Progress, ProgressEvent, no_progress
from hypervisor.images.policy import PullPolicy
from hypervisor.images.reference import LOCAL_REGISTRY, Reference, has_registry, parse
from hypervisor.images.sources import FoundImage
from hypervisor.images.work import run_job


class Lease:
    """Keeps an image from being removed. A context manager; :meth:`release` may be called any number of times."""

    def __init__(self, image: Image, descriptor: int) -> None:
        self.image = image
        self._descriptor: int | None = descriptor

    def release(self) -> None:
        """The image may go."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


@dataclass(frozen=True)
class _Job:
    """What one pull or import works with."""

    staging: Path
    progress: Progress


class ImageStore:
    """The images of one host, in one directory that is the store's own."""

    def __init__(self, directory: Path, *, platform: Platform | None = None, limits: Limits | None = None) -> None:
        """Make the directory if need be; see :meth:`open` for a store that sweeps first.

        :param platform: what images must be made for; this host's by default
        :param limits: what one image may ask for
        :raises Unavailable: the directory cannot be made
        """
        self._catalog = Catalog(directory)
        self._platform = platform or Platform.of_host()
        self._limits = limits or Limits()

    @classmethod
    async def open(cls, directory: Path, *, platform: Platform | None = None, limits: Limits | None = None) -> Self:
        """A store, after removing what interrupted pulls and imports have left in its directory."""
        store = await asyncio.to_thread(cls, directory, platform=platform, limits=limits)
        await asyncio.to_thread(store._catalog.sweep)
        return store

    # ---- looking -----------------------------------------------------------------------------------------------------

    def get(self, reference: str) -> Image:
        """The stored image of this name or id (or a prefix of at least 12 digits).

        A short name is looked for among the imported images (``localhost/NAME``), then among the samples
        (``localhost/podvisor/NAME``), then as docker has it (``docker.io/library/NAME``).

        :raises NotFound: it is not here
        :raises InvalidInput: it is no name
        """
        match = self._catalog.find(reference)
        if match is None:
            raise NotFound(f"image {reference} is not here; get it with: hv image pull {reference}")
        return match.image

    def list(self) -> list[Image]:
        """All stored images."""
        return self._catalog.images()

    def lease(self, reference: str | Image) -> Lease:
        """Use an image: until the lease is released, or this process ends, it is not removed.

        :raises NotFound: it is not here
        """
        image = reference if isinstance(reference, Image) else self.get(reference)
        return Lease(image, self._catalog.lease(image))

    # ---- removing ----------------------------------------------------------------------------------------------------

    def remove(self, reference: str) -> Image | None:
        """Remove a name; with its last name, or if given by its id, the image, which is then the result.

        :raises NotFound: it is not here
        :raises Conflict: it is leased; nothing was changed
        """
        return self._catalog.remove(reference)

    def prune(self, in_use: set[str], *, dangling_only: bool = False) -> Sequence[Image]:
        """Remove all images but those in use; they are the result.

        :param in_use: ids of images to keep, besides those that are leased
        :param dangling_only: keep those that have a name too
        """
        return self._catalog.prune(in_use, dangling_only=dangling_only)

    # ---- pulling -----------------------------------------------------------------------------------------------------

    async def pull(
        self,
        reference: str,
        *,
        policy: PullPolicy | str = PullPolicy.MISSING,
        credentials: Credentials | None = None,
        progress: Progress = no_progress,
    ) -> Image:
        """The image, fetched from its registry if the policy says so. On failure, and if cancelled, nothing changes.

        Names under ``localhost/`` and ids mean imported images: for them ``always`` is ``missing``.

        :param credentials: for the registry; by default what ``hv image login``, skopeo, podman or docker kept
        :raises InvalidInput: no name; access refused; a broken, hostile or unfit image
        :raises NotFound: the registry has none such, or it is not here and the policy is ``never``
        :raises Unavailable: the registry cannot be reached
        :raises ResourceExhausted: no room, or beyond the limits
        """
        policy = PullPolicy.parse(policy)
        match = await asyncio.to_thread(self._catalog.find, reference)
        if match is not None and (_is_local(match, reference) or not policy.must_pull(present=True)):
            return match.image
        if policy is PullPolicy.NEVER:
            raise NotFound(f"image {reference} is not here, and the pull policy is never")
        target = parse(reference)
        if target.is_local:
            raise NotFound(f"image {target} is not here; names under {LOCAL_REGISTRY}/ are imported: hv image import")
        async with self._staging() as folder:
            return await self._pull(target, credentials, _Job(folder, progress))

    async def _pull(self, target: Reference, credentials: Credentials | None, job: _Job) -> Image:
        fetcher = Fetcher(job.staging, self._platform, self._limits, credentials)
        job.progress(ProgressEvent("resolve", detail=str(target)))
        resolved = await fetcher.resolve(target)
        image_id = resolved.manifest.config.digest
        made = []
        async with locked_long(self._catalog.building / image_id):
            if await asyncio.to_thread(self._catalog.get, image_id) is None:
                found = await self._fetch(fetcher, resolved, target, job)
                made.append(await self._build(found, job))
            name = Name(image_id, resolved.digest)
            await asyncio.to_thread(self._catalog.publish, made, {target: name})
        return self._finished(str(target), job)

    async def _fetch(self, fetcher: Fetcher, resolved: Resolved, target: Reference, job: _Job) -> FoundImage:
        folder = job.staging / "download"
        await fetcher.download(resolved, folder, job.progress)
        reader = sources.open_folder(folder, self._platform, self._limits)
        return await asyncio.to_thread(reader.fetched, resolved.manifest, [target], resolved.digest)

    # ---- importing ---------------------------------------------------------------------------------------------------

    async def import_archive(
        self, path: Path | str, *, name: str | None = None, progress: Progress = no_progress
    ) -> Sequence[Image]:
        """Store the images of an OCI layout (a folder or an archive) or a docker archive, all of them or none.

        :param name: for a source with one image, instead of the names that it states; one without a registry goes
            under ``localhost/``
        :raises InvalidInput: no such source, or a broken, hostile or unfit one
        :raises ResourceExhausted: no room, or beyond the limits
        """
        wanted = parse(name, default_registry=LOCAL_REGISTRY) if name is not None else None
        if wanted is not None and wanted.digest:
            raise InvalidInput(f"image {name}: an import is named by a tag, not by a digest")
        async with self._staging() as folder:
            job = _Job(folder, progress)
            found = await self._read(Path(path), job)
            if wanted is not None and len(found) != 1:
                raise InvalidInput(f"{path} holds {len(found)} images; a name can be given to one only")
            return await self._import(found, wanted, job)

    async def _read(self, path: Path, job: _Job) -> Sequence[FoundImage]:
        try:
            if await asyncio.to_thread(path.is_dir):
                reader = sources.open_folder(path, self._platform, self._limits)
            else:
                reader = await self._open_archive(path, job)
            return await asyncio.to_thread(reader.images)
        except InvalidInput as error:
            raise InvalidInput(f"{path}: {error}") from error
        except OSError as error:
            raise InvalidInput(f"cannot read {path}: {error.strerror}") from error

    async def _open_archive(self, path: Path, job: _Job) -> sources.Reader:
        start, size = await asyncio.to_thread(_peek, path)
        if is_compressed(start):
            expanded = job.staging / "archive.tar"
            await run_job(ExpandJob(Blob(path, 0, size), expanded, self._limits), job.progress)
            path = expanded
        files = await asyncio.to_thread(ArchiveFiles, path, self._limits)
        return sources.Reader(files, self._platform, self._limits)

    async def _import(self, found: Sequence[FoundImage], wanted: Reference | None, job: _Job) -> Sequence[Image]:
        by_id = {image.image_id: image for image in found}
        made = []
        async with AsyncExitStack() as locks:
            for image_id, image in sorted(by_id.items()):  # in one order everywhere, so that nobody waits in a circle
                await locks.enter_async_context(locked_long(self._catalog.building / image_id))
                if await asyncio.to_thread(self._catalog.get, image_id) is None:
                    made.append(await self._build(image, job))
            names = {
                name: Name(image.image_id, image.digest)
                for image in found
                for name in ([wanted] if wanted else image.names)
            }
            await asyncio.to_thread(self._catalog.publish, made, names)
        return [self._finished(image_id, job) for image_id in by_id]

    # ---- both --------------------------------------------------------------------------------------------------------

    async def _build(self, found: FoundImage, job: _Job) -> Image:
        """The image, with its disk in staging."""
        folder = job.staging / found.image_id
        folder.mkdir()
        disk = folder / DISK
        await run_job(BuildJob(found.image_id, found.layers, disk, self._limits), job.progress)
        return Image(
            id=found.image_id,
            names=(),
            digest=found.digest,
            disk=disk,
            size_bytes=disk.stat().st_blocks * 512,
            created=found.document.created,
            config=found.document.config,
        )

    def _finished(self, reference: str, job: _Job) -> Image:
        image = self.get(reference)
        job.progress(ProgressEvent("done", image.size_bytes, image.size_bytes, "bytes", image.short_id))
        return image

    @asynccontextmanager
    async def _staging(self) -> AsyncIterator[Path]:
        folder = self._catalog.staging()
        path = folder.__enter__()  # quick; in a thread, a cancellation could lose what it has just made
        try:
            yield path
        finally:
            # Removing goes on to its end in its thread, also when this task is cancelled (again) meanwhile.
            await asyncio.shield(asyncio.to_thread(folder.__exit__, None, None, None))


def _is_local(match: Match, reference: str) -> bool:
    """Whether what was found has no registry to ask: found by its id, or imported and asked for by its full name."""
    if match.name is None:
        return True
    return has_registry(reference) and parse(reference).is_local


def _peek(path: Path) -> tuple[bytes, int]:
    if not path.is_file():
        raise InvalidInput("no such file, or no regular one" if not path.exists() else "neither a file nor a folder")
    with path.open("rb") as file:
        return file.read(8), path.stat().st_size
