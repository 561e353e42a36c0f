"""Builds the extension module ``hypervisor.memory._memory`` from this folder; setup.py names it."""

from __future__ import annotations

import re
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
HEADERS = ("pfdb.h", "space.h", "source.h", "loader.h", "fault.h")
SOURCES = tuple(sorted(path.name for path in HERE.glob("*.c") if not path.name.startswith("preload")))


def declarations() -> str:
    """The headers without what cffi does not read: they stay the one place that declares the interface."""
    text = "\n".join((HERE / name).read_text() for name in HEADERS)
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    text = re.sub(r"^static inline .*?(;\s*\}|\n\})$", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"_Atomic\((\w+)\)", r"\1", text)
    # The tables of the database are C's alone; Python sees how many rows they have.
    text = re.sub(
        r"^struct pv_pfdb \{.*?^\};",
        "struct pv_pfdb { uint32_t max_vads, max_pfes; ...; };",
        text,
        flags=re.DOTALL | re.M,
    )
    text = re.sub(r"^struct pv_vad \{.*?^\};", "struct pv_vad;", text, flags=re.DOTALL | re.M)
    text = re.sub(r"^typedef .*? pv_pfe;", "", text, flags=re.MULTILINE)
    constants = re.findall(r"^#define (PV_[A-Z_]+) (\d+)", text, flags=re.MULTILINE)
    body = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    for name, value in constants:
        body = re.sub(rf"\b{name}\b", value, body)
    return body


ffibuilder = FFI()
ffibuilder.cdef(declarations())
# cffi releases the GIL around every call into the library, so pv_fault_run may block in a thread of its own.
ffibuilder.set_source(
    "hypervisor.memory._memory",
    '#include "memory/fault.h"\n#include "memory/loader.h"',
    sources=[str((HERE / name).relative_to(ROOT)) for name in SOURCES],
    include_dirs=["csrc"],
    libraries=["zstd"],
    depends=sorted(str(path.relative_to(ROOT)) for path in [*HERE.glob("*.h"), *HERE.parent.glob("common/*.h")]),
    extra_compile_args=["-O2", "-g", "-std=gnu11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-fstack-protector-strong"],
    py_limited_api=False,
)

if __name__ == "__main__":
    import os

    os.chdir(ROOT)
    ffibuilder.compile(verbose=True)
