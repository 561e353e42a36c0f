"""Where a VM's memory is: proportional set sizes out of ``/proc/PID/smaps``, by what the mapping is for."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

_HEAD = re.compile(r"^[0-9a-f]+-[0-9a-f]+ (\S{4}) \S+ \S+ (\d+) *(.*)$")
CODE, RAM, HEAP, PROGRAMS = "translated code", "guest RAM", "heap, tables, stacks", "programs and libraries"
TEMPLATE = "template's pages, mapped"


def parts_mib(pid: int) -> Counter[str]:
    """MiB of each part of a QEMU or a vmx; their sum is its PSS."""
    found: Counter[str] = Counter()
    kind = HEAP
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if head := _HEAD.match(line):
            kind = _kind(*head.groups())
        elif line.startswith("Pss:"):
            found[kind] += int(line.split()[1]) / 1024
    return found


def _kind(protection: str, inode: str, name: str) -> str:
    if "memory-backend" in name:
        return RAM
    if name.endswith("/ram"):
        return RAM if "w" in protection else TEMPLATE
    if inode == "0":
        return CODE if protection.startswith("rwx") else HEAP
    return PROGRAMS


def vm_parts_mib(pids: dict[str, int]) -> Counter[str]:
    """Of a whole VM, from its processes by name; the parts are named ``process: part``, guest RAM only once."""
    found: Counter[str] = Counter()
    for process, pid in pids.items():
        for part, mib in parts_mib(pid).items():
            found[part if part == RAM else f"{process}: {part}"] += mib
    return found
