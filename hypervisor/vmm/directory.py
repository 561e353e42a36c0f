"""A VM's state folder: what is where, and how it is made so that its content can be trusted.

The directory and its files belong to hostd's user and nobody else may enter: logs, disk and sockets reach the VM's
processes as descriptors. Only ``vmx/`` in it belongs to the VM's user; nothing in there is believed. ::

    config.json      the launch plan                          qmp.sock       QEMU's control socket
    processes.json   pids with start times                    disk.img       the data disk
    console.log      the guest's console, bounded             vmx/vsock.sock host side of the guest's vsock
    qemu.log         QEMU's stderr, bounded                   vmx/vmx.sock   vmx's control socket
    template/        a clone's: links to its template's RAM and manifest, for as long as the VM needs them
    snapshot/        links to the snapshot that it went on from, likewise
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path

from hypervisor.errors import Conflict, HvError, InvalidInput, ResourceExhausted
from hypervisor.vmm import records
from hypervisor.vmx.config import CONTROL_SOCKET, HOST_SOCKET
from hypervisor.vmx.process import ProcessId

#: ``sun_path`` less its final NUL, less the longest name that is made in the directory (``/vmx/vsock.sock_4294967295``)
MAX_PATH = 107 - 26


@dataclass(frozen=True, slots=True)
class Processes:
    """Content of ``processes.json``, written each time before the next process is started.

    :param boot: the host's boot id: start times mean nothing after a reboot
    """

    boot: str
    vmx: ProcessId | None = None
    qemu: ProcessId | None = None


@dataclass(frozen=True, slots=True)
class VmDirectory:
    """Names in a VM's state folder at absolute `path`."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def processes(self) -> Path:
        return self.path / "processes.json"

    @property
    def disk(self) -> Path:
        return self.path / "disk.img"

    @property
    def base(self) -> Path:
        """What the data disk is a linked clone of, if it is."""
        return self.path / "base.img"

    @property
    def console_log(self) -> Path:
        return self.path / "console.log"

    @property
    def qemu_log(self) -> Path:
        return self.path / "qemu.log"

    @property
    def qmp_socket(self) -> Path:
        return self.path / "qmp.sock"

    @property
    def vmx(self) -> Path:
        """vmx's own folder, the only thing here that belongs to the VM's user: vmx has it as its root."""
        return self.path / "vmx"

    @property
    def template(self) -> Path:
        """What a clone's RAM is filled from, whatever becomes of the template's own folder meanwhile."""
        return self.path / "template"

    @property
    def snapshot(self) -> Path:
        """What else its RAM is filled from, where it goes on from a snapshot."""
        return self.path / "snapshot"

    @property
    def last(self) -> Path:
        """What the next snapshot is compared with: links to the last one that was taken of it."""
        return self.path / "last"

    @property
    def vsock_socket(self) -> Path:
        return self.vmx / HOST_SOCKET

    @property
    def vmx_socket(self) -> Path:
        return self.vmx / CONTROL_SOCKET

    def disk_socket(self, number: int) -> Path:
        """Where QEMU takes vmx's connection for the disk whose descriptor has that number."""
        return self.path / f"disk-{number}.sock"

    def check_path(self) -> None:
        """Refuse a path that no socket would fit in.

        :raises InvalidInput: relative, or longer than `MAX_PATH` bytes
        """
        if not self.path.is_absolute():
            raise InvalidInput(f"{self.path} is relative; give an absolute path", where="directory")
        if len(os.fsencode(self.path)) > MAX_PATH:
            raise InvalidInput(
                f"{self.path} is longer than {MAX_PATH} bytes, too long for Unix sockets in it; "
                "choose a shorter state directory (--state-dir)", where="directory",
            )  # fmt: skip

    def create(self, *, uid: int | None) -> None:
        """Make the directory and ``vmx/`` in it, which user `uid` owns; on failure there is neither.

        :raises Conflict: it exists
        """
        try:
            self.path.mkdir(mode=0o700)
        except FileExistsError as e:
            raise Conflict(f"{self.path} exists; another VM uses it, or its leftovers were not swept") from e
        except OSError as e:
            raise disk_error(e, f"cannot make {self.path}") from e
        try:
            self.vmx.mkdir(mode=0o700)
            if uid is not None:
                os.chown(self.vmx, uid, uid)
        except OSError as e:
            self.remove()
            raise disk_error(e, f"cannot make {self.vmx}") from e

    def remove(self) -> None:
        """Delete the directory with all in it; harmless when it is gone."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self.path.exists():
            raise Conflict(f"cannot delete {self.path}; look at its owner and mounts")

    def listen(self, path: Path) -> socket.socket:
        """A listening Unix socket at `path`, which only hostd's user may connect to."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            os.fchmod(listener.fileno(), 0o600)  # before bind: it is the node's mode from its first moment
            listener.bind(str(path))
            listener.listen(128)
        except OSError as e:
            listener.close()
            raise disk_error(e, f"cannot make the socket {path}") from e
        return listener

    def open_log(self, path: Path) -> int:
        """A new empty log, open for reading and writing."""
        try:
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as e:
            raise disk_error(e, f"cannot make {path}") from e

    def write_processes(self, processes: Processes) -> None:
        """Record which processes are this VM's; the old record or the new one survives a crash, whole."""
        write_atomically(self.processes, records.dumps(processes))

    def read_processes(self) -> Processes:
        """What was recorded last in this boot; nothing when there is no record, or none that can be read."""
        try:
            recorded = records.loads(Processes, self.processes.read_bytes(), where=str(self.processes))
        except (OSError, InvalidInput):
            return Processes(boot_id())
        return recorded if recorded.boot == boot_id() else Processes(boot_id())


def boot_id() -> str:
    """Names this boot of the host."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` with `text`: a reader or a crash sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        temporary.unlink(missing_ok=True)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(fd, "w", encoding="utf-8") as file:  # noqa: PTH123 -- opened above with its mode
            file.write(text)
        temporary.replace(path)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise disk_error(e, f"cannot write {path}") from e


def disk_error(error: OSError, what: str) -> HvError:
    """`error` from making a file, as one of ours."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceExhausted(f"{what}: the host's disk is full; free some space")
    return HvError(f"{what}: {error.strerror}")
