"""A master in a process of its own, for sections that measure one from outside."""

from __future__ import annotations

import contextlib
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hypervisor.master.auth import parties
from hypervisor.master.auth.ca import CertificateAuthority, client_context

_SERVER = """
import sys
from pathlib import Path
from hypervisor.master.daemon import MasterConfig, main
config = MasterConfig(Path(sys.argv[1]), port=0, controllers=sys.argv[2] == "controllers")
main(config, lambda master: print("port", master.port, flush=True))
"""


@dataclass(frozen=True)
class Server:
    """One that serves.

    :ivar folder: its state
    """

    folder: Path
    port: int
    pid: int

    @property
    def ca(self) -> CertificateAuthority:
        """The cluster's authority."""
        return CertificateAuthority.open(self.folder / "pki")

    def tls(self) -> ssl.SSLContext:
        """An administrator's connections."""
        ca = self.ca
        return client_context(parties.admin(ca), ca.certificate_file)


@contextlib.contextmanager
def served(*, controllers: bool) -> Iterator[Server]:
    """Starts one on a folder of its own; it has ended afterwards.

    :param controllers: scheduler and controllers, too
    """
    with tempfile.TemporaryDirectory(prefix="hv-bench-") as folder:
        command = [sys.executable, "-c", _SERVER, folder, "controllers" if controllers else "objects"]
        log = Path(folder, "log")
        with log.open("wb") as errors:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        with process:
            try:
                yield Server(Path(folder), _port(process, log), process.pid)
            finally:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)


def _port(process: subprocess.Popen[str], log: Path) -> int:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("port "):
            return int(line.split()[1])
    raise RuntimeError(f"the master did not start: {log.read_text()[-2000:]}")
