"""crun as one static program without systemd, built from the source of Debian's package of the same version.

The packaged one loads nine libraries, which is 50 ms of each container's start under TCG. What is built is kept in the
cache. The compiler, make and dpkg-source are this machine's (build-essential); libcap's and libseccomp's archives come
from Debian's packages, and yajl's is part of crun's source.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from builder import debs
from builder.errors import BuildError
from builder.packages import BUILD_PACKAGES
from builder.run import output_of, say

_OPTIONS = ("--disable-systemd", "--disable-criu", "--disable-dl", "--disable-shared", "--enable-embedded-yajl")
_CFLAGS = "-O2 -fstack-protector-strong -D_FORTIFY_SOURCE=2 -ffunction-sections -fdata-sections"
_LDFLAGS = "-Wl,--gc-sections,--build-id=none,-z,relro,-z,now"
_TARGET = "usr/lib/x86_64-linux-gnu"


def static_crun(chosen: Mapping[str, debs.Deb], unpacked: Mapping[str, Path], cache: Path) -> Path:
    """The program.

    :param chosen: packages by name, crun and `packages.BUILD_PACKAGES` among them
    :param unpacked: the same, unpacked
    :raises BuildError: apt has no source of that version, or it cannot be built here
    """
    recipe = "\n".join([*(chosen[n].sha256 for n in ("crun", *BUILD_PACKAGES)), Path(__file__).read_text()])
    target = cache / f"crun-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}"
    if target.is_file():
        return target
    version = chosen["crun"].version
    say(f"building crun {version} from source")
    with tempfile.TemporaryDirectory(prefix=".crun-", dir=cache) as scratch:
        description = debs.fetch_source("crun", version, Path(scratch))
        source = Path(scratch) / "source"
        output_of(["dpkg-source", "--no-check", "-x", str(description), str(source)])
        program = _build(source, [unpacked[name] for name in BUILD_PACKAGES])
        for old in cache.glob("crun-????????????????"):
            old.unlink()
        shutil.move(program, target)
    return target


def _build(source: Path, libraries: list[Path]) -> Path:
    includes = " ".join(f"-I{path}/usr/include" for path in libraries)
    archives = " ".join(f"-L{path}/{_TARGET}" for path in libraries)
    cflags = f"{_CFLAGS} -ffile-prefix-map={source}=. {includes}"
    environment = {"SOURCE_DATE_EPOCH": "0", "LC_ALL": "C"}
    static = f"{_LDFLAGS} {archives}"
    configure = ["./configure", *_OPTIONS, f"CFLAGS={cflags}", f"LDFLAGS=-static {static}"]
    output_of(configure, cwd=source, environment=environment)
    make = ["make", f"-j{os.cpu_count() or 1}", f"LDFLAGS=-all-static {static}"]  # libtool's word for -static
    output_of(make, cwd=source, environment=environment)
    program = source / "crun"
    output_of(["strip", "-s", str(program)])
    features = output_of([str(program), "--version"])
    if lacking := [word for word in ("+CAP", "+SECCOMP", "+EBPF", "+YAJL") if word not in features]:
        raise BuildError(f"crun was built without {' '.join(lacking)}: a header or library is missing")
    return program
