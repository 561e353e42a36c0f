"""Name/value header blocks: compressed by zlib with SPDY's dictionary, one stream of compression for each direction.

Source: SPDY Protocol, Draft 3, section 2.6.10. The dictionary is the draft's, put together from the parts that it
consists of; its checksum is the dictionary id that every SPDY/3 peer asks for.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping

from hypervisor.errors import ProtocolError

_NAMES = """
options head post put delete trace accept accept-charset accept-encoding accept-language accept-ranges age allow
authorization cache-control connection content-base content-encoding content-language content-length content-location
content-md5 content-range content-type date etag expect expires from host if-match if-modified-since if-none-match
if-range if-unmodified-since last-modified location max-forwards pragma proxy-authenticate proxy-authorization range
referer retry-after server te trailer transfer-encoding upgrade user-agent vary via warning www-authenticate method get
"""
_WORDS = (
    *_NAMES.split(),
    *("status", "200 OK", "version", "HTTP/1.1", "url", "public", "set-cookie", "keep-alive", "origin"),
)
_CODES = (
    "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505"
    "203 Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized"
    "403 Forbidden404 Not Found500 Internal Server Error501 Not Implemented503 Service Unavailable"
)
_VALUES = (
    "Jan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMT"
    "chunked,text/html,image/png,image/jpg,image/gif,application/xml,application/xhtml+xml,text/plain,"
    "text/javascript,publicprivatemax-age=gzip,deflate,sdchcharset=utf-8charset=iso-8859-1,utf-,*,enq=0."
)
DICTIONARY = b"".join(struct.pack(">I", len(w)) + w.encode() for w in _WORDS) + (_CODES + _VALUES).encode()
DICTIONARY_ID = 0xE3C6A7C2
"""Adler-32 of the dictionary."""
MAX_BLOCK = 64 * 1024
"""Bytes of a block, uncompressed: streams of Kubernetes carry three short headers."""

_U32 = struct.Struct(">I")


class HeaderReader:
    """Reads the blocks of one direction of a connection, in their order."""

    def __init__(self) -> None:
        self._inflate = zlib.decompressobj(zdict=DICTIONARY)

    def read(self, block: bytes) -> dict[str, str]:
        """The headers, names in lower case; of a name with several values the first.

        :raises ProtocolError: damaged, or larger than `MAX_BLOCK`; the connection cannot be used further
        """
        try:
            plain = self._inflate.decompress(block, MAX_BLOCK + 1)
        except zlib.error as e:
            raise ProtocolError(f"SPDY: a header block is damaged: {e}") from e
        if len(plain) > MAX_BLOCK or self._inflate.unconsumed_tail:
            raise ProtocolError(f"SPDY: a header block is larger than {MAX_BLOCK} bytes")
        return _parse(plain)


def _parse(plain: bytes) -> dict[str, str]:
    at = 0

    def number() -> int:
        nonlocal at
        if at + 4 > len(plain):
            raise ProtocolError("SPDY: a header block is cut off")
        at += 4
        return int(_U32.unpack_from(plain, at - 4)[0])

    def text() -> str:
        nonlocal at
        length = number()
        if at + length > len(plain):
            raise ProtocolError("SPDY: a header block is cut off")
        at += length
        return plain[at - length : at].decode("utf-8", "replace")

    count = number()
    if count > len(plain) // 8:
        raise ProtocolError(f"SPDY: a header block of {len(plain)} bytes claims {count} headers")
    found: dict[str, str] = {}
    for _ in range(count):
        name = text().lower()
        found.setdefault(name, text().split("\0", 1)[0])
    return found


class HeaderWriter:
    """Writes the blocks of one direction, in their order."""

    def __init__(self) -> None:
        self._deflate = zlib.compressobj(zdict=DICTIONARY)

    def write(self, headers: Mapping[str, str]) -> bytes:
        """The compressed block."""
        plain = _U32.pack(len(headers))
        for name, value in headers.items():
            for part in (name.lower().encode(), value.encode()):
                plain += _U32.pack(len(part)) + part
        return self._deflate.compress(plain) + self._deflate.flush(zlib.Z_SYNC_FLUSH)
