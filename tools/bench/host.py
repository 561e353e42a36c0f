"""A host of the benchmark's own: its own state folder, the sample images, gone afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
HV = ROOT / ".venv/bin/hv"
SAMPLES = ROOT / "guest-images/out/samples"


@dataclass(frozen=True)
class Host:
    """A running host, driven through the command line as a user would."""

    state: Path

    def run(self, *args: str, stdin: bytes | None = None, check: bool = True) -> subprocess.CompletedProcess[bytes]:
        """``hv ARGS``; raises with what it printed when it fails and `check` is set."""
        environment = os.environ | {"HV_STATE_DIR": str(self.state)}
        done = subprocess.run([HV, *args], input=stdin, capture_output=True, env=environment, check=False)
        if check and done.returncode:
            sys.exit(f"hv {' '.join(args)}: exit code {done.returncode}\n{done.stderr.decode()}")
        return done

    def seconds(self, *args: str, stdin: bytes | None = None) -> float:
        """Wall-clock seconds of a whole ``hv ARGS``, its own start included."""
        start = time.perf_counter()
        self.run(*args, stdin=stdin)
        return time.perf_counter() - start


@contextmanager
def fresh_host(*images: str) -> Iterator[Host]:
    """A new host with the named sample images; its pods, daemon and folder are gone on the way out."""
    with tempfile.TemporaryDirectory(prefix="hvb-") as folder:
        Path(folder).chmod(0o711)
        host = Host(Path(folder) / "s")
        try:
            for image in images:
                host.run("image", "import", str(SAMPLES / f"{image}.tar"))
            yield host
        finally:
            host.run("host", "stop", "--pods", check=False)
