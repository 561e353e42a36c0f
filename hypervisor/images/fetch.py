"""Fetches images from registries with skopeo.

First the manifest: its digest says what the tag means now, and its config's digest whether the image is here already.
Then the image by that digest, so that a tag that moves in between changes nothing. skopeo's ``dir:`` form is used
because it keeps manifest and config byte for byte (``oci:`` rewrites docker's, and with that changes the image's id).
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from hypervisor.errors import InvalidInput, Timeout
from hypervisor.images import documents, skopeo
from hypervisor.images.credentials import Credentials, auth_options, tls_options
from hypervisor.images.documents import Manifest
from hypervisor.images.model import Limits, Platform, Progress, ProgressEvent
from hypervisor.images.reference import Reference, digest_of

_INSPECT_TIMEOUT_S = 120.0
_STALL_S = 300.0
_LOOK_INTERVAL_S = 0.2


@dataclass(frozen=True)
class Resolved:
    """What a name means in its registry now.

    :ivar pinned: the platform's manifest by digest
    :ivar digest: ``sha256:<hex>`` of what the name points at: that manifest, or an index of several
    """

    pinned: Reference
    digest: str
    manifest: Manifest


@dataclass(frozen=True)
class Fetcher:
    """Fetches for one host. ``folder`` is a private scratch folder of one pull."""

    folder: Path
    platform: Platform
    limits: Limits
    credentials: Credentials | None

    async def resolve(self, reference: Reference) -> Resolved:
        """Ask the registry what ``reference`` means.

        :raises NotFound: no such image there
        :raises InvalidInput: access refused, nothing for this platform, or no image at all
        :raises Unavailable: the registry cannot be reached
        """
        data = await self._manifest(reference)
        digest = digest_of(data)
        pinned = reference.with_digest(digest)
        if documents.is_index(data):
            listed = documents.parse_index(data, self.limits, what=f"image {reference}")
            chosen = documents.choose(listed, self.platform, what=f"image {reference}")
            pinned = reference.with_digest(f"sha256:{chosen.digest}")
            data = await self._manifest(pinned)
        return Resolved(pinned, digest, documents.parse_manifest(data, self.limits, what=f"image {reference}"))

    async def download(self, resolved: Resolved, target: Path, progress: Progress) -> None:
        """Fetch config and layers into the new folder ``target``, in skopeo's ``dir:`` form.

        :raises Timeout: nothing arrives any more
        :raises HvError: as :func:`hypervisor.images.skopeo.run` has it
        """
        await asyncio.to_thread(target.mkdir, mode=0o700)
        copying = asyncio.create_task(self._copy(resolved, target))
        try:
            await _watch(copying, target, resolved, progress)
        finally:
            copying.cancel()
            await asyncio.gather(copying, return_exceptions=True)

    async def _manifest(self, reference: Reference) -> bytes:
        options = [*auth_options(reference, self.credentials, self.folder), *tls_options(reference, "")]
        data = await skopeo.run(
            ["inspect", "--raw", *options, f"docker://{reference}"],
            what=f"image {reference}",
            timeout=_INSPECT_TIMEOUT_S,
        )
        if len(data) > self.limits.document_bytes:
            raise InvalidInput(f"image {reference}: a manifest of {len(data)} bytes")
        if reference.digest and digest_of(data) != reference.digest:
            raise InvalidInput(f"image {reference}: the registry sent something else, with digest {digest_of(data)}")
        return data

    async def _copy(self, resolved: Resolved, target: Path) -> None:
        source = resolved.pinned
        options = [*auth_options(source, self.credentials, self.folder), *tls_options(source, "src-")]
        where = ["--tmpdir", str(self.folder)]
        await skopeo.run(
            [*where, "copy", "--quiet", *_renamed(options), f"docker://{source}", f"dir:{target}"],
            what=f"image {source}",
        )


def _renamed(options: list[str]) -> list[str]:
    """``copy`` has a source and a destination, and so other names for the same options."""
    return ["--src-authfile" if option == "--authfile" else option for option in options]


async def _watch(copying: asyncio.Task[None], target: Path, resolved: Resolved, progress: Progress) -> None:
    """Report the bytes that have arrived until the copy is done; skopeo itself tells nothing to a pipe."""
    loop = asyncio.get_running_loop()
    total = resolved.manifest.size
    done, moved = -1, loop.time()
    while not copying.done():
        arrived = await asyncio.to_thread(_arrived, target)
        if arrived != done:
            done, moved = arrived, loop.time()
            progress(ProgressEvent("download", min(done, total), total, "bytes", str(resolved.pinned)))
        elif loop.time() - moved > _STALL_S:
            raise Timeout(f"image {resolved.pinned}: nothing has arrived for {_STALL_S:.0f} s")
        await asyncio.wait([copying], timeout=_LOOK_INTERVAL_S)
    await copying
    progress(ProgressEvent("download", total, total, "bytes", str(resolved.pinned)))


def _arrived(folder: Path) -> int:
    size = 0
    for path in folder.iterdir():
        try:
            size += path.stat().st_size
        except FileNotFoundError:  # renamed just now; the next look counts it
            continue
    return size
