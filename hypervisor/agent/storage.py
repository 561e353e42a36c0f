"""Disks and mounts: the pod's data disk, image disks, and a container's root.

Everything that grows lies on the data disk, so that a container that fills it gets ENOSPC and nothing else breaks.
Containers cannot reach these mounts but through their own mount namespaces; paths that a request names inside a volume
are resolved with `open_in_root`.
"""

from __future__ import annotations

import asyncio
import os
import stat
from contextlib import suppress

from . import syscalls
from .cgroup import read_text
from .errors import UNAVAILABLE, AgentError, from_os, not_found
from .quota import MOUNT_OPTION, Quotas
from .spec import File, VolumeMount

DATA = "/data"
IMAGES = "/mnt/images"
RUN = "/run/podvisor"
CONTAINERS = f"{RUN}/containers"
MEMORY_VOLUMES = f"{RUN}/volumes"
SHARED_MEMORY = f"{RUN}/shm"
LOGS = f"{DATA}/logs"
_DISK_WAIT_S = 5.0
_TRASH = f"{DATA}/trash"


def make_directories() -> None:
    """What the rest of the agent expects below /run."""
    for path in (RUN, CONTAINERS, MEMORY_VOLUMES, SHARED_MEMORY, f"{RUN}/empty", IMAGES):
        os.makedirs(path, mode=0o755, exist_ok=True)


def is_mounted(directory: str) -> bool:
    """Whether something is mounted on `directory`, which exists. (`os.path.ismount` is much code for that.)"""
    return os.stat(directory).st_dev != os.stat(f"{directory}/..").st_dev


def write_whole(path: str, data: bytes) -> None:
    """Makes or replaces a file that everybody may read. (Python's own files are 2 ms each in cold code.)"""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        while data:
            data = data[os.write(fd, data) :]
    finally:
        os.close(fd)


def _serial_of(block: str) -> str:
    try:
        return read_text(f"/sys/block/{block}/serial").strip()
    except OSError:
        return ""


async def find_disk(serial: str) -> str:
    """The device of the disk with that serial; waits a little for one that is being plugged in.

    :raises AgentError: NotFound
    """
    for _ in range(int(_DISK_WAIT_S * 20)):
        for block in os.listdir("/sys/block"):
            if block.startswith("vd") and _serial_of(block) == serial:
                return f"/dev/{block}"
        await asyncio.sleep(0.05)
    raise not_found(f"disk {serial}: no virtio disk with that serial has appeared within {_DISK_WAIT_S:g} s")


async def mount_data(serial: str | None, *, quotas: bool = False) -> None:
    """Mounts the pod's writable disk (ext4) at /data; without a serial, memory takes its place.

    :param quotas: the disk was made for them, and they are to hold
    :raises AgentError: the disk is missing or cannot be mounted
    """
    if is_mounted(DATA):  # setup failed later on and is being repeated
        return
    flags = syscalls.MS_NODEV
    try:
        if serial is None:
            syscalls.mount("data", DATA, "tmpfs", flags, "mode=0755")
        else:
            # The disk is a hole, so no table of inodes needs zeroing by a thread of the kernel's.
            options = "errors=remount-ro,noinit_itable" + (f",{MOUNT_OPTION}" if quotas else "")
            syscalls.mount(await find_disk(serial), DATA, "ext4", flags | syscalls.MS_RELATIME, options)
        for name in ("containers", "volumes", "logs", "etc", "trash"):
            os.makedirs(f"{DATA}/{name}", mode=0o755, exist_ok=True)
        syscalls.mount("shm", SHARED_MEMORY, "tmpfs", syscalls.MS_NOSUID | syscalls.MS_NODEV, "mode=1777,size=65536k")
    except OSError as e:
        raise AgentError(UNAVAILABLE, f"data disk {serial}: cannot be mounted: {e.strerror}") from e


async def mount_image(serial: str) -> str:
    """The directory of an image disk, mounted read-only on first use."""
    directory = f"{IMAGES}/{serial}"
    if os.path.lexists(directory) and is_mounted(directory):
        return directory
    device = await find_disk(serial)
    os.makedirs(directory, exist_ok=True)
    try:
        syscalls.mount(device, directory, "erofs", syscalls.MS_RDONLY | syscalls.MS_NODEV)
    except OSError as e:
        if is_mounted(directory):  # another container of the same image was quicker
            return directory
        raise AgentError(UNAVAILABLE, f"image disk {serial}: cannot be mounted: {e.strerror}") from e
    return directory


