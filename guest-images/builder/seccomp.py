"""The containers' default seccomp profile: Debian's (containers-common), narrowed so that no container speaks vsock."""

from __future__ import annotations

from typing import Any

from builder.errors import BuildError

AF_NETLINK = 16
AF_PACKET = 17
AF_VSOCK = 40
NETLINK_AUDIT = 9
EINVAL = 22

# Ways to a socket that go around the filter on socket(2): the 32-bit multiplexer, whose arguments lie in memory where a
# filter cannot look, and io_uring, whose IORING_OP_SOCKET is no system call at all.
BYPASSES = ("socketcall", "io_uring_setup", "io_uring_enter", "io_uring_register")

_ARCHITECTURE = "amd64"


def narrow(profile: dict[str, Any]) -> dict[str, Any]:
    """The profile for our guests: other architectures' rules left out, AF_VSOCK sockets refused as any unknown call is.

    A container must not speak to the host or to the agent over vsock: the host trusts what comes from a guest's agent
    port, and the agent does whatever the host says. Rules that depend on capabilities stay as they are, in the
    `includes` and `excludes` of the docker format; the agent resolves them for each container.

    :raises BuildError: the profile has another shape than the one this was written for
    """
    try:
        rules = [rule for rule in profile["syscalls"] if _applies(rule)]
        kept = [narrowed for rule in rules if (narrowed := _without(rule, ("socket", *BYPASSES)))["names"]]
        result = {
            "defaultAction": profile["defaultAction"],
            "defaultErrnoRet": profile["defaultErrnoRet"],
            "archMap": [row for row in profile["archMap"] if row["architecture"] == "SCMP_ARCH_X86_64"],
            "syscalls": [*kept, *_socket_rules()],
        }
    except (KeyError, TypeError) as e:
        raise BuildError(f"the seccomp profile of containers-common has changed its shape: {e!r}") from e
    if profile["defaultAction"] != "SCMP_ACT_ERRNO":
        raise BuildError("the seccomp profile of containers-common no longer refuses by default")
    check(result)
    return result


def check(profile: dict[str, Any]) -> None:
    """Makes sure that no rule of a narrowed profile lets an AF_VSOCK socket through.

    :raises BuildError: one does
    """
    for rule in profile["syscalls"]:
        if rule["action"] != "SCMP_ACT_ALLOW":
            continue
        if loose := sorted(set(rule["names"]) & set(BYPASSES)):
            raise BuildError(f"the seccomp profile allows {', '.join(loose)}, which lead around its rule on sockets")
        if "socket" in rule["names"] and not any(_refuses_vsock(a) for a in rule["args"] or ()):
            raise BuildError("the seccomp profile allows AF_VSOCK sockets")


def _socket_rules() -> list[dict[str, Any]]:
    """What socket(2) may be called with. No two rules overlap, and what is refused is left to the default
    action: libseccomp 2.5 answers EEXIST to most refusals beside permissions with arguments (found with crun 1.8.1).

    Without CAP_AUDIT_WRITE a netlink audit socket is refused with EINVAL, as in Debian's profile, because programs take
    that as "no audit here". There the kernel's further families (beyond AF_PACKET) are refused altogether; our guests
    have none of them.
    """
    audit = {"caps": ["CAP_AUDIT_WRITE"]}
    return [
        _socket("ALLOW", [(0, AF_VSOCK, "NE")], includes=audit),
        _socket("ALLOW", [(0, AF_NETLINK, "LT")], excludes=audit),
        _socket("ALLOW", [(0, AF_NETLINK, "EQ"), (2, NETLINK_AUDIT, "NE")], excludes=audit),
        _socket("ERRNO", [(0, AF_NETLINK, "EQ"), (2, NETLINK_AUDIT, "EQ")], excludes=audit, errno=EINVAL),
        _socket("ALLOW", [(0, AF_PACKET, "EQ")], excludes=audit),
    ]


def _socket(
    action: str,
    conditions: list[tuple[int, int, str]],
    *,
    includes: dict[str, list[str]] | None = None,
    excludes: dict[str, list[str]] | None = None,
    errno: int | None = None,
) -> dict[str, Any]:
    rule: dict[str, Any] = {
        "names": ["socket"],
        "action": f"SCMP_ACT_{action}",
        "args": [{"index": i, "value": v, "valueTwo": 0, "op": f"SCMP_CMP_{op}"} for i, v, op in conditions],
        "includes": includes or {},
        "excludes": excludes or {},
    }
    return rule if errno is None else {**rule, "errnoRet": errno}


def _refuses_vsock(argument: dict[str, Any]) -> bool:
    """Whether a condition is never true of an AF_VSOCK socket."""
    if argument["index"] != 0:
        return False
    value, op = argument["value"], argument["op"].removeprefix("SCMP_CMP_")
    holds = {
        "NE": value != AF_VSOCK,
        "EQ": value == AF_VSOCK,
        "LT": value > AF_VSOCK,
        "LE": value >= AF_VSOCK,
        "GT": value < AF_VSOCK,
        "GE": value <= AF_VSOCK,
    }
    return not holds.get(op, True)


def _applies(rule: dict[str, Any]) -> bool:
    wanted, unwanted = rule["includes"].get("arches"), rule["excludes"].get("arches")
    return (not wanted or _ARCHITECTURE in wanted) and (not unwanted or _ARCHITECTURE not in unwanted)


def _without(rule: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {**rule, "names": [n for n in rule["names"] if n not in names], "args": rule["args"] or []}
