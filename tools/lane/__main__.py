"""``tools/kvm-lane [-- PYTEST ARGUMENTS]``: see the package's docstring and docs/testing.md."""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from builder.errors import BuildError

from hypervisor.vmm.accel import probe_kvm
from hypervisor.vmm.guest import default_directory
from hypervisor.vsock.address import kernel_vsock_available
from lane import machine, project, rootdisk

ROOT = Path(__file__).parents[2]
#: what the lane runs when it is told nothing else
SELECTION = ("tests/integration", "-m", "kvm or vhost_vsock")
#: has tests/conftest.py refuse to skip what is marked: in the lane there is everything that a test may need
_COMPULSORY = "HV_COMPULSORY"
#: the form that has properties: tests put times there
_JUNIT = ("-o", "junit_family=xunit1")


def main() -> int:
    """Pytest's exit status, or 1 after an error line."""
    options = _options()
    results = options.out / "results"
    shutil.rmtree(results, ignore_errors=True)
    results.mkdir(parents=True)
    wanted = options.pytest or list(SELECTION)
    begun = time.monotonic()
    try:
        status = _run(options, results, wanted)
    except (BuildError, subprocess.CalledProcessError) as e:
        print(f"kvm-lane: error: {e}", file=sys.stderr)
        return 1
    print(f"kvm-lane: exit status {status} after {time.monotonic() - begun:.0f} s; results are in {results}")
    return status


def _run(options: argparse.Namespace, results: Path, wanted: list[str]) -> int:
    lacking = "this machine was not asked for" if options.where == "guest" else asyncio.run(_lacking())
    if lacking is None or options.where == "here":
        print(f"kvm-lane: on this machine{f', though {lacking}' if lacking else ''}", flush=True)
        argv = [sys.executable, "-m", "pytest", f"--junit-xml={results}/junit.xml", *_JUNIT, *wanted]
        return subprocess.run(argv, cwd=ROOT, env=os.environ | {_COMPULSORY: "1"}).returncode
    print(f"kvm-lane: in a guest: {lacking}", flush=True)
    root = rootdisk.root_disk(options.out)
    with tempfile.TemporaryDirectory(prefix=".run-", dir=options.out) as scratch:
        disk = Path(scratch, "project")
        project.project_disk(options.out, disk, ["--junit-xml=/tmp/results/junit.xml", *_JUNIT, *wanted])
        size = machine.Size(options.vcpus, options.memory)
        return machine.run(root, disk, results, size, options.timeout)


async def _lacking() -> str | None:
    """What this machine lacks for the lane's tests."""
    kernel = default_directory() / "vmlinux"
    qemu = shutil.which("qemu-system-x86_64") or "/usr/bin/qemu-system-x86_64"
    probe = await probe_kvm(qemu=Path(qemu), kernel=kernel if kernel.exists() else None, cache_directory=None)
    if not probe.usable:
        return f"KVM cannot be used here: {probe.reason}"
    vsock = kernel_vsock_available()
    return None if vsock.ok else f"{vsock.found}; fix: {vsock.fix}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="kvm-lane", description="Runs the tests that need KVM and vhost-vsock.")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--guest", dest="where", action="store_const", const="guest", help="in a guest, KVM or not")
    where.add_argument("--here", dest="where", action="store_const", const="here", help="on this machine, KVM or not")
    parser.add_argument("--out", type=Path, default=ROOT / "build/kvm-lane", help="results and what is kept")
    parser.add_argument("--vcpus", type=int, default=2, help="of the guest (default: %(default)s)")
    parser.add_argument("--memory", type=int, default=3072, metavar="MIB", help="of the guest (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=1200, metavar="S", help="for the guest (default: %(default)s)")
    parser.add_argument("pytest", nargs="*", help="arguments for pytest, behind -- (default: all that need KVM)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
