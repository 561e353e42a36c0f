"""The drill: hostile code run as a VM's confined QEMU user reaches nothing of another VM, its host, or more privileges.

Two lines of defence are tried apart, so that neither hides a hole in the other: with the launcher's seccomp filter
(most attempts end there) and without it (users, namespaces, capabilities and Landlock must hold alone). And once as an
ordinary user's host has it: all VMs run as the same user; the private root and Landlock must keep them apart.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from hypervisor.vmm import accel
from hypervisor.vmm.confine import Confinement, confined_argv, host_support, qemu_view

SOURCE = Path(__file__).parents[1] / "c/confine/hostile.c"
QEMU = Path("/usr/bin/qemu-system-x86_64")
UID_A, UID_B, UID_USER = 2_000_101, 2_000_102, 2_000_103
# Refused only by the filter.
FILTER_ONLY = {"new-user-namespace", "vsock-socket", "netlink-socket", "datagram-pair", "io-uring"}


@dataclass(frozen=True)
class Drill:
    """A state directory with two VMs, and how their processes are confined."""

    state: Path
    program: Path
    setuid_program: Path
    attacker: Confinement
    victim: Confinement
    prefix: tuple[str, ...] = ()

    def directory(self, name: str) -> Path:
        return self.state / "pods" / name / "vm"

    def argv(self, confinement: Confinement, *arguments: str) -> list[str]:
        return [*self.prefix, *confined_argv(confinement, [str(self.program), *arguments])]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    support = asyncio.run(host_support())
    if not support.private_root:  # a chroot: what is drilled here is the private root
        pytest.skip(support.reason)
    program = tmp_path_factory.mktemp("hostile") / "hostile"
    subprocess.run(["gcc", "-D_GNU_SOURCE", "-O1", "-Wall", "-static", "-o", program, SOURCE], check=True)
    return program


def landlock_version() -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    return int(libc.syscall(ctypes.c_long(444), None, ctypes.c_size_t(0), ctypes.c_uint(1)))


@pytest.fixture(params=["filter", "no-filter", "one-user"])
def drill(request: pytest.FixtureRequest, short_path: Path, hostile: Path) -> Drill:
    one_user = request.param == "one-user"
    uids = (UID_USER, UID_USER) if one_user else (UID_A, UID_B)
    state = short_path / "state"
    program, setuid_program = short_path / "hostile", short_path / "setuid"
    lay_state(state, uids, UID_USER if one_user else 0)
    shutil.copy(hostile, program)
    shutil.copy(hostile, setuid_program)
    setuid_program.chmod(0o4755)
    base = Confinement(
        user_namespace=one_user,
        ro_binds=(program, setuid_program),
        filter=request.param != "no-filter",
        rlimits=(("core", 0),),
    )
    attacker, victim = (
        replace(
            base,
            uid=None if one_user else uid,
            gid=None if one_user else uid,
            rw_binds=(state / "pods" / name / "vm",),
            directory=state / "pods" / name / "vm",
        )
        for name, uid in zip("ab", uids, strict=True)
    )
    prefix = ("setpriv", f"--reuid={UID_USER}", f"--regid={UID_USER}", "--clear-groups") if one_user else ()
    # The victim makes its sockets itself, where a VM gets them as descriptors.
    return Drill(state, program, setuid_program, attacker, replace(victim, filter=False), prefix)


def lay_state(state: Path, uids: tuple[int, int], owner: int) -> None:
    """The host's state directory with what a real one holds, with its owners and modes."""
    for name, uid in zip("ab", uids, strict=True):
        directory = state / "pods" / name / "vm"
        directory.mkdir(parents=True)
        directory.chmod(0o700)
        os.chown(directory, uid, uid)
    (state / "images").mkdir()
    (state / "token").write_text("secret")
    (state / "token").chmod(0o600)
    for path in (state, state / "pods", state / "images", state / "token", state / "pods/a", state / "pods/b"):
        os.chown(path, owner, owner)


@contextmanager
def running_victim(drill: Drill) -> Iterator[tuple[subprocess.Popen[str], str]]:
    argv = drill.argv(drill.victim, "victim", str(drill.directory("b")))
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            word, address = process.stdout.readline().split()
            assert word == "ready"
            yield process, address
        finally:
            process.kill()


def attack(drill: Drill, victim: subprocess.Popen[str], address: str) -> dict[str, str]:
    arguments = [str(victim.pid), address, str(drill.directory("b")), str(drill.state), str(drill.setuid_program)]
    argv = drill.argv(drill.attacker, "attack", *arguments)
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    lines = [line.partition(" ") for line in done.stdout.splitlines()]
    assert lines[-1][0] == "done"
    return {name: result for name, _, result in lines[:-1]}


@pytest.mark.root
def test_hostile_code_reaches_nothing(drill: Drill) -> None:
    with running_victim(drill) as (victim, address):
        results = attack(drill, victim, address)
        assert victim.poll() is None, "the attacker ended the other VM's process"
    assert results.pop("open-descriptors") == "0"
    assert len(results) >= 30
    reached = {name for name, result in results.items() if result == "SUCCESS"}
    if not drill.attacker.filter:
        reached -= FILTER_ONLY
        if landlock_version() < 6:
            reached -= {"abstract-socket"}
    assert not reached, results
    assert results["setuid-program"] == "no privilege"


