"""A working set: the pages that a clone touched first, in order, as a file that later clones prefetch from.

Layout, little-endian: ``HVWS``, version, number of pages (32 bits each), SHA-256 of the template's RAM (32 bytes), the
page numbers (32 bits each), SHA-256 of all that. It says only *which* pages are likely to be wanted: their content
always comes from the template, so a wrong one costs time and memory within `MAX_PAGES`, and nothing else.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence

from hypervisor.errors import InvalidInput

#: 24 MiB: what is touched beyond is left to faults, so that an idle clone stays within 32 MiB
MAX_PAGES = 6144
#: pages that are handed to the kernel in one go, and within which their order does not matter
BATCH_PAGES = 256
_MAGIC = b"HVWS"
_VERSION = 1
_HEAD = struct.Struct("<4sII32s")
_DIGEST = 32
MAX_BYTES = _HEAD.size + 4 * MAX_PAGES + _DIGEST


def encode(pages: Iterable[int], *, template: str, ram_pages: int) -> bytes:
    """The file for `pages`: repeated ones and those beyond RAM are left out, and what is more than `MAX_PAGES`.

    :param template: SHA-256 of the template's RAM, in hex
    """
    numbers = array("I", [p for p in dict.fromkeys(pages) if 0 <= p < ram_pages][:MAX_PAGES])
    body = _HEAD.pack(_MAGIC, _VERSION, len(numbers), bytes.fromhex(template)) + numbers.tobytes()
    return body + hashlib.sha256(body).digest()


def decode(data: bytes, *, template: str, ram_pages: int) -> array[int]:
    """The inverse of `encode`.

    :raises InvalidInput: damaged, of another version or of another template
    """
    body, digest = data[:-_DIGEST], data[-_DIGEST:]
    if len(data) < _HEAD.size + _DIGEST or hashlib.sha256(body).digest() != digest:
        raise InvalidInput("a working set is truncated or was changed: its checksum does not fit")
    magic, version, count, of = _HEAD.unpack_from(body)
    if (magic, version) != (_MAGIC, _VERSION) or of != bytes.fromhex(template):
        raise InvalidInput("a working set is of another template or version")
    numbers = array("I", body[_HEAD.size :])
    if len(numbers) != count or count > MAX_PAGES or (count and max(numbers) >= ram_pages):
        raise InvalidInput("a working set has more pages than it says, or than RAM has")
    return numbers


def batches(pages: Sequence[int]) -> Iterator[array[int]]:
    """`pages` in pieces that are to be filled one after the other; within one, neighbours stand side by side, so that
    one call of the kernel fills them together.
    """
    for start in range(0, len(pages), BATCH_PAGES):
        yield array("I", sorted(pages[start : start + BATCH_PAGES]))
