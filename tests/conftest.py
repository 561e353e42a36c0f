"""What every test may need: skips that say why, and short temporary folders for sockets."""

from __future__ import annotations

import asyncio
import functools
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GUEST_IMAGE = ROOT / "guest-images/out"

# What a mark needs, and why a test is skipped where it is missing. Asked for marks that are used only. CI has most of
# these, and `make test-kvm` the others (docs/testing.md).
NEEDS: dict[str, tuple[Callable[[], bool], str]] = {
    "root": (lambda: os.geteuid() == 0, "needs root: users of their own, cgroups and mounts"),
    "qemu": (
        lambda: shutil.which("qemu-system-x86_64") is not None and (GUEST_IMAGE / "manifest.json").exists(),
        "needs qemu-system-x86_64 and the guest image; `make guest-image`",
    ),
    "registry": (lambda: shutil.which("docker-registry") is not None, "needs Debian's docker-registry"),
    "vhost_vsock": (
        lambda: os.access("/dev/vhost-vsock", os.R_OK | os.W_OK),
        "needs the kernel's /dev/vhost-vsock; `make test-kvm` has it",
    ),
    "kvm": (lambda: kvm_works(), "needs KVM that runs guest code; `make test-kvm` has it"),
    "tcg": (
        lambda: not os.access("/dev/vhost-vsock", os.R_OK | os.W_OK) and not kvm_works(),
        "is about VMs without KVM and the kernel's vhost-vsock, and this machine has one of them",
    ),
    "net_admin": (lambda: os.geteuid() == 0 and Path("/dev/net/tun").exists(), "needs root and /dev/net/tun"),
    "uffd": (lambda: os.access("/dev/userfaultfd", os.R_OK | os.W_OK), "needs /dev/userfaultfd (Linux 6.1 or later)"),
}
#: set where everything is there that a test may need: a skip for what is missing would hide that it is not
COMPULSORY = "HV_COMPULSORY"


@functools.cache
def kvm_works() -> bool:
    """Whether guest code runs under KVM here; takes some milliseconds where it does not."""
    from hypervisor.vmm.accel import probe_kvm

    return asyncio.run(probe_kvm(qemu=Path("qemu-system-x86_64"), kernel=None, cache_directory=None)).usable


# Started by nohup or in the background of a script, we would hand on ignored signals to every program under test.
for _number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL)


#: seconds that a test may take, its fixtures not counted: no test of ours takes a quarter of that
TIME_LIMIT_S = 300


@pytest.hookimpl(tryfirst=True)
def pytest_configure() -> None:
    """A test that hangs fails with every thread's stack instead of taking the whole run with it."""
    patience = float(os.environ.get("HV_TEST_PATIENCE", "1"))
    os.environ.setdefault("PYTEST_TIMEOUT", f"{TIME_LIMIT_S * patience:.0f}")


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Failures are printed when they happen: of a run that is ended from outside, nothing else would be left."""
    if report.outcome not in ("failed", "rerun") or "CI" not in os.environ:
        return
    sections = "".join(f"\n---- {title} ----\n{text[-4000:]}" for title, text in report.sections)
    print(f"\n==== {report.nodeid} ({report.when}, {report.outcome}) ====\n{report.longreprtext}{sections}", flush=True)


#: marks that some machines lack by nature: each test with one must have run somewhere (tools/lane/everywhere.py)
SCARCE = ("kvm", "vhost_vsock", "tcg", "net_admin", "uffd")


@pytest.hookimpl(trylast=True)  # what -m and -k have left
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if needs := [mark for mark in SCARCE if item.get_closest_marker(mark)]:
            item.user_properties.append(("needs", " ".join(needs)))
    for mark, (is_met, why) in NEEDS.items():
        marked = [item for item in items if item.get_closest_marker(mark)]
        if not marked or is_met():
            continue
        if COMPULSORY in os.environ:
            raise pytest.UsageError(f"{len(marked)} tests cannot be skipped here: {mark} {why}")
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder whose path is short enough for Unix sockets (108 bytes), which pytest's own tmp_path may not be."""
    with tempfile.TemporaryDirectory(prefix="hvt-") as folder:
        Path(folder).chmod(0o711)  # a VM's own user must be able to walk through it
        yield Path(folder)
