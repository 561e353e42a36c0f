"""Bytes of a blob, verified while they stream by: size, digest, decompression, and how far it may swell.

A blob is a range of a host file: a whole file of an OCI layout, or a member inside an uncompressed archive, which is
therefore never copied out. What it is compressed with shows in its first bytes; media types lie too often.

Nothing here is to be believed until the stream has been drained: the digest is known only at the end. So whoever
builds something from a stream builds it in a staging folder.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hypervisor.errors import HostUnfit, InvalidInput, ResourceExhausted
from hypervisor.images import zstd
from hypervisor.images.model import Limits

CHUNK = 1 << 20


@dataclass(frozen=True)
class Blob:
    """``size`` bytes at ``offset`` of the file ``path``; ``digest`` (hex sha256) is what they must have, if stated."""

    path: Path
    offset: int
    size: int
    digest: str | None = None

    @property
    def label(self) -> str:
        """What to call it in an error."""
        return f"blob sha256:{self.digest[:12]}" if self.digest else f"blob in {self.path.name}"

    def chunks(self) -> Iterator[bytes]:
        """The bytes as stored, in pieces of at most 1 MiB.

        :raises InvalidInput: the file is shorter, or (after the last piece) the digest is another
        """
        digest = hashlib.sha256() if self.digest else None
        with self.path.open("rb", buffering=0) as file:
            at, end = self.offset, self.offset + self.size
            while at < end:
                chunk = os.pread(file.fileno(), min(CHUNK, end - at), at)
                if not chunk:
                    raise InvalidInput(f"{self.label} is cut short at {at - self.offset} of {self.size} bytes")
                if digest:
                    digest.update(chunk)
                at += len(chunk)
                yield chunk
        if digest and digest.hexdigest() != self.digest:
            raise InvalidInput(f"{self.label} is damaged: its content has digest sha256:{digest.hexdigest()[:12]}...")

    def read(self, limit: int) -> bytes:
        """All of it, for documents.

        :raises InvalidInput: larger than ``limit`` bytes, cut short, or of another digest
        """
        if self.size > limit:
            raise InvalidInput(f"{self.label} has {self.size} bytes; a document may have {limit}")
        return b"".join(self.chunks())


class Budget:
    """What is left of an image's limits; shared by its layers."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._stored = 0
        self._decoded = 0
        self._entries = 0
        self._file_bytes = 0

    def stored(self, count: int) -> None:
        """``count`` compressed bytes were read."""
        self._stored += count

    def decoded(self, count: int) -> None:
        """``count`` bytes came out of decompression.

        :raises ResourceExhausted: too many, or out of proportion
        """
        self._decoded += count
        limits = self.limits
        if self._decoded > limits.image_bytes:
            raise ResourceExhausted(f"the layers hold more than {_size(limits.image_bytes)}, the limit for one image")
        if self._decoded > limits.bomb_grace and self._decoded > self._stored * limits.bomb_ratio:
            raise ResourceExhausted(
                f"{self._stored} compressed bytes swell to more than {_size(self._decoded)}: "
                f"a decompression bomb? The limit is a factor of {limits.bomb_ratio}"
            )

    def file(self, size: int) -> None:
        """A file of ``size`` bytes (holes count too) comes.

        :raises ResourceExhausted: the files are too large together
        """
        self._file_bytes += size
        if self._file_bytes > self.limits.image_bytes:
            raise ResourceExhausted(
                f"the files are larger than {_size(self.limits.image_bytes)}, the limit for an image"
            )

    def entry(self) -> None:
        """One more file, directory or the like.

        :raises ResourceExhausted: too many
        """
        self._entries += 1
        if self._entries > self.limits.entries:
            raise ResourceExhausted(f"the layers have more than {self.limits.entries} entries, the limit for one image")


def decoded(blob: Blob, budget: Budget) -> Iterator[bytes]:
    """The decompressed bytes of ``blob``, in pieces of at most 1 MiB.

    :raises InvalidInput: damaged, cut short, or of a kind that is not known
    :raises ResourceExhausted: it swells beyond the budget
    """
    stored = _metered(blob, budget)
    first = next(stored, b"")
    for piece in _decoder(first)(_with_first(first, stored), blob.label):
        budget.decoded(len(piece))
        yield piece


