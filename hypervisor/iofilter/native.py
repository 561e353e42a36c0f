"""The extension module and the one place where its errors become exceptions."""

from __future__ import annotations

import errno
from typing import Any

from hypervisor.errors import Conflict, HvError, InvalidInput, NotFound, ResourceExhausted, Unavailable
from hypervisor.iofilter._iofilter import ffi as _ffi
from hypervisor.iofilter._iofilter import lib as _lib

ffi: Any = _ffi
lib: Any = _lib

_KINDS: dict[int, type[HvError]] = {
    errno.EINVAL: InvalidInput,
    errno.EBADMSG: InvalidInput,
    errno.ELOOP: InvalidInput,
    errno.EKEYREJECTED: InvalidInput,
    errno.ENAMETOOLONG: InvalidInput,
    errno.ENOTSUP: InvalidInput,
    errno.ERANGE: InvalidInput,
    errno.ENOENT: NotFound,
    errno.EEXIST: Conflict,
    errno.EBUSY: Conflict,
    errno.EALREADY: Conflict,
    errno.ENOSPC: ResourceExhausted,
    errno.ENOMEM: ResourceExhausted,
}


def new_fail() -> Any:
    """A ``struct pv_disk_fail *`` for a call."""
    return ffi.new("struct pv_disk_fail *")


def error_of(fail: Any) -> HvError:
    """The exception for a call that failed."""
    text = ffi.string(fail.text).decode("utf-8", "replace")
    return _KINDS.get(int(fail.error), Unavailable)(text)


def settings(values: tuple[tuple[str, str], ...]) -> tuple[Any, list[Any]]:
    """A C array of settings, and what must live as long as it."""
    kept: list[Any] = []
    array = ffi.new("struct pv_disk_setting[]", max(1, len(values)))
    for i, (name, value) in enumerate(values):
        kept += [ffi.new("char[]", name.encode()), ffi.new("char[]", value.encode())]
        array[i].name, array[i].value = kept[-2], kept[-1]
    return array, kept
