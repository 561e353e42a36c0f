"""hv as a real process, against the stand-in for hostd (`hostd_standin`)."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hostd_standin import HV, ROOT, Hv, StandIn


@pytest.fixture
def host(tmp_path: Path) -> Iterator[StandIn]:
    """A stand-in with one pod, hello, whose files are in ``tmp_path / files``."""
    files = tmp_path / "files"
    files.mkdir()
    with StandIn(tmp_path / "state", files) as standin:
        standin.add_pod("hello")
        yield standin


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """What hv runs in: no variable of the developer's own changes what it does."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HV_", "_HV_", "XDG_"))}
    return kept | {"HV_STATE_DIR": str(tmp_path / "state"), "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}


@pytest.fixture
def hv(host: StandIn, environment: dict[str, str], tmp_path: Path) -> Hv:
    """Runs hv to its end, in tmp_path; text unless told otherwise."""

    def run(*args: str, text: bool = True, **options: Any) -> subprocess.CompletedProcess[Any]:
        options.setdefault("stdin", None if "input" in options else subprocess.DEVNULL)
        if options["stdin"] is None:
            del options["stdin"]
        environ = environment | options.pop("env", {})
        return subprocess.run(
            [*HV, *args], capture_output=True, text=text, timeout=60, env=environ, cwd=tmp_path, check=False, **options
        )

    return run
