"""What every test may need: skips that say why, and short temporary folders for sockets."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GUEST_IMAGE = ROOT / "guest-images/out"

# What a mark needs, and why a test is skipped where it is missing. CI has all of these (see tests/README.md).
NEEDS: dict[str, tuple[bool, str]] = {
    "root": (os.geteuid() == 0, "needs root: users of their own, cgroups and mounts"),
    "qemu": (
        shutil.which("qemu-system-x86_64") is not None and (GUEST_IMAGE / "manifest.json").exists(),
        "needs qemu-system-x86_64 and the guest image; `make guest-image`",
    ),
    "registry": (shutil.which("docker-registry") is not None, "needs Debian's docker-registry"),
    "vhost_vsock": (Path("/dev/vhost-vsock").exists(), "needs the kernel's /dev/vhost-vsock"),
}


# Started by nohup or in the background of a script, we would hand on ignored signals to every program under test.
for _number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for mark, (met, why) in NEEDS.items():
            if item.get_closest_marker(mark) and not met:
                item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder whose path is short enough for Unix sockets (108 bytes), which pytest's own tmp_path may not be."""
    with tempfile.TemporaryDirectory(prefix="hvt-") as folder:
        Path(folder).chmod(0o711)  # a VM's own user must be able to walk through it
        yield Path(folder)
