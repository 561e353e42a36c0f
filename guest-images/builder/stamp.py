"""Is what lies in a folder made from today's inputs? A digest of all inputs beside the output answers."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from builder.debs import sha256_of

_STAMP = ".inputs"


def digest(packages: Mapping[str, str], files: Mapping[str, Path]) -> str:
    """One digest over package digests, our files (a missing one counts as such) and the builder itself."""
    here = Path(__file__).parent
    own = {f"{p.parent.name}/{p.name}": p for p in sorted([*here.glob("*.py"), *here.parent.glob("guest/*")])}
    ours = {name: sha256_of(p) if p.is_file() else None for name, p in {**files, **own}.items()}
    return hashlib.sha256(json.dumps([dict(packages), ours], sort_keys=True).encode()).hexdigest()


def is_current(folder: Path, inputs: str) -> bool:
    """Whether `folder` was made from exactly these inputs."""
    try:
        return (folder / _STAMP).read_text() == inputs
    except OSError:
        return False


def replace(finished: Path, out: Path, names: Sequence[str], inputs: str) -> None:
    """Renames the finished files into `out`, the last name last.

    The last name and the stamp are taken away first: whoever is interrupted in between leaves a folder that is plainly
    unfinished, never old and new files under one manifest.
    """
    for old in (_STAMP, names[-1]):
        with contextlib.suppress(FileNotFoundError):
            (out / old).unlink()
    for name in names:
        (finished / name).rename(out / name)
    (out / _STAMP).write_text(inputs)
