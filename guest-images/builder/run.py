"""Running other programs, with their last words in the error."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from builder.errors import BuildError


def output_of(argv: Sequence[str], *, cwd: Path | None = None, environment: Mapping[str, str] | None = None) -> str:
    """Standard output of a program that must succeed.

    :param environment: added to this process' own
    :raises BuildError: it is not installed, or exited with another status than 0
    """
    try:
        done = subprocess.run(
            argv, cwd=cwd, env=None if environment is None else {**os.environ, **environment}, capture_output=True
        )
    except FileNotFoundError as e:
        raise BuildError(
            f"{argv[0]} is not installed; `make install` in the project's root installs what is missing"
        ) from e
    if done.returncode != 0:
        words = done.stderr.decode(errors="replace").strip() or f"exit status {done.returncode}"
        raise BuildError(f"{' '.join(argv[:3])} failed: {words[-600:]}")
    return done.stdout.decode()


def say(text: str) -> None:
    """One progress line, seen at once."""
    print(f"guest-images: {text}", flush=True)
