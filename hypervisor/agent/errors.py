"""The one error of the agent's calls, and how an operating system error becomes one.

``reason`` is one of the protocol's words (docs/wire-protocol.md); the host turns it into a class of its own tree.
"""

from __future__ import annotations

import errno
from typing import Any

INVALID = "Invalid"
NOT_FOUND = "NotFound"
CONFLICT = "Conflict"
EXHAUSTED = "ResourceExhausted"
UNAVAILABLE = "Unavailable"
INTERNAL = "Internal"

_BY_ERRNO = {
    errno.ENOSPC: EXHAUSTED,
    errno.EDQUOT: EXHAUSTED,
    errno.ENOMEM: EXHAUSTED,
    errno.EMFILE: EXHAUSTED,
    errno.ENFILE: EXHAUSTED,
    errno.EAGAIN: EXHAUSTED,
    errno.E2BIG: INVALID,
    errno.ENAMETOOLONG: INVALID,
    errno.ENOENT: NOT_FOUND,
    errno.ENOTDIR: NOT_FOUND,
    errno.ELOOP: INVALID,
}


class AgentError(Exception):
    """A call that is refused or failed, with a message for a user: what, where, how to mend.

    :param extra: further fields of the error object, as ``exit_code``
    """

    def __init__(self, reason: str, message: str, **extra: int) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.extra = extra

    def as_json(self) -> dict[str, Any]:
        """The protocol's error object."""
        return {"reason": self.reason, "message": self.message, **self.extra}


def invalid(message: str) -> AgentError:
    """The request is wrong; nothing was changed."""
    return AgentError(INVALID, message)


def not_found(message: str) -> AgentError:
    """What the request names does not exist."""
    return AgentError(NOT_FOUND, message)


def conflict(message: str) -> AgentError:
    """The present state forbids the call."""
    return AgentError(CONFLICT, message)


def from_os(what: str, error: OSError) -> AgentError:
    """`error`, met while doing `what`, as an answer."""
    reason = _BY_ERRNO.get(error.errno or 0, INTERNAL)
    return AgentError(reason, f"{what}: {error.strerror or error}")
