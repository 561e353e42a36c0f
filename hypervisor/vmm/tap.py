"""Taps: the host's end of a VM's network device, for whoever routes to it."""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from hypervisor.errors import Conflict, HostUnfit

TUN = "/dev/net/tun"
_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI = 0x0002, 0x1000


def open_tap(name: str) -> int:
    """Makes a tap and returns its descriptor. The tap goes when the last copy of it is closed: it dies with its QEMU.

    :raises Conflict: a process has a tap of that name
    :raises HostUnfit: this host has no taps, or the caller may not make them
    """
    try:
        fd = os.open(TUN, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        mend = "modprobe tun, and run hostd as root"
        raise HostUnfit(f"pods need {TUN} for their network: {error.strerror} ({mend})") from error
    try:
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI))
    except OSError as error:
        os.close(fd)
        if error.errno == errno.EBUSY:
            raise Conflict(f"tap {name} is in use by another process") from error
        raise HostUnfit(f"cannot make tap {name}: {error.strerror}") from error
    return fd
