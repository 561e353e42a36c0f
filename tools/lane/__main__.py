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
from lane import bench, coverage, machine, project, rootdisk, suites
from lane.suite import QEMUS

ROOT = Path(__file__).parents[2]
#: has tests/conftest.py refuse to skip what is marked: in the lane there is everything that a test may need
_COMPULSORY = {"HV_COMPULSORY": "1"}
#: the form that has properties: tests put times there
_JUNIT = ("-o", "junit_family=xunit1")
_PYTHON = "/podvisor/.venv/bin/python"
_LEFT = "/tmp/results"


def main() -> int:
    """The exit status of what was run, or 1 after an error line."""
    options = _options()
    results = options.out / "results"
    shutil.rmtree(results, ignore_errors=True)
    results.mkdir(parents=True)
    for left in options.out.glob(".*-????????"):
        shutil.rmtree(left, ignore_errors=True)  # of a run that was killed
    begun = time.monotonic()
    try:
        status = _run(options, results)
        if options.coverage and (results / "coverage-data").exists():
            coverage.report(results)
    except (BuildError, subprocess.CalledProcessError) as e:
        print(f"kvm-lane: error: {e}", file=sys.stderr)
        return 1
    print(f"kvm-lane: exit status {status} after {time.monotonic() - begun:.0f} s; results are in {results}")
    return status


def _run(options: argparse.Namespace, results: Path) -> int:
    lacking = _why_not_here(options)
    if lacking is None or options.where == "here":
        print(f"kvm-lane: on this machine{f', though {lacking}' if lacking else ''}", flush=True)
        command = _command(options, sys.executable, results, ROOT)
        return subprocess.run(command, cwd=ROOT, env=os.environ | _COMPULSORY).returncode
    print(f"kvm-lane: in a guest: {lacking}", flush=True)
    root = rootdisk.root_disk(options.out, options.qemu)
    with tempfile.TemporaryDirectory(prefix=".run-", dir=options.out) as scratch:
        disk = Path(scratch, "project")
        command = _command(options, _PYTHON, Path(_LEFT), Path("/podvisor"))
        environment = _COMPULSORY | {"HV_TEST_LOGS": f"{_LEFT}/logs"}
        if options.coverage:
            environment["COVERAGE_PROCESS_START"] = coverage.RC
        further = {}
        if options.bench:
            environment |= bench.ENVIRONMENT
            further = bench.parts(Path(scratch))
        project.project_disk(options.out, disk, command, environment, further)
        return machine.run(root, disk, results, _size(options), options.timeout)


def _command(options: argparse.Namespace, python: str, results: Path, project: Path) -> list[str]:
    if options.bench:
        sections = bench.SECTIONS if options.bench == "all" else options.bench.split(",")
        program = str(project / "tools/bench/inside_lane.py")
        return [python, program, str(results / "figures.json"), str(options.rounds), *sections]
    wanted = options.pytest or suites.CHOICES[options.suites]
    return [python, "-m", "pytest", "-p", "no:cacheprovider", f"--junit-xml={results}/junit.xml", *_JUNIT, *wanted]


def _why_not_here(options: argparse.Namespace) -> str | None:
    """What this machine lacks for the lane; None: nothing."""
    if options.where == "guest":
        return "this machine was not asked for"
    if options.qemu != "stable":
        return f"QEMU from {options.qemu} is not this machine's"
    return asyncio.run(_lacking())


async def _lacking() -> str | None:
    kernel = default_directory() / "vmlinux"
    qemu = shutil.which("qemu-system-x86_64") or "/usr/bin/qemu-system-x86_64"
    probe = await probe_kvm(qemu=Path(qemu), kernel=kernel if kernel.exists() else None, cache_directory=None)
    if not probe.usable:
        return f"KVM cannot be used here: {probe.reason}"
    vsock = kernel_vsock_available()
    return None if vsock.ok else f"{vsock.found}; fix: {vsock.fix}"


def _size(options: argparse.Namespace) -> machine.Size:
    return machine.Size(options.vcpus, options.memory, 1 if options.bench else options.dilation)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="kvm-lane", description="Runs the tests that need KVM and vhost-vsock.")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--guest", dest="where", action="store_const", const="guest", help="in a guest, KVM or not")
    where.add_argument("--here", dest="where", action="store_const", const="here", help="on this machine, KVM or not")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--suites", choices=suites.CHOICES, default="short", help="tests (default: %(default)s)")
    what.add_argument(
        "--bench", metavar="SECTION,...", help=f"figures, no tests: all, or of {', '.join(bench.SECTIONS)}"
    )
    parser.add_argument("--rounds", type=int, default=3, help="of --bench (default: %(default)s)")
    parser.add_argument("--qemu", choices=QEMUS, default="stable", help="the guest's own (default: %(default)s)")
    parser.add_argument("--coverage", action="store_true", help="measure the host package in the guest: slower")
    parser.add_argument("--out", type=Path, default=ROOT / "build/kvm-lane", help="results and what is kept")
    parser.add_argument("--vcpus", type=int, default=2, help="of the guest (default: %(default)s)")
    parser.add_argument("--dilation", type=int, default=3, metavar="N", help="N seconds are one there (default: 3)")
    parser.add_argument("--memory", type=int, default=3072, metavar="MIB", help="of the guest (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=3600, metavar="S", help="for the guest (default: %(default)s)")
    parser.add_argument("pytest", nargs="*", help="arguments for pytest, behind -- (default: all that need KVM)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
