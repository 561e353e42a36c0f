"""The syntax of names in manifests: DNS labels and subdomains, label keys, environment variables, capabilities."""

from __future__ import annotations

import re

from hypervisor.errors import InvalidInput

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_QUALIFIED = re.compile(r"([A-Za-z0-9][-A-Za-z0-9_.]{0,61})?[A-Za-z0-9]")
_ENV = re.compile(r"[ -<>-~]+")  # printable ASCII without "=", as Kubernetes has it since 1.32

# fmt: off
CAPABILITIES = frozenset({
    "AUDIT_CONTROL", "AUDIT_READ", "AUDIT_WRITE", "BLOCK_SUSPEND", "BPF", "CHECKPOINT_RESTORE", "CHOWN",
    "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "IPC_LOCK", "IPC_OWNER", "KILL", "LEASE",
    "LINUX_IMMUTABLE", "MAC_ADMIN", "MAC_OVERRIDE", "MKNOD", "NET_ADMIN", "NET_BIND_SERVICE", "NET_BROADCAST",
    "NET_RAW", "PERFMON", "SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYSLOG", "SYS_ADMIN", "SYS_BOOT", "SYS_CHROOT",
    "SYS_MODULE", "SYS_NICE", "SYS_PACCT", "SYS_PTRACE", "SYS_RAWIO", "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG",
    "WAKE_ALARM",
})
# fmt: on


def dns_label(text: str, *, where: str) -> str:
    """`text`, if it is an RFC 1123 label; else `InvalidInput`."""
    if not _LABEL.fullmatch(text):
        raise InvalidInput(
            f"{text[:80]!r} is no DNS label: 1 to 63 of a-z, 0-9 and '-', beginning and ending with a letter or digit",
            where=where,
        )
    return text


def dns_subdomain(text: str, *, where: str) -> str:
    """`text`, if it is an RFC 1123 subdomain of at most 253 characters; else `InvalidInput`."""
    if len(text) > 253 or not _SUBDOMAIN.fullmatch(text):
        raise InvalidInput(
            f"{text[:80]!r} is no DNS name: at most 253 of a-z, 0-9, '-' and '.', each part beginning and ending with "
            "a letter or digit",
            where=where,
        )
    return text


def label_key(text: str, *, where: str) -> str:
    """`text`, if it can be the key of a label or annotation (``[prefix/]name``); else `InvalidInput`."""
    prefix, slash, name = text.rpartition("/")
    if slash:
        dns_subdomain(prefix, where=where)
    if not _QUALIFIED.fullmatch(name):
        raise InvalidInput(f"{text[:80]!r} is no label key: at most 63 of A-Z, a-z, 0-9, '-', '_' and '.'", where=where)
    return text


def label_value(text: str, *, where: str) -> str:
    """`text`, if it can be the value of a label; else `InvalidInput`."""
    if text and not _QUALIFIED.fullmatch(text):
        raise InvalidInput(
            f"{text[:80]!r} is no label value: at most 63 of A-Z, a-z, 0-9, '-', '_' and '.'", where=where
        )
    return text


def env_name(text: str, *, where: str) -> str:
    """`text`, if it can name an environment variable; else `InvalidInput`."""
    if not _ENV.fullmatch(text):
        raise InvalidInput(f"{text[:80]!r} cannot name a variable: printable ASCII without '='", where=where)
    return text


def capability(text: str, *, where: str) -> str:
    """The name without ``CAP_``, in capitals, or ``ALL``; `InvalidInput` for one that Linux does not have."""
    name = text.upper().removeprefix("CAP_")
    if name != "ALL" and name not in CAPABILITIES:
        raise InvalidInput(f"{text[:80]!r} is no capability of Linux", where=where)
    return name
