"""The guest's part in becoming a template: do once, before it is taken, what every clone would otherwise do anew.

A guest whose kernel command line has ``podvisor.template`` says on its console when it is ready. Nothing here may leave
a trace that clones must not share: no random number is drawn for later use, no boot id is read, no clock is kept.
"""

from __future__ import annotations

import importlib
import os
import sys

WORD = "podvisor.template"
#: waited for by hypervisor/vmm/templates/build.py
READY_LINE = "podvisor: ready to be a template"
#: modules that calls import when they are first made
_LATER = ("base64", "tarfile", "hypervisor.agent.archive", "hypervisor.agent.tarstream")
#: programs that every pod runs; read once, their pages are in the guest's page cache
_PROGRAMS = ("/usr/bin/crun", "/usr/lib/podvisor/hv-exec")


def wanted() -> bool:
    """Whether this guest is to become a template."""
    try:
        with open("/proc/cmdline") as file:
            return WORD in file.read().split()
    except OSError:
        return False


def prepare() -> None:
    """Imports and reads what clones will need, then says so."""
    for name in _LATER:
        try:
            importlib.import_module(name)
        except ImportError:
            continue  # not in this image: the call that needs it says so
    for path in _PROGRAMS:
        _read(path)
    sys.stderr.write(READY_LINE + "\n")
    sys.stderr.flush()


def _read(path: str) -> None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        while os.read(fd, 1 << 20):
            pass
    finally:
        os.close(fd)
