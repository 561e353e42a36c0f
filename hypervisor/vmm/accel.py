"""Whether KVM runs guests on this machine: VMs get it where guest code was seen to run under it, else TCG.

A ``/dev/kvm`` that opens proves nothing: nested clouds have some under which ordinary guests hang for ever. The probe
has two stages, each in a process of its own that is killed at its time limit; this process never touches ``/dev/kvm``:

1. ``hv-kvm-probe`` (``csrc/kvmprobe``): a guest of some hundred instructions goes to long mode, user mode and back;
2. QEMU with ``-accel kvm`` boots the guest image's kernel to a small init (about a second), because QEMU sets up far
   more of a virtual CPU than stage 1 does.

The answer is kept in a file, for as long as boot, kernel, QEMU, microcode, probe and guest kernel are the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import re
import signal
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from hypervisor.vmm.argv import Accelerator
from hypervisor.vmm.confine import LIBEXEC

KVM_DEVICE = Path("/dev/kvm")
CACHE_NAME = "kvm-probe.json"
MARKER = b"hv-kvm-probe: user mode reached"
BOOT_TIMEOUT = 30.0
"""Seconds for stage 2; a machine whose KVM works needs one or two, a nested or a busy one ten.

Giving up too early would be remembered until the next boot; a KVM that hangs has mostly shown it in stage 1.
"""

_STAGE1_TIMEOUT = 3.0
_CONSOLE_LIMIT = 64 * 1024
_CACHE_VERSION = 1


@dataclass(frozen=True)
class KvmProbe:
    """What the probe found.

    :param reason: one line: what ran, or where it got stuck and why
    :param final: False where the answer may change without a reboot (permissions, missing parts): it is not kept then
    """

    usable: bool
    reason: str
    final: bool = True


async def probe_kvm(
    *,
    qemu: Path,
    kernel: Path | None,
    cache_directory: Path | None,
    fresh: bool = False,
    boot_timeout: float = BOOT_TIMEOUT,
) -> KvmProbe:
    """Whether KVM runs guests on this machine. Takes milliseconds when known or unusable, some seconds at most.

    :param qemu: the QEMU that VMs will use
    :param kernel: the guest image's kernel; None: only the first stage is run, and the answer is not kept
    :param cache_directory: where the answer is kept; None: nowhere
    :param fresh: probe again even if the answer is known
    """
    cache = _Cache(
        cache_directory / CACHE_NAME if cache_directory else None, await asyncio.to_thread(_key, qemu, kernel)
    )
    known = None if fresh else cache.read()
    if known is not None:
        return known
    probe = await _probe(qemu, kernel, boot_timeout)
    if probe.final:
        cache.write(probe)
    return probe


async def _probe(qemu: Path, kernel: Path | None, boot_timeout: float) -> KvmProbe:
    missing = _missing_device()
    if missing:
        return KvmProbe(False, missing, final=False)
    first = await _run_first_stage()
    if not first.usable:
        hint = await asyncio.to_thread(_hardware_hint)
        return dataclasses.replace(first, reason=first.reason + hint)
    if kernel is None:
        return dataclasses.replace(first, reason=f"{first.reason} (not yet tried with the guest kernel)", final=False)
    return await _run_second_stage(qemu, kernel, boot_timeout)


def _missing_device() -> str:
    if not KVM_DEVICE.exists():
        return (
            f"{KVM_DEVICE} does not exist: no virtualization here, or the modules kvm-intel or kvm-amd are not loaded"
        )
    if not os.access(KVM_DEVICE, os.R_OK | os.W_OK):
        return f"{KVM_DEVICE} may not be opened by this user; join the group kvm and log in again"
    return ""


def _hardware_hint() -> str:
    """The usual cause, where it can be seen: KVM without virtualization hardware runs only guests made for it."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    if os.uname().machine != "x86_64" or re.search(r"^flags\s*:.*\b(vmx|svm)\b", flags, re.MULTILINE):
        return ""
    software = "; its module kvm_pvm runs only kernels made for it" if Path("/sys/module/kvm_pvm").exists() else ""
    return f" (the CPU shows neither vmx nor svm{software})"


# ---- stage 1: our own guest ------------------------------------------------------------------------------------------


async def _run_first_stage() -> KvmProbe:
    program = LIBEXEC / "hv-kvm-probe"
    if not os.access(program, os.X_OK):
        return KvmProbe(False, f"{program} is missing: build it with 'make native'", final=False)
    argv = [str(program), str(int(_STAGE1_TIMEOUT * 1000))]
    async with _running(argv) as process:
        assert process.stdout is not None
        try:
            # The program has time limits of its own, this one is for the case that it is itself stuck.
            async with asyncio.timeout(_STAGE1_TIMEOUT + 4):
                output = await process.stdout.read(4096)
                await process.wait()
        except TimeoutError:
            return KvmProbe(False, "the probe's process hangs in the kernel")
    return _parse_first_stage(output)


def _parse_first_stage(output: bytes) -> KvmProbe:
    try:
        answer = json.loads(output)
        return KvmProbe(answer["usable"] is True, str(answer["reason"]), final=answer["usable"] or answer["stage"] > 0)
    except (ValueError, KeyError, TypeError):
        return KvmProbe(False, f"the probe gave no answer: {output[:80]!r}", final=False)


