"""The extension module and the one place where its error numbers become exceptions."""

from __future__ import annotations

import errno
import os
from typing import Any

from hypervisor.errors import Conflict, HvError, InvalidInput, NotFound, ResourceExhausted, Unavailable
from hypervisor.memory._memory import ffi as _ffi
from hypervisor.memory._memory import lib as _lib

ffi: Any = _ffi
lib: Any = _lib

PAGE = 4096

_KINDS: dict[int, type[HvError]] = {
    errno.EINVAL: InvalidInput,
    errno.EBADMSG: InvalidInput,
    errno.ENOENT: NotFound,
    errno.EEXIST: Conflict,
    errno.ENOSPC: ResourceExhausted,
    errno.ENOMEM: ResourceExhausted,
    errno.EAGAIN: ResourceExhausted,
}


def new_error() -> Any:
    """An ``int *err`` for a call."""
    return ffi.new("int *")


def raise_for(what: str, err: Any) -> HvError:
    """The exception for a failed call; `what` names the call in a user's words."""
    code = int(err[0])
    return _KINDS.get(code, Unavailable)(f"{what}: {os.strerror(code)}")
