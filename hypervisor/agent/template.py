"""The guest's part in becoming a template: do once, before it is taken, what every clone would otherwise do anew.

A guest whose kernel command line has ``podvisor.template`` says on its console when it is ready. Before that it
rehearses a container: its own root as the image, memory as the data disk. So crun and its libraries are in the page
cache, the code on the way has run, and the seccomp filter of the default capabilities is compiled. Afterwards
everything is taken back: the guest is as freshly booted, and what clones must not share they get by ``setup``.

It is taken while the agent looks for a vsock device, which a template cannot have: so that is the first thing that a
clone does. QEMU would announce the device by an ACPI event. Interpreting the event's method is 0.1 s of cold code under
TCG, so the event stays masked until the device has been found by looking at the bus.
"""

from __future__ import annotations

import binascii
import fcntl
import importlib
import os
import socket
import struct
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from . import syscalls
from .errors import AgentError
from .setup import USER_NETWORK
from .storage import DATA, IMAGES, SHARED_MEMORY

if TYPE_CHECKING:
    from collections.abc import Callable

    from .calls import Agent

WORD = "podvisor.template"
#: waited for by hypervisor/vmm/templates/build.py
READY_LINE = "podvisor: ready to be a template"
#: modules that calls import when they are first made
_LATER = ("base64", "tarfile", "hypervisor.agent.archive", "hypervisor.agent.tarstream")
_NAME = "rehearsal"
_OWN_ROOT = "hv-root"
_PROGRAM = "/usr/lib/podvisor/hv-exec"
_PROGRAMS = (_PROGRAM, "/usr/lib/podvisor/modules.bundle", "/usr/bin/crun", "/usr/bin/python3")
_NIC = f"/sys/class/net/{USER_NETWORK.interface}"
#: the event of PCI hot-plug in QEMU's ACPI tables, for machine pc and q35
_HOTPLUG = "/sys/firmware/acpi/interrupts/gpe01"
_RESCAN = "/sys/bus/pci/rescan"
_LOOK_S = 0.004
_GET_LOCAL_CID = 0x7B9
_NO_CID = struct.pack("I", socket.VMADDR_CID_ANY)


def wanted() -> bool:
    """Whether this guest is to become a template."""
    try:
        with open("/proc/cmdline") as file:
            return WORD in file.read().split()
    except OSError:
        return False


async def prepare(agent: Agent) -> None:
    """Imports and rehearses, then says that the guest is ready. A failure is said, and costs clones only time."""
    for name in _LATER:
        with suppress(ImportError):  # not in this image: the call that needs it says so
            importlib.import_module(name)
    if os.path.exists(_NIC):
        _try("network", lambda: agent.setup.connect(USER_NETWORK))
    await rehearse(agent, None)
    _try("reading ahead", _read_ahead)
    event = _open_event()
    _tell(event, "mask")
    sys.stderr.write(READY_LINE + "\n")
    sys.stderr.flush()
    _find_vsock()
    _tell(event, "clear")
    _tell(event, "unmask")
    if event >= 0:
        os.close(event)


def _try(what: str, step: Callable[[], None]) -> None:
    try:
        step()
    except (AgentError, OSError) as e:
        sys.stderr.write(f"agent: {what}: {e}\n")


def _read_ahead() -> None:
    """Has all programs in memory, and this one mapped: a clone that reads its root disk waits for it."""
    for path in _PROGRAMS:
        with open(path, "rb") as file:
            while file.read(1 << 20):
                pass
    syscalls.populate()


async def rehearse(agent: Agent, data_disk: str | None) -> None:
    """Runs a container and takes everything back; before `setup` only. A failure is said, and costs only time.

    In a clone that waits for its pod this has the code on the way translated, which each QEMU has to do for itself.

    :param data_disk: serial of the disk that takes part; None: memory takes its place
    """
    try:
        await _rehearse(agent, data_disk)
    except (AgentError, OSError) as e:
        sys.stderr.write(f"agent: rehearsal: {e}\n")
    finally:
        _take_back(agent)


async def _rehearse(agent: Agent, data_disk: str | None) -> None:
    from . import setup
    from .spec import parse_spec

    entropy = binascii.b2a_base64(os.urandom(32), newline=False).decode()
    settings = {"hostname": "template", "clock_ns": time.time_ns(), "entropy": entropy, "data_disk": data_disk}
    await agent.setup.run(setup.parse(settings)._replace(network=agent.setup.network))
    # hv-exec without a request ends at once and complains, which is all that is wanted of it.
    spec = parse_spec({"name": _NAME, "image_disk": _OWN_ROOT, "argv": [_PROGRAM]})
    container = await agent.engine.start(spec)
    if container.watcher is not None:
        await container.watcher
    await agent.engine.remove(_NAME)


def _find_vsock() -> None:
    """Looks at the PCI bus until there is a vsock device. Blocks: before that nobody can ask for anything."""
    vsock = os.open("/dev/vsock", os.O_RDONLY | os.O_CLOEXEC)
    rescan = os.open(_RESCAN, os.O_WRONLY | os.O_CLOEXEC)
    try:
        while fcntl.ioctl(vsock, _GET_LOCAL_CID, _NO_CID) == _NO_CID:
            time.sleep(_LOOK_S)
            os.write(rescan, b"1")
    finally:
        os.close(rescan)
        os.close(vsock)


def _open_event() -> int:
    """The event of PCI hot-plug, open before the template is taken: a clone does not look for it; -1 without one."""
    try:
        return os.open(_HOTPLUG, os.O_WRONLY | os.O_CLOEXEC)
    except OSError as e:  # another kernel calls it otherwise; a clone is slower then
        sys.stderr.write(f"agent: {_HOTPLUG}: {e.strerror}\n")
        return -1


def _tell(event: int, word: str) -> None:
    with suppress(OSError):  # "clear": nothing has come
        os.pwrite(event, word.encode() + b"\n", 0)


def _take_back(agent: Agent) -> None:
    agent.engine.containers.clear()
    agent.setup.done = False
    for target in (f"{IMAGES}/{_OWN_ROOT}", SHARED_MEMORY, DATA):
        with suppress(OSError):  # it was not mounted
            syscalls.unmount(target)
    with suppress(OSError):
        os.rmdir(f"{IMAGES}/{_OWN_ROOT}")
