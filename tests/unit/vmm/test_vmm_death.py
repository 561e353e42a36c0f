"""Every way a VM can end, in words."""

from __future__ import annotations

import pytest

from hypervisor.vmm.death import VmDeath, VmDied, explain, read_tails
from hypervisor.vmm.directory import VmDirectory
from hypervisor.vmm.qmp import QmpEvent

EXIT_1 = 1 << 8


def shutdown(reason: str) -> tuple[QmpEvent, ...]:
    return (QmpEvent("RESUME"), QmpEvent("SHUTDOWN", {"reason": reason}))


@pytest.mark.parametrize(
    ("facts", "cause", "says"),
    [
        ({"wanted": True, "qemu_status": 9}, "stopped", "was stopped"),
        ({"vmx_died_first": True, "vmx_status": 9, "qemu_status": 9}, "vmx", "was killed (signal 9)"),
        ({"vmx_died_first": True, "qemu_status": 9}, "vmx", "vmx, the VM's device process, ended"),
        ({"qemu_status": 9}, "qemu", "QEMU was killed (signal 9)"),
        ({"qemu_status": EXIT_1, "qemu_log": "a\nqemu: bad disk\n"}, "qemu", "exited with status 1: qemu: bad disk"),
        ({"qemu_status": 0, "events": shutdown("guest-shutdown")}, "guest", "powered off"),
        ({"qemu_status": None, "events": shutdown("guest-shutdown")}, "guest", "powered off"),
        ({"qemu_status": 0, "events": shutdown("guest-reset")}, "panic", "panicked, or its init rebooted"),
        ({"qemu_status": 0, "events": shutdown("guest-panic")}, "panic", "panicked"),
        ({"qemu_status": 0, "events": shutdown("host-signal")}, "qemu", "by host-signal"),
        ({"qemu_status": 0}, "qemu", "QEMU exited with status 0"),
        ({}, "qemu", "QEMU ended"),
    ],
)
def test_explain(facts: dict[str, object], cause: str, says: str) -> None:
    nothing: dict[str, object] = {
        "wanted": False, "vmx_died_first": False, "vmx_status": None, "qemu_status": None, "events": (), "qemu_log": "",
    }  # fmt: skip
    found, reason = explain(**(nothing | facts))  # type: ignore[arg-type]
    assert found == cause
    assert says in reason
    assert "\n" not in reason


def test_failures_are_those_that_nobody_wanted() -> None:
    assert [VmDeath(c, "").failed for c in ("guest", "stopped", "panic", "qemu", "vmx")] == [
        False, False, True, True, True,
    ]  # fmt: skip


def test_last_words_are_shown_without_escape_sequences(short_path) -> None:  # type: ignore[no-untyped-def]
    files = VmDirectory(short_path)
    files.console_log.write_bytes(b"old\n" * 100 + b"\x1b[31mKernel panic\x07\r\n\xff\n")
    said, console = read_tails(files)
    assert said == ""
    assert "Kernel panic" in console
    assert "\x1b" not in console and "\x07" not in console
    error = VmDied("web", VmDeath("panic", "the kernel panicked", said, console))
    assert str(error).startswith("VM web: the kernel panicked\nthe guest's console said last:\nold")