@pytest.mark.root
def test_the_drill_can_succeed(drill: Drill) -> None:
    """The same attempts, not confined, reach nearly everything: the drill would notice a hole."""
    with running_victim(drill) as (victim, address):
        arguments = [str(victim.pid), address, str(drill.directory("b")), str(drill.state), str(drill.setuid_program)]
        # In a mount namespace of its own, as the attempts to mount succeed too.
        done = subprocess.run(
            ["unshare", "--mount", str(drill.program), "attack", *arguments],
            cwd=drill.directory("a"),
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert victim.wait(10) == -signal.SIGTERM
    reached = {line.split()[0] for line in done.stdout.splitlines() if line.endswith("SUCCESS")}
    assert {"open-victim-disk", "open-token", "connect-victim-socket", "open-proc-mem", "signal", "mount"} <= reached
    assert "read-memory" in reached or "ptrace" in reached


@pytest.mark.root
def test_own_network_namespace_holds_nothing(short_path: Path, hostile: Path) -> None:
    confinement = Confinement(uid=UID_A, gid=UID_A, new_network=True, ro_binds=_tools())
    argv = confined_argv(confinement, ["/bin/bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/1 || exit 7"])
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode != 0
    assert "Network is unreachable" in done.stderr or "Cannot assign requested address" in done.stderr


def _tools() -> tuple[Path, ...]:
    return tuple(path for name in ("/usr", "/bin", "/lib", "/lib64") if (path := Path(name)).exists())


def initramfs(directory: Path) -> Path:
    initrd = directory / "initrd"
    accel._write_initramfs(initrd, accel.LIBEXEC / "hv-kvm-probe-init")
    initrd.chmod(0o644)
    return initrd


@pytest.mark.qemu
@pytest.mark.parametrize("kind", ["root", "one-user", "unconfined-view"])
async def test_a_guest_boots_confined(kind: str, short_path: Path) -> None:
    """Real QEMU with its own sandbox on top, as VMs run it, to user mode of a real kernel."""
    if kind != "one-user" and os.geteuid() != 0:
        pytest.skip("needs root")
    support = await host_support()
    if not support.private_root:
        pytest.skip(support.reason)
    kernel = short_path / "vmlinuz"
    shutil.copy(Path(__file__).parents[2] / "guest-images/out/vmlinuz", kernel)
    kernel.chmod(0o644)
    initrd = initramfs(short_path)
    uid = None if kind == "one-user" else UID_A
    view = kind != "unconfined-view"
    confinement = Confinement(
        uid=uid,
        gid=uid,
        private_root=view,
        user_namespace=kind == "one-user",
        new_network=True,
        ro_binds=(*qemu_view(QEMU), kernel, initrd) if view else (),
    )
    argv = confined_argv(confinement, accel.boot_argv(QEMU, kernel, initrd, accelerator="tcg"))
    if kind == "one-user" and os.geteuid() == 0:
        argv = ["setpriv", f"--reuid={UID_USER}", f"--regid={UID_USER}", "--clear-groups", *argv]
    async with accel._running(argv) as process:
        probe = await accel._watch_boot(process, 60)
    assert probe.usable, probe.reason


@pytest.mark.qemu
@pytest.mark.slow
async def test_kvm_probe_passes_where_kvm_works(tmp_path: Path) -> None:
    """QEMU's TCG emulates AMD's virtualization: in such a guest, a real KVM runs the probe's guest."""
    packages = sorted((Path(__file__).parents[2] / "guest-images/out/cache").glob("linux-image-*.deb"))
    if not packages:
        pytest.skip("needs the kernel's package, which `make guest-image` keeps in guest-images/out/cache")
    initrd = await asyncio.to_thread(_kvm_host_initramfs, tmp_path, packages[-1])
    kernel = Path(__file__).parents[2] / "guest-images/out/vmlinuz"
    argv = accel.boot_argv(QEMU, kernel, initrd, accelerator="tcg")
    async with accel._running(argv) as process:
        assert process.stdout is not None
        async with asyncio.timeout(90):
            console = await process.stdout.read()
    assert b'"usable": true' in console, console[-2000:].decode(errors="replace")


KVM_HOST_INIT = r"""
#include <fcntl.h>
#include <stdio.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
int main(void)
{
    const char *modules[] = {"/irqbypass.ko", "/kvm.ko", "/kvm-amd.ko"};
    int status, console;
    mkdir("/dev", 0755);
    mount("dev", "/dev", "devtmpfs", 0, "");
    console = open("/dev/console", O_RDWR);
    dup2(console, 1);
    dup2(console, 2);
    for (int i = 0; i < 3; i++)
        if (syscall(SYS_finit_module, open(modules[i], O_RDONLY), "", 0)) perror(modules[i]);
    if (fork() == 0) { execl("/hv-kvm-probe", "hv-kvm-probe", "30000", (char *)0); _exit(9); }
    wait(&status);
    sync();
    reboot(RB_AUTOBOOT);
}
"""


def _kvm_host_initramfs(directory: Path, package: Path) -> Path:
    """An initramfs with KVM's modules and the probe, both static."""
    root = Path(__file__).parents[2]
    probe = sorted((root / "csrc/kvmprobe").glob("m*.c"))
    (directory / "init.c").write_text(KVM_HOST_INIT)
    gcc = ["gcc", "-D_GNU_SOURCE", "-std=gnu11", "-O1", "-static", "-o"]
    subprocess.run([*gcc, directory / "hv-kvm-probe", *probe, root / "csrc/kvmprobe/guest.S"], check=True)
    subprocess.run([*gcc, directory / "init", directory / "init.c"], check=True)
    subprocess.run(["dpkg-deb", "-x", package, directory / "package"], check=True)
    files = {name: directory / name for name in ("init", "hv-kvm-probe")}
    for name in ("irqbypass.ko", "kvm.ko", "kvm-amd.ko"):
        (files[name],) = (directory / "package").rglob(name)
    entries = [accel._cpio_entry(name, path.read_bytes(), 0o100755) for name, path in files.items()]
    initrd = directory / "initrd"
    initrd.write_bytes(b"".join(entries) + accel._cpio_entry("TRAILER!!!", b"", 0))
    return initrd