# ---- stage 2: a real kernel under QEMU -------------------------------------------------------------------------------


async def _run_second_stage(qemu: Path, kernel: Path, timeout: float) -> KvmProbe:
    init = LIBEXEC / "hv-kvm-probe-init"
    if not init.exists():
        return KvmProbe(False, f"{init} is missing: build it with 'make native'", final=False)
    with tempfile.TemporaryDirectory(prefix="hv-kvm-probe-") as directory:
        initrd = Path(directory, "initrd")
        await asyncio.to_thread(_write_initramfs, initrd, init)
        async with _running(boot_argv(qemu, kernel, initrd)) as process:
            return await _watch_boot(process, timeout)


def boot_argv(qemu: Path, kernel: Path, initrd: Path, *, accelerator: Accelerator = "kvm") -> list[str]:
    """The QEMU of the second stage: the machine type and CPU that VMs get, and nothing else."""
    cpu = "host" if accelerator == "kvm" else "max"
    return [
        str(qemu), "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-machine", "pc", "-m", "256",
        "-accel", accelerator, "-cpu", cpu, "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny",
        "-serial", "stdio", "-kernel", str(kernel), "-initrd", str(initrd),
        "-append", "console=ttyS0 quiet panic=-1",
    ]  # fmt: skip


async def _watch_boot(process: asyncio.subprocess.Process, timeout: float) -> KvmProbe:
    """Reads the console until the marker, the end of QEMU, or the time limit."""
    assert process.stdout is not None
    console = b""
    try:
        async with asyncio.timeout(timeout):
            while MARKER not in console:
                chunk = await process.stdout.read(4096)
                if not chunk:
                    await process.wait()
                    return KvmProbe(False, f"QEMU with KVM ended before the guest reached user mode{_tail(console)}")
                console = (console + chunk)[-_CONSOLE_LIMIT:]
    except TimeoutError:
        return KvmProbe(
            False, f"the guest kernel did not reach user mode under KVM within {timeout:g} s{_tail(console)}"
        )
    return KvmProbe(True, "the guest kernel reached user mode under it")


def _tail(console: bytes) -> str:
    lines = [line.strip() for line in console.decode(errors="replace").splitlines() if line.strip()]
    return f": {lines[-1][:160]}" if lines else ", and said nothing"


def _write_initramfs(initrd: Path, init: Path) -> None:
    """A cpio archive (newc) that holds the one file ``/init``."""
    initrd.write_bytes(_cpio_entry("init", init.read_bytes(), 0o100755) + _cpio_entry("TRAILER!!!", b"", 0))


def _cpio_entry(name: str, content: bytes, mode: int) -> bytes:
    encoded = name.encode() + b"\0"
    fields = [0, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(encoded), 0]
    head = b"070701" + b"".join(b"%08x" % value for value in fields) + encoded
    return _padded(head) + _padded(content)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


# ---- helpers ---------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def _running(argv: list[str]) -> AsyncIterator[asyncio.subprocess.Process]:
    """A child in a session of its own, output and complaints in one pipe; killed, with its children, at the end."""
    process = await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


def _key(qemu: Path, kernel: Path | None) -> dict[str, str]:
    """All that the answer depends on."""
    return {
        "boot": _first_line(Path("/proc/sys/kernel/random/boot_id")),
        "release": os.uname().release,
        "microcode": _microcode(),
        "user": str(os.geteuid()),
        "qemu": _identity(qemu),
        "kernel": _identity(kernel) if kernel else "",
        "probe": _identity(LIBEXEC / "hv-kvm-probe"),
    }


def _first_line(file: Path) -> str:
    try:
        return file.read_text().partition("\n")[0]
    except OSError:
        return ""


def _microcode() -> str:
    try:
        found = re.search(r"^microcode\s*:\s*(\S+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return ""
    return found[1] if found else ""


def _identity(file: Path) -> str:
    """A replaced file has another; asking it for its version would cost more than the whole look-up."""
    try:
        status = file.stat()
    except OSError:
        return f"{file} (missing)"
    return f"{file.resolve()} {status.st_size} {status.st_mtime_ns}"


class _Cache:
    """The last answer and its key in one small file. A file that cannot be read or written is as good as none."""

    def __init__(self, file: Path | None, key: dict[str, str]) -> None:
        self._file = file
        self._key = key

    def read(self) -> KvmProbe | None:
        if self._file is None:
            return None
        try:
            kept = json.loads(self._file.read_text())
            if kept["version"] != _CACHE_VERSION or kept["key"] != self._key or not isinstance(kept["usable"], bool):
                return None
            return KvmProbe(kept["usable"], str(kept["reason"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, probe: KvmProbe) -> None:
        if self._file is None:
            return
        text = json.dumps(
            {"version": _CACHE_VERSION, "key": self._key, "usable": probe.usable, "reason": probe.reason}, indent=1
        )
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            _replace(self._file, text + "\n")


def _replace(file: Path, text: str) -> None:
    """Readers see the old content or the new, never half of it."""
    fd, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    try:
        with os.fdopen(fd, "w") as new:
            new.write(text)
        Path(name).replace(file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
