"""OCI images in, read-only EROFS virtual disks out; content-addressed, built once, shared by every pod of the host.

What callers need is here; ``docs/images.md`` tells the whole story. From the bottom up::

    model, policy, reference            values
    zstd, blobs, tarstream              verified streams, and tar archives in them
    erofs, tree, layers, disk, build    layers -> one tree -> one disk
    documents, files, sources           manifests and configs; layouts and archives on this host
    worker, work                        the process that builds, and who runs it
    skopeo, credentials, fetch          registries
    locks, catalog, store               what is kept, and the service itself
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hypervisor.images.credentials import Credentials, login, logout
    from hypervisor.images.model import Image, ImageConfig, Limits, Platform, Progress, ProgressEvent
    from hypervisor.images.policy import PullPolicy
    from hypervisor.images.reference import Reference
    from hypervisor.images.store import ImageStore, Lease

_HOMES = {
    "Credentials": "credentials",
    "Image": "model",
    "ImageConfig": "model",
    "ImageStore": "store",
    "Lease": "store",
    "Limits": "model",
    "Platform": "model",
    "Progress": "model",
    "ProgressEvent": "model",
    "PullPolicy": "policy",
    "Reference": "reference",
    "login": "credentials",
    "logout": "credentials",
}

__all__ = [
    "Credentials",
    "Image",
    "ImageConfig",
    "ImageStore",
    "Lease",
    "Limits",
    "Platform",
    "Progress",
    "ProgressEvent",
    "PullPolicy",
    "Reference",
    "login",
    "logout",
]


def __getattr__(name: str) -> Any:
    """Import on first use: the worker and the CLI must not pay for asyncio and all that the store needs."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
