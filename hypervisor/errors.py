"""Every error this package raises on purpose, in one tree.

::

    HvError                 a user can read it: what, where, how to mend
    ├── InvalidInput        bad manifest, flag, reference or file; nothing was changed
    ├── NotFound            the named pod, container, image or file is not there
    ├── Conflict            exists already, or is in a state that forbids the call
    ├── ResourceExhausted   memory, disk, ids or a configured limit ran out
    ├── Unavailable         a process or device that is needed does not answer (yet, or any more)
    │   └── Timeout         ... within the stated time
    ├── HostUnfit           this machine lacks something that the call needs (``hv doctor`` says more)
    ├── VmFailed            a pod VM, its QEMU or its vmx died or never came up
    └── ProtocolError       a peer broke a protocol; the connection to it is closed

Rules: a cause is wrapped with ``raise ... from``; ``asyncio.CancelledError`` is never wrapped nor swallowed;
the message says what failed, where, and how to mend it, in one line. Details that help only a developer go to the log.
"""

from __future__ import annotations


class HvError(Exception):
    """Base of the tree. ``reason`` is the Kubernetes ``Status`` reason, ``code`` its HTTP status."""

    reason = "InternalError"
    code = 500


class InvalidInput(HvError):
    """Refused before anything was changed.

    :param where: path of the offending field, as ``spec.containers[0].image``; empty when there is none
    """

    reason = "Invalid"
    code = 422

    def __init__(self, message: str, *, where: str = "") -> None:
        super().__init__(f"{where}: {message}" if where else message)
        self.where = where


class NotFound(HvError):
    """What was named does not exist."""

    reason = "NotFound"
    code = 404


class Conflict(HvError):
    """It exists already, or its present state forbids the call."""

    reason = "Conflict"
    code = 409


class ResourceExhausted(HvError):
    """Memory, disk, ids or a configured limit ran out; whatever the call had begun was undone."""

    reason = "ResourceExhausted"
    code = 507


class Unavailable(HvError):
    """A process or device that is needed does not answer."""

    reason = "ServiceUnavailable"
    code = 503


class Timeout(Unavailable):
    """It did not answer within the stated time."""

    reason = "Timeout"
    code = 504


class HostUnfit(HvError):
    """This machine lacks something that the call needs."""

    reason = "HostUnfit"
    code = 501


class VmFailed(HvError):
    """A pod VM, its QEMU or its vmx died, or never came up."""

    reason = "VmFailed"
    code = 500


class ProtocolError(HvError):
    """A peer broke a protocol; the connection to it is closed."""

    reason = "ProtocolError"
    code = 502
