"""The default seccomp profile, resolved for one set of capabilities.

The guest carries the profile in docker's format, whose rules may depend on capabilities (``includes``, ``excludes``);
crun takes OCI's, which has none of that. Compiling it costs crun 70 ms under TCG, so a compiled filter is used again:
the image may carry one (``seccomp-<mask of the capabilities, hex>.bpf`` beside the profile), and what crun has once
compiled is remembered. crun takes a compiled filter as an annotation.
"""

from __future__ import annotations

import binascii
import json
from contextlib import suppress
from typing import Any, NamedTuple

from .caps import mask

PROFILE_PATH = "/usr/lib/podvisor/seccomp.json"


class Filter(NamedTuple):
    """What crun is told.

    :ivar profile: an OCI ``linux.seccomp`` object; one that refuses everything where `compiled` takes its place
    :ivar compiled: the filter's program as base64, for crun's annotation; None when crun is to compile `profile`
    """

    profile: dict[str, Any]
    compiled: str | None = None


_REFUSE_ALL = {"defaultAction": "SCMP_ACT_ERRNO"}
_MAX_PROGRAM = 4096 * 8  # the kernel's limit


def resolve(profile: dict[str, Any], capabilities: list[str]) -> dict[str, Any]:
    """`profile` as an OCI ``linux.seccomp`` object for a container with `capabilities`."""
    have = set(capabilities)
    architectures: list[str] = []
    for row in profile.get("archMap") or []:
        architectures += [row["architecture"], *(row.get("subArchitectures") or [])]
    return {
        "defaultAction": profile["defaultAction"],
        "defaultErrnoRet": profile.get("defaultErrnoRet", 1),
        "architectures": architectures,
        "syscalls": [_rule(r) for r in profile["syscalls"] if _applies(r, have)],
    }


def _applies(rule: dict[str, Any], have: set[str]) -> bool:
    needed = (rule.get("includes") or {}).get("caps") or []
    barred = (rule.get("excludes") or {}).get("caps") or []
    return have.issuperset(needed) and not have.intersection(barred)


def _rule(rule: dict[str, Any]) -> dict[str, Any]:
    kept = {"names": rule["names"], "action": rule["action"]}
    if rule.get("errnoRet") is not None:
        kept["errnoRet"] = rule["errnoRet"]
    if rule.get("args"):
        kept["args"] = rule["args"]
    return kept


class Profiles:
    """The default filter for each capability set that containers have had, made once each."""

    def __init__(self, path: str = PROFILE_PATH) -> None:
        self._path = path
        self._profiles: dict[int, dict[str, Any]] = {}
        self._compiled: dict[int, str] = {}

    def get(self, capabilities: list[str]) -> Filter:
        """The filter for a container with `capabilities`.

        :raises OSError: the guest image carries no profile
        """
        key = mask(capabilities)
        if key not in self._compiled:
            with suppress(OSError):
                self._remember(key, f"{self._path.removesuffix('.json')}-{key:x}.bpf")
        if key in self._compiled:
            return Filter(_REFUSE_ALL, self._compiled[key])
        if key not in self._profiles:
            with open(self._path, encoding="utf-8") as f:
                self._profiles[key] = resolve(json.load(f), capabilities)
        return Filter(self._profiles[key])

    def learn(self, capabilities: list[str], program: str) -> None:
        """crun has compiled the filter for `capabilities`, into the file `program`; failure only costs time later."""
        key = mask(capabilities)
        if key not in self._compiled:
            with suppress(OSError):
                self._remember(key, program)
                self._profiles.pop(key, None)

    def _remember(self, key: int, path: str) -> None:
        with open(path, "rb") as f:
            program = f.read(_MAX_PROGRAM + 1)
        if program and len(program) <= _MAX_PROGRAM and len(program) % 8 == 0:
            self._compiled[key] = binascii.b2a_base64(program, newline=False).decode("ascii")
