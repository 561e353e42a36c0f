"""The extension module and the one place where its error numbers become exceptions."""

from __future__ import annotations

import errno
import os
from typing import Any

from hypervisor.errors import HvError, InvalidInput, NotFound, ProtocolError, ResourceExhausted, Unavailable
from hypervisor.percpu._percpu import ffi as _ffi
from hypervisor.percpu._percpu import lib as _lib

ffi: Any = _ffi
lib: Any = _lib

_KINDS: dict[int, type[HvError]] = {
    errno.EINVAL: InvalidInput,
    errno.EBADF: InvalidInput,
    errno.ESTALE: NotFound,
    errno.EPROTO: ProtocolError,
    errno.ENOSPC: ResourceExhausted,
    errno.ENOMEM: ResourceExhausted,
    errno.EMFILE: ResourceExhausted,
}
_WORDS = {errno.ESTALE: "there is no such item (any more): it was closed, or the handle is another area's"}


def new_error() -> Any:
    """An ``int *err`` for a call."""
    return ffi.new("int *")


def failure(what: str, err: Any) -> HvError:
    """The exception for a failed call; `what` names the call in a user's words."""
    code = int(err[0])
    return _KINDS.get(code, Unavailable)(f"{what}: {_WORDS.get(code, os.strerror(code))}")


def valid_handle(handle: int) -> int:
    """The handle, if it could be one.

    :raises InvalidInput: it is no number of 64 bits
    """
    if not 0 <= handle < 1 << 64:
        raise InvalidInput(f"{handle} is no handle of a per-CPU item: it is the number that `handle` of another has")
    return handle


def freed(what: str) -> HvError:
    """The exception for an operation on an item that was closed."""
    return NotFound(f"{what}: {_WORDS[errno.ESTALE]}")
