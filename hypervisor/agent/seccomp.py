"""The default seccomp profile, resolved for one set of capabilities.

The guest carries the profile in docker's format, whose rules may depend on capabilities (``includes``, ``excludes``);
crun takes OCI's, which has none of that.
"""

from __future__ import annotations

import json
from typing import Any

PROFILE_PATH = "/usr/lib/podvisor/seccomp.json"


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
    """Resolved profiles by capability set: reading and resolving costs milliseconds under TCG, so each is made once."""

    def __init__(self, path: str = PROFILE_PATH) -> None:
        self._path = path
        self._made: dict[tuple[str, ...], dict[str, Any]] = {}

    def get(self, capabilities: list[str]) -> dict[str, Any]:
        """The OCI object for `capabilities`.

        :raises OSError: the guest image carries no profile
        """
        key = tuple(capabilities)
        if key not in self._made:
            with open(self._path, encoding="utf-8") as f:
                self._made[key] = resolve(json.load(f), capabilities)
        return self._made[key]
