"""Linux capabilities: names, numbers, the default set, and what a container gets."""

from __future__ import annotations

from .errors import invalid

# In the kernel's order: a name's place is its number.
NAMES = (
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
)

# What docker and containerd give a container that asks for nothing.
DEFAULT = frozenset(
    (
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FSETID",
        "CAP_FOWNER",
        "CAP_MKNOD",
        "CAP_NET_RAW",
        "CAP_SETGID",
        "CAP_SETUID",
        "CAP_SETFCAP",
        "CAP_SETPCAP",
        "CAP_NET_BIND_SERVICE",
        "CAP_SYS_CHROOT",
        "CAP_KILL",
        "CAP_AUDIT_WRITE",
    )
)
ALL = "ALL"


def check_caps(names: list[str], where: str) -> tuple[str, ...]:
    """`names` with the CAP_ prefix; ``ALL`` stays.

    :raises AgentError: Invalid; one of them is no capability
    """
    found = []
    for name in names:
        full = name.upper()
        if full != ALL and not full.startswith("CAP_"):
            full = f"CAP_{full}"
        if full != ALL and full not in NAMES:
            raise invalid(f"{where}: {name[:80]!r} is no Linux capability (such as NET_ADMIN, or ALL)")
        found.append(full)
    return tuple(found)


def effective(add: tuple[str, ...], drop: tuple[str, ...], privileged: bool) -> list[str]:
    """The container's capabilities, in the kernel's order: the default set, less `drop`, plus `add`.

    As Kubernetes has it: what is added by name stays even when ALL are dropped, and the other way round.
    """
    if privileged:
        return list(NAMES)
    have = set(NAMES) if ALL in add else set(DEFAULT)
    if ALL in drop:
        have = set()
    have = (have - set(drop)) | (set(add) - {ALL})
    return [name for name in NAMES if name in have]


def mask(names: list[str]) -> int:
    """A set as the kernel's bit mask."""
    return sum(1 << NAMES.index(name) for name in names)
