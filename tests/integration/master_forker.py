"""Starts masters quickly: everything is imported once, then each line of standard input forks one; says its pid.

Usage: master_forker.py STATE PORT
"""

import os
import sys
from pathlib import Path

from hypervisor.master.daemon import MasterConfig, main


def serve(state: Path, port: int) -> None:
    """One `hv master`; returns only with its end."""
    log = os.open(state / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os._exit(main(MasterConfig(state, port=port)))


for _ in sys.stdin:
    child = os.fork()
    if not child:
        serve(Path(sys.argv[1]), int(sys.argv[2]))
    print(child, flush=True)
    os.waitpid(child, 0)
    print("ended", flush=True)