class ByteStream:
    """Exact reads from an iterator of pieces; keeps the sha256 of all that it was given."""

    def __init__(self, pieces: Iterator[bytes], label: str) -> None:
        self._pieces = pieces
        self._buffer = b""
        self._at = 0
        self._digest = hashlib.sha256()
        self._label = label
        self._received = 0

    def _fill(self) -> bool:
        piece = next(self._pieces, b"")
        self._digest.update(piece)
        self._received += len(piece)
        self._buffer, self._at = piece, 0
        return bool(piece)

    def read(self, count: int) -> bytes:
        """Exactly ``count`` bytes.

        :raises InvalidInput: the stream ends before
        """
        at = self._at
        if 0 <= count <= len(self._buffer) - at:
            self._at = at + count
            return self._buffer[at : at + count]
        pieces = []
        while count > 0:
            pieces.append(self.read_some(count))
            count -= len(pieces[-1])
        return b"".join(pieces)

    def read_some(self, limit: int) -> bytes:
        """At least one byte and at most ``limit``: what is at hand.

        :raises InvalidInput: the stream ends here
        """
        if self._at == len(self._buffer) and not self._fill():
            raise InvalidInput(f"{self._label} is cut short at {self._received} bytes")
        piece = self._buffer[self._at : self._at + limit]
        self._at += len(piece)
        return piece

    def read_if_any(self, count: int) -> bytes:
        """Exactly ``count`` bytes, or none if the stream ends here."""
        if self._at == len(self._buffer) and not self._fill():
            return b""
        return self.read(count)

    def skip(self, count: int) -> None:
        """Pass over ``count`` bytes."""
        while count > 0:
            count -= len(self.read_some(count))

    def drain(self) -> str:
        """Read to the end; the hex sha256 of the whole stream."""
        while self._fill():
            pass
        self._at = len(self._buffer)
        return self._digest.hexdigest()


def _metered(blob: Blob, budget: Budget) -> Iterator[bytes]:
    for chunk in blob.chunks():
        budget.stored(len(chunk))
        yield chunk


def _with_first(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from rest


def _decoder(start: bytes) -> Callable[[Iterator[bytes], str], Iterator[bytes]]:
    if start.startswith(b"\x1f\x8b"):
        return _gunzip
    if start.startswith(b"\x28\xb5\x2f\xfd"):
        return _unzstd
    if start.startswith((b"BZh", b"\xfd7zXZ\0")):
        return _unknown
    return _plain


def is_compressed(start: bytes) -> bool:
    """Whether data that begins so is compressed in a way that is known here, or known to be refused."""
    return _decoder(start) is not _plain


def _plain(chunks: Iterator[bytes], _label: str) -> Iterator[bytes]:
    return chunks


def _unknown(_chunks: Iterator[bytes], label: str) -> Iterator[bytes]:
    raise InvalidInput(
        f"{label} is compressed with bzip2 or xz; images use gzip or zstd: compress it with one of these"
    )


def _gunzip(chunks: Iterator[bytes], label: str) -> Iterator[bytes]:
    """Members one after the other, as gzip allows. ``max_length`` bounds memory whatever the data does."""
    inflate = zlib.decompressobj(31)
    try:
        for chunk in chunks:
            while chunk:
                if inflate.eof:
                    inflate = zlib.decompressobj(31)
                if piece := inflate.decompress(chunk, CHUNK):
                    yield piece
                chunk = inflate.unused_data if inflate.eof else inflate.unconsumed_tail
        while not inflate.eof:
            piece = inflate.decompress(b"", CHUNK)
            if not piece:
                raise InvalidInput(f"{label}: the gzip data is cut short")
            yield piece
    except zlib.error as error:
        raise InvalidInput(f"{label}: the gzip data is damaged ({error})") from error


def _unzstd(chunks: Iterator[bytes], label: str) -> Iterator[bytes]:
    try:
        yield from zstd.decompress(chunks, CHUNK)
    except zstd.LibraryMissing as error:
        raise HostUnfit("this image is compressed with zstd, which needs the package libzstd1: install it") from error
    except zstd.DamagedData as error:
        raise InvalidInput(f"{label}: the zstd data is damaged or cut short ({error})") from error


def _size(count: int) -> str:
    """For people: 64 GiB, 1.5 MiB."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.1f}".removesuffix(".0") + f" {unit}"
