"""Who a VM is on its host: a CID of its own, and a user of its own where hostd is root.

A number is not handed out again while a VM of this pool holds it, nor a user id while any process of the host runs as
it: what a VM left behind can never belong to its successor.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import struct
import threading
from dataclasses import dataclass
from pathlib import Path

from hypervisor.errors import Conflict, HostUnfit, ResourceExhausted
from hypervisor.vmm.capabilities import VHOST_VSOCK, HostCapabilities

#: 0 to 2 are reserved; small ones are what people choose by hand
FIRST_CID = 10_000
LAST_CID = 0x7FFFFFFF
_SET_GUEST_CID = 0x4008AF60  # VHOST_VSOCK_SET_GUEST_CID
_UID_LINE = re.compile(rb"^Uid:\s+(\d+)\s+(\d+)\s+(\d+)\s+(\d+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class VmIdentity:
    """``uid`` None: the VM's processes run as hostd's user. The group has the user's number."""

    cid: int
    uid: int | None


class IdentityPool:
    """Hands out identities; one per host daemon. Thread-safe."""

    def __init__(self, capabilities: HostCapabilities) -> None:
        self._kernel_vsock = capabilities.vsock == "kernel"
        self._uids = capabilities.uid_range
        self._lock = threading.Lock()
        self._held: set[VmIdentity] = set()
        # Where to look next: far from what an earlier daemon has just used, whose kernel objects may be in their last
        # moments.
        self._turn = int.from_bytes(os.urandom(2), "big")

    def take(self) -> VmIdentity:
        """A free identity. Blocks for some milliseconds: it looks through /proc.

        :raises ResourceExhausted: none is free
        """
        with self._lock:
            identity = VmIdentity(self._free_cid(), self._free_uid())
            self._held.add(identity)
            return identity

    def claim(self, identity: VmIdentity) -> None:
        """Note that an adopted VM holds `identity`."""
        with self._lock:
            self._held.add(identity)

    def release(self, identity: VmIdentity) -> None:
        """The VM is gone; harmless when repeated."""
        with self._lock:
            self._held.discard(identity)

    def _free_cid(self) -> int:
        held = {i.cid for i in self._held}
        for _ in range(70_000):
            self._turn += 1
            cid = FIRST_CID + self._turn % 1_000_000
            if cid not in held and not (self._kernel_vsock and kernel_cid_taken(cid)):
                return cid
        raise ResourceExhausted("no vsock CID is free on this host; stop some VMs")

    def _free_uid(self) -> int | None:
        if self._uids is None:
            return None
        first, last = self._uids
        count = last - first + 1
        taken = {i.uid for i in self._held} | running_uids()
        for i in range(count):
            uid = first + (self._turn + i) % count
            if uid not in taken:
                return uid
        raise ResourceExhausted(f"all {count} users for VMs ({first} to {last}) are taken; stop some VMs")


def running_uids() -> set[int]:
    """Every real, effective, saved and file-system user id of a process of this host."""
    found: set[int] = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            found |= _uids_of(entry)
    return found


def _uids_of(process: Path) -> set[int]:
    try:
        match = _UID_LINE.search((process / "status").read_bytes())
    except OSError:  # it ended meanwhile
        return set()
    return {int(uid) for uid in match.groups()} if match else set()


def open_kernel_vsock(cid: int) -> int:
    """``/dev/vhost-vsock`` with `cid` taken on it: nobody else can get that CID while the descriptor is open.

    :raises Conflict: the CID is taken
    :raises HostUnfit: the device does not open
    """
    try:
        fd = os.open(VHOST_VSOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError as e:
        raise HostUnfit(f"cannot open {VHOST_VSOCK}: {e.strerror}; see `hv doctor`") from e
    try:
        fcntl.ioctl(fd, _SET_GUEST_CID, struct.pack("=Q", cid))
    except OSError as e:
        os.close(fd)
        if e.errno == errno.EADDRINUSE:
            raise Conflict(f"vsock CID {cid} is taken on this host; start the VM again for another") from e
        raise HostUnfit(f"{VHOST_VSOCK} refuses CID {cid}: {e.strerror}") from e
    return fd


def kernel_cid_taken(cid: int) -> bool:
    """Whether some VM of this host has `cid`; raises `HostUnfit` as `open_kernel_vsock`."""
    try:
        os.close(open_kernel_vsock(cid))
    except Conflict:
        return True
    return False
