"""The guest's part in becoming a template: do once, before it is taken, what every clone would otherwise do anew.

A guest whose kernel command line has ``podvisor.template`` says on its console when it is ready. Before that it
rehearses a container: its own root as the image, memory as the data disk. So crun and its libraries are in the page
cache, the code on the way has run, and the seccomp filter of the default capabilities is compiled. Afterwards
everything is taken back: the guest is as freshly booted, and what clones must not share they get by ``setup``.
"""

from __future__ import annotations

import binascii
import importlib
import os
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from . import syscalls
from .errors import AgentError
from .storage import DATA, IMAGES, SHARED_MEMORY

if TYPE_CHECKING:
    from .calls import Agent

WORD = "podvisor.template"
#: waited for by hypervisor/vmm/templates/build.py
READY_LINE = "podvisor: ready to be a template"
#: modules that calls import when they are first made
_LATER = ("base64", "tarfile", "hypervisor.agent.archive", "hypervisor.agent.tarstream")
_NAME = "rehearsal"
_OWN_ROOT = "hv-root"
_PROGRAM = "/usr/lib/podvisor/hv-exec"


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
    try:
        await _rehearse(agent)
    except (AgentError, OSError) as e:
        sys.stderr.write(f"agent: rehearsal: {e}\n")
    finally:
        _take_back(agent)
    sys.stderr.write(READY_LINE + "\n")
    sys.stderr.flush()


async def _rehearse(agent: Agent) -> None:
    from . import setup
    from .spec import parse_spec

    entropy = binascii.b2a_base64(os.urandom(32), newline=False).decode()
    settings = {"hostname": "template", "clock_ns": time.time_ns(), "entropy": entropy, "data_disk": None}
    await agent.setup.run(setup.parse(settings))
    # hv-exec without a request ends at once and complains, which is all that is wanted of it.
    spec = parse_spec({"name": _NAME, "image_disk": _OWN_ROOT, "argv": [_PROGRAM]})
    container = await agent.engine.start(spec)
    if container.watcher is not None:
        await container.watcher
    await agent.engine.remove(_NAME)


def _take_back(agent: Agent) -> None:
    agent.engine.containers.clear()
    agent.setup.done = False
    for target in (f"{IMAGES}/{_OWN_ROOT}", SHARED_MEMORY, DATA):
        with suppress(OSError):  # it was not mounted
            syscalls.unmount(target)
    with suppress(OSError):
        os.rmdir(f"{IMAGES}/{_OWN_ROOT}")