class Root:
    """A container's root: an overlay of the image and a writable layer on the data disk, and what is bound into it."""

    def __init__(self, name: str) -> None:
        self.directory = f"{CONTAINERS}/{name}"
        self.path = f"{self.directory}/rootfs"
        self._layers = f"{DATA}/containers/{name}"
        self._binds = 0
        self._project = 0
        self._quotas: Quotas | None = None

    async def mount(self, image_disk: str, quotas: Quotas, limit: int | None) -> None:
        """Makes a fresh writable layer and mounts the whole; an earlier one is discarded.

        :param limit: of the writable layer, in bytes; holds where there are quotas
        :raises AgentError: the image disk is missing, the data disk is full
        """
        if os.path.lexists(self._layers):
            self.unmount()
        lower = await mount_image(image_disk)
        upper, work = f"{self._layers}/upper", f"{self._layers}/work"
        try:
            if quotas.on:
                os.makedirs(self._layers)
                self._quotas, self._project = quotas, quotas.assign(self._layers, limit)
            for path in (upper, work, f"{self._layers}/files", self.path, f"{self.directory}/binds"):
                os.makedirs(path, exist_ok=True)
            os.chmod(upper, 0o755)
            options = f"lowerdir={lower},upperdir={upper},workdir={work}"
            syscalls.mount("overlay", self.path, "overlay", syscalls.MS_NODEV, options)
        except OSError as e:
            raise from_os("the container's root", e) from e

    def unmount(self) -> None:
        """Unmounts everything and discards the writable layer; harmless when there is none."""
        self.release_binds()
        with suppress(OSError):  # not mounted
            syscalls.unmount(self.path, syscalls.MNT_DETACH)
        discard(self._layers)

    def disk_usage(self) -> int:
        """Bytes of its writable layer. Blocks, where the kernel does not count them: run it in a thread."""
        if self._quotas is not None:
            return self._quotas.used(self._project)
        return disk_usage(f"{self._layers}/upper")

    def open(self) -> int:
        """A descriptor of the root directory."""
        return os.open(self.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def bind_source(self, volume: str, mount: VolumeMount) -> str:
        """A path that crun can bind for `mount`: the volume itself, or its sub-path pinned by a bind mount of our own.

        The pin is needed because a container that shares the volume could swap the sub-path for a link at any time.
        """
        if not mount.sub_path:
            return volume
        fd = _open_sub_path(volume, mount.sub_path)
        try:
            self._binds += 1
            pin = f"{self.directory}/binds/{self._binds}"
            _make_target(pin, stat.S_ISDIR(os.fstat(fd).st_mode))
            syscalls.mount(f"/proc/self/fd/{fd}", pin, None, syscalls.MS_BIND)
        except OSError as e:
            raise from_os(f"sub-path {mount.sub_path!r} of volume {mount.volume}", e) from e
        finally:
            os.close(fd)
        return pin

    def release_binds(self) -> None:
        """Undoes `bind_source` once crun has bound the paths (or never will)."""
        while self._binds:
            with suppress(OSError):
                syscalls.unmount(f"{self.directory}/binds/{self._binds}", syscalls.MNT_DETACH)
            self._binds -= 1

    @property
    def message_file(self) -> str:
        """Where the container's termination message lies, once `make_message_file` has been called."""
        return f"{self._layers}/files/message"

    def make_message_file(self) -> str:
        """An empty file that anybody in the container may write, to be bound into it."""
        try:
            fd = os.open(self.message_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                os.fchmod(fd, 0o666)
            finally:
                os.close(fd)
        except OSError as e:
            raise from_os("the termination message's file", e) from e
        return self.message_file

    def write_file(self, index: int, file: File) -> str:
        """A guest file with that content, to be bound into the container."""
        path = f"{self._layers}/files/{index}"
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "wb") as f:
                f.write(file.content)
                os.fchmod(f.fileno(), file.mode)
        except OSError as e:
            raise from_os(f"file {file.path}", e) from e
        return path


def _make_target(path: str, directory: bool) -> None:
    if directory:
        os.makedirs(path, exist_ok=True)
    else:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))


def _open_sub_path(volume: str, sub_path: str) -> int:
    """Opens a sub-path, making missing directories; links in it cannot lead out of the volume."""
    root = os.open(volume, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            return syscalls.open_in_root(root, sub_path, os.O_PATH)
        except FileNotFoundError:
            _make_below(root, [part for part in sub_path.split("/") if part not in ("", ".")])
            return syscalls.open_in_root(root, sub_path, os.O_PATH)
    except OSError as e:
        raise from_os(f"sub-path {sub_path!r}", e) from e
    finally:
        os.close(root)


def _make_below(root: int, parts: list[str]) -> None:
    for i in range(len(parts)):
        parent = syscalls.open_in_root(root, "/".join(parts[:i]) or ".", os.O_PATH | os.O_DIRECTORY)
        try:
            os.mkdir(parts[i], 0o755, dir_fd=parent)
        except FileExistsError:
            pass
        finally:
            os.close(parent)


# ---- removing --------------------------------------------------------------------------------------------------------


def discard(directory: str) -> None:
    """Takes a tree out of the way at once; `empty_trash` frees its space."""
    try:
        os.makedirs(_TRASH, exist_ok=True)
        os.rename(directory, f"{_TRASH}/{os.path.basename(directory)}-{os.urandom(6).hex()}")
    except OSError:
        pass  # there is none


def empty_trash() -> None:
    """Deletes what was discarded. Blocks: run it in a thread."""
    try:
        names = os.listdir(_TRASH)
    except OSError:
        return
    if names:
        import shutil

        for name in names:
            shutil.rmtree(f"{_TRASH}/{name}", ignore_errors=True)


def disk_usage(path: str) -> int:
    """Bytes that a tree takes on its disk, without following links or leaving its file system. Blocks."""
    total = 0
    pending = [path]
    while pending:
        try:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    info = entry.stat(follow_symlinks=False)
                    total += info.st_blocks * 512
                    if stat.S_ISDIR(info.st_mode):
                        pending.append(entry.path)
        except OSError:
            continue
    return total
