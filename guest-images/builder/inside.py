"""Run by the *guest's* Python on this machine: finds and compiles what the guest will import.

The guest's own interpreter does it, so that neither the byte code nor the choice of modules depends on the Python that
runs the builder. Reads one JSON object from standard input, writes one to standard output; see `pyroot` for both.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import marshal
import modulefinder
import py_compile
import sys
from pathlib import Path
from typing import Any

_PYC_HEADER = 16  # bytes before the code object in a compiled file


def find(path: list[str], names: list[str], excludes: list[str]) -> dict[str, Any]:
    """Files of every module that importing `names` may need, imports inside functions counted."""
    finder = modulefinder.ModuleFinder(path=path, excludes=excludes)
    for name in names:
        finder.import_hook(name, fromlist=["*"] if name.endswith(".agent") else None)
    missing = sorted(name for name in names if name in finder.badmodules)
    return {
        "files": {name: module.__file__ for name, module in sorted(finder.modules.items()) if module.__file__},
        "packages": sorted(name for name, module in finder.modules.items() if module.__path__),
        "missing": missing,
    }


def compile_all(jobs: list[list[str]], optimize: int) -> dict[str, Any]:
    """Compiles each (source, target, name shown in tracebacks). Unchecked-hash files hold no time stamp."""
    for source, target, shown in jobs:
        py_compile.compile(
            source, target, shown, True, optimize, py_compile.PycInvalidationMode.UNCHECKED_HASH, quiet=1
        )
    return {"compiled": len(jobs)}


def bundle(rows: list[list[Any]], target: str) -> dict[str, Any]:
    """Writes one file with the code objects of (name, compiled file, file name to show, is it a package)."""
    index: dict[str, tuple[int, int, str, bool]] = {}
    codes: list[bytes] = []
    offset = 0
    for name, path, shown, is_package in rows:
        code = Path(path).read_bytes()[_PYC_HEADER:]
        index[name] = (offset, len(code), shown, is_package)
        codes.append(code)
        offset += len(code)
    head = marshal.dumps(index)
    Path(target).write_bytes(b"".join([len(head).to_bytes(8, "little"), head, *codes]))
    return {"modules": len(index)}


def unlz4(source: str, target: str, ranges: list[list[int]], largest: int, library: str) -> dict[str, Any]:
    """Unpacks the LZ4 blocks at `ranges` of a file into another, one behind the other."""
    lz4 = ctypes.CDLL(library)
    room = ctypes.create_string_buffer(largest)
    data = Path(source).read_bytes()
    with Path(target).open("wb") as out:
        for offset, length in ranges:
            size = lz4.LZ4_decompress_safe(data[offset : offset + length], room, length, largest)
            if size < 0:
                raise ValueError(f"{source}: bad LZ4 block at offset {offset}")
            out.write(ctypes.string_at(room, size))
    return {"blocks": len(ranges)}


def check(path: list[str], names: list[str]) -> dict[str, Any]:
    """Imports each name from the finished library alone; the errors by name."""
    sys.path[:] = path
    errors: dict[str, str] = {}
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as e:
            errors[name] = str(e)
    return {"errors": errors}


def main() -> None:
    """One request, one answer."""
    request = json.load(sys.stdin)
    command = {"find": find, "compile": compile_all, "check": check, "unlz4": unlz4, "bundle": bundle}[
        request.pop("command")
    ]
    json.dump(command(**request), sys.stdout)


if __name__ == "__main__":
    main()
