"""The little that the build must know of ELF: the libraries a file needs, and a kernel module's own description."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from builder.errors import BuildError

_SECTION = struct.Struct("<IIQQQQIIQQ")
_DYNAMIC = struct.Struct("<qQ")
_SHT_DYNAMIC = 6
_DT_NEEDED = 1


def is_elf(path: Path) -> bool:
    """Whether a regular file begins as ELF files do."""
    with path.open("rb") as f:
        return f.read(4) == b"\x7fELF"


def needed_libraries(path: Path) -> list[str]:
    """The DT_NEEDED names of a program or shared library, in their order; empty for a static one.

    :raises BuildError: not a little-endian 64-bit ELF file
    """
    data = path.read_bytes()
    sections = list(_sections(data, path))
    names: list[str] = []
    for _, kind, _, _, offset, size, link, _, _, _ in sections:
        if kind != _SHT_DYNAMIC:
            continue
        strings = sections[link][4]
        for tag, value in _DYNAMIC.iter_unpack(data[offset : offset + size]):
            if tag == _DT_NEEDED:
                names.append(_string(data, strings + value))
    return names


def module_info(path: Path) -> dict[str, str]:
    """A kernel module's `.modinfo`: "depends", "vermagic" and so on (of a repeated key the last).

    :raises BuildError: not a little-endian 64-bit ELF file, or no kernel module
    """
    data = path.read_bytes()
    sections = list(_sections(data, path))
    names = sections[struct.unpack_from("<H", data, 62)[0]][4]
    for name, _, _, _, offset, size, _, _, _, _ in sections:
        if _string(data, names + name) == ".modinfo":
            rows = data[offset : offset + size].split(b"\0")
            return dict(row.decode().split("=", 1) for row in rows if b"=" in row)
    raise BuildError(f"{path}: no .modinfo section; not a kernel module")


def _sections(data: bytes, path: Path) -> Iterator[tuple[int, ...]]:
    if data[:6] != b"\x7fELF\x02\x01":
        raise BuildError(f"{path}: not a little-endian 64-bit ELF file")
    (offset,) = struct.unpack_from("<Q", data, 40)
    size, count = struct.unpack_from("<HH", data, 58)
    for i in range(count):
        yield _SECTION.unpack_from(data, offset + i * size)


def _string(data: bytes, offset: int) -> str:
    return data[offset : data.index(b"\0", offset)].decode()
