"""How a VM ended: the reason for its user, and the last lines of what QEMU and the guest said."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from hypervisor.errors import VmFailed
from hypervisor.vmm.directory import VmDirectory
from hypervisor.vmm.qmp import QmpEvent
from hypervisor.vmm.watch import describe_status
from hypervisor.vmx.config import LOG
from hypervisor.vmx.console import read_tail

#: ``guest``: it powered off; ``stopped``: by `RunningVm.stop`; the others are failures
Cause = Literal["guest", "stopped", "panic", "qemu", "vmx"]
TAIL_LINES = 40
_TAIL_BYTES = 16 * 1024


@dataclass(frozen=True, slots=True)
class VmDeath:
    """
    :param reason: one line
    :param qemu_log_tail: QEMU's last lines on stderr
    :param console_tail: the guest console's last lines
    """

    cause: Cause
    reason: str
    qemu_log_tail: str = ""
    console_tail: str = ""

    @property
    def failed(self) -> bool:
        """Whether nobody had wanted this end."""
        return self.cause not in ("guest", "stopped")

    def describe(self) -> str:
        """The reason, and below it what QEMU and the console said last."""
        return self.reason + tail_text(self.qemu_log_tail, self.console_tail)


class VmDied(VmFailed):
    """A VM died or never came up; `death` says more than its one line."""

    def __init__(self, name: str, death: VmDeath) -> None:
        super().__init__(f"VM {name}: {death.describe()}")
        self.death = death


def tail_text(qemu: str, console: str) -> str:
    """Both tails, each under a heading; empty ones are left out."""
    parts = [("QEMU said last", qemu), ("the guest's console said last", console)]
    return "".join(f"\n{heading}:\n{text.rstrip()}" for heading, text in parts if text.strip())


#: what QEMU says of each disk that vmx serves, though the connection it speaks of is there
_CHATTER = "info: QEMU waiting for connection on"


def read_tails(files: VmDirectory) -> tuple[str, str]:
    """``(qemu's stderr, console)``: the last lines of each. Blocks on disk."""
    said = _text(read_tail(files.qemu_log, _TAIL_BYTES, lines=TAIL_LINES))
    said = "".join(line for line in said.splitlines(keepends=True) if _CHATTER not in line)
    return said, _text(read_tail(files.console_log, _TAIL_BYTES, lines=TAIL_LINES))


def read_vmx_tail(files: VmDirectory) -> str:
    """The last of vmx's log; empty when it cannot be read. Blocks on disk.

    The folder is vmx's own, and vmx may be hostile: what lies there is neither followed nor waited for.
    """
    try:
        fd = os.open(files.vmx / LOG, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return ""
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            return ""
        file.seek(max(0, status.st_size - _TAIL_BYTES))
        return _text(file.read(_TAIL_BYTES))


def _text(data: bytes) -> str:
    text = data.decode(errors="replace").replace("\r", "")
    return "".join(c for c in text if c.isprintable() or c == "\n")  # a guest's escape sequences stay in the log


def explain(
    *, wanted: bool, vmx_died_first: bool, vmx_status: int | None, qemu_status: int | None,
    events: Iterable[QmpEvent], qemu_log: str, vmx_log: str = "", not_replaced: str = "",
) -> tuple[Cause, str]:  # fmt: skip
    """Cause and reason of an end, from all that is known of it.

    :param wanted: `RunningVm.stop` had begun
    :param events: QMP's last, oldest first
    :param not_replaced: why vmx has no successor, where one was tried
    """
    if wanted:
        return "stopped", "the VM was stopped"
    if vmx_died_first:
        why = _why_vmx_ended(vmx_log) or (f"; {not_replaced}" if not_replaced else "")
        return "vmx", f"vmx, the VM's device process, {describe_status(vmx_status)}{why}; QEMU was ended with it"
    if qemu_status is None or qemu_status == 0:
        return _by_shutdown(events, qemu_status)
    last = qemu_log.strip().splitlines()
    said = f": {last[-1]}" if last else ""
    return "qemu", f"QEMU {describe_status(qemu_status)}{said}"


def _why_vmx_ended(log: str) -> str:
    """What it wrote as its last line, if it came to that; see `hypervisor.vmx.device`."""
    last = log.strip().rpartition("\n")[2]
    return f" ({last.partition(' end: ')[2]})" if " end: " in last else ""


def _by_shutdown(events: Iterable[QmpEvent], qemu_status: int | None) -> tuple[Cause, str]:
    shutdown = [e for e in events if e.name == "SHUTDOWN"]
    cause = shutdown[-1].data.get("reason") if shutdown else None
    if cause == "guest-shutdown":
        return "guest", "the guest powered off"
    if cause == "guest-reset":
        return "panic", "the guest's kernel panicked, or its init rebooted it"
    if cause == "guest-panic":
        return "panic", "the guest's kernel panicked"
    if cause is not None:
        return "qemu", f"QEMU ended by {cause}"
    return "qemu", f"QEMU {describe_status(qemu_status)}"
