"""Streaming zstd decompression with the system's libzstd (Python 3.11 has none; dpkg itself needs the library)."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from functools import cache
from typing import Any


class LibraryMissing(Exception):
    """There is no libzstd.so.1."""


class DamagedData(Exception):
    """Not zstd, damaged, cut short, or it wants a larger window than 128 MiB."""


class _Buffer(ctypes.Structure):
    """``ZSTD_inBuffer`` and ``ZSTD_outBuffer``: the same members, the first one const or not."""

    _fields_ = (("data", ctypes.c_void_p), ("size", ctypes.c_size_t), ("pos", ctypes.c_size_t))


@cache
def _library() -> Any:
    try:
        library = ctypes.CDLL("libzstd.so.1")
    except OSError as error:
        raise LibraryMissing(str(error)) from error
    library.ZSTD_createDStream.restype = ctypes.c_void_p
    library.ZSTD_freeDStream.argtypes = [ctypes.c_void_p]
    library.ZSTD_decompressStream.argtypes = [ctypes.c_void_p, ctypes.POINTER(_Buffer), ctypes.POINTER(_Buffer)]
    library.ZSTD_decompressStream.restype = ctypes.c_size_t
    library.ZSTD_isError.argtypes = [ctypes.c_size_t]
    library.ZSTD_getErrorName.argtypes = [ctypes.c_size_t]
    library.ZSTD_getErrorName.restype = ctypes.c_char_p
    return library


def decompress(chunks: Iterator[bytes], piece_size: int) -> Iterator[bytes]:
    """The decompressed bytes, in pieces of at most ``piece_size``; frames may follow one another.

    :raises LibraryMissing: no libzstd
    :raises DamagedData: see there
    """
    library = _library()
    stream = library.ZSTD_createDStream()
    try:
        yield from _pieces(library, stream, chunks, piece_size)
    finally:
        library.ZSTD_freeDStream(stream)


def _pieces(library: Any, stream: Any, chunks: Iterator[bytes], piece_size: int) -> Iterator[bytes]:
    room = ctypes.create_string_buffer(piece_size)
    wanted = 0  # what ZSTD_decompressStream still waits for: 0 at the end of a frame
    for chunk in chunks:
        source = _Buffer(ctypes.cast(ctypes.c_char_p(chunk), ctypes.c_void_p), len(chunk), 0)
        while True:
            target = _Buffer(ctypes.cast(room, ctypes.c_void_p), piece_size, 0)
            before = source.pos
            wanted = library.ZSTD_decompressStream(stream, ctypes.byref(target), ctypes.byref(source))
            if library.ZSTD_isError(wanted):
                raise DamagedData(library.ZSTD_getErrorName(wanted).decode())
            if target.pos:
                yield ctypes.string_at(room, target.pos)
            # A full output may hide more; without one, consumed input means that all of it came out.
            if source.pos == len(chunk) and target.pos < piece_size:
                break
            if source.pos == before and target.pos == 0:
                raise DamagedData("no progress")
    if wanted:
        raise DamagedData("cut short")
