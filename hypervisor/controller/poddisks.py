"""A pod's own disks and their chains of I/O filters: what its annotation says, checked before anything starts.

The annotation ``hv.io/filters`` names the chain from the guest to the data::

    stats | throttle,iops=500                              all of the pod's own disks: scratch and images
    scratch: stats | error,types=write,skip=100; image: delay,us=200
    image:                                                 no filters there, and none on the scratch disk

A pod that has the annotation gets its disks served by its vmx, also where others get them from QEMU. Only filters that
need no file of the host's are taken: whoever writes a manifest may name no paths here.

Source: US 10331559 (a virtual disk's metadata names its filters).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from hypervisor.errors import InvalidInput
from hypervisor.iofilter.spec import FilterSpec
from hypervisor.vmm.config import BASE

ANNOTATION_PREFIX = "hv.io/"
FILTERS_ANNOTATION = ANNOTATION_PREFIX + "filters"
SCRATCH, IMAGE = "scratch", "image"
CLONE = "linkedclone"
DISKS = (SCRATCH, IMAGE)
MAX_FILTERS = 16
KINDS = ("delay", "error", "integrity", "null", "stats", "throttle", "trace")
"""Those that a pod's disks may have."""
_NAMED = re.compile(r"([A-Za-z0-9-]*)\s*:(.*)", re.DOTALL)
WITH_STATE = ("integrity",)
"""Those without which the data would be wrong: never taken away, nor put before data that is there."""
_OWN_SETTINGS = ("state", "file", "key", "socket", "base", "target", "delta")

Filters = tuple[FilterSpec, ...]


@dataclass(frozen=True, slots=True)
class PodDisks:
    """The chains of a pod's own disks.

    :ivar served: by vmx, whatever the host's other pods have
    """

    scratch: Filters = ()
    image: Filters = ()
    served: bool = False


NO_CHAINS = PodDisks()


def parse_disks(text: str | None, *, where: str) -> PodDisks:
    """What the annotation says; None: the pod has none. Blocks for some milliseconds where there is a chain.

    :raises InvalidInput: a filter that there is not, or that pods may not have; a broken order; a wrong setting
    """
    if text is None:
        return NO_CHAINS
    chains: dict[str, Filters] = {}
    for part in filter(None, (piece.strip() for piece in text.split(";"))):
        named = _NAMED.fullmatch(part)
        for disk in (named[1],) if named else DISKS:
            if disk not in DISKS or disk in chains:
                problem = "is named twice" if disk in chains else f"is no disk; there are {' and '.join(DISKS)}"
                raise InvalidInput(f"{disk[:40]!r} {problem}", where=where)
            chains[disk] = parse_chain(disk, named[2] if named else part, where=where)
    return PodDisks(chains.get(SCRATCH, ()), chains.get(IMAGE, ()), served=True)


def parse_chain(disk: str, text: str, *, where: str) -> Filters:
    """A chain out of ``KIND,KEY=VALUE,... | KIND ...``. Raises as `parse_disks`."""
    found: list[FilterSpec] = []
    for word in filter(None, (piece.strip() for piece in text.split("|"))):
        kind, *pairs = word.split(",")
        used = sum(spec.kind == kind for spec in found)
        found.append(pod_filter(disk, kind, f"{kind}-{used + 1}" if used else kind, _settings(pairs, where), where))
    check_chain(disk, tuple(found), where=where)
    return tuple(found)


def pod_filter(disk: str, kind: str, name: str, settings: tuple[tuple[str, str], ...], where: str) -> FilterSpec:
    """A filter for a pod's disk, with its state's file where it has one.

    :raises InvalidInput: pods may not have it, or not with such settings
    """
    if kind not in KINDS:
        raise InvalidInput(f"{kind[:40]!r} is no filter for a pod's disk; there are {', '.join(KINDS)}", where=where)
    for key, value in settings:
        if key in _OWN_SETTINGS or value.startswith(("/", ".", "file:")):
            raise InvalidInput(f"{kind}: {key[:40]}: a pod's filters name no files", where=where)
    if kind in WITH_STATE:
        if disk != SCRATCH:
            raise InvalidInput(f"{kind} is for the scratch disk: images are read-only", where=where)
        settings = (*settings, ("state", f"./{disk}.{name}.state"))
    return FilterSpec(kind, name, settings)


def check_chain(disk: str, filters: Filters, *, where: str) -> None:
    """Puts the chain together for a try. Raises as `parse_disks`."""
    from hypervisor.iofilter.trial import try_chain  # native code, which pods without filters do without

    if len(filters) > MAX_FILTERS:
        raise InvalidInput(f"{len(filters)} filters; at most {MAX_FILTERS} are taken", where=where)
    if filters:
        try:
            try_chain(filters, read_only=disk == IMAGE)
        except InvalidInput as e:
            raise InvalidInput(f"{disk}: {e}", where=where) from e


def as_clone(filters: Filters) -> Filters:
    """A scratch disk's chain with the filter that makes it a linked clone of its base: below all that stands above the
    disk's data, so that they see what the guest asks, and above what works on the clone's own data.
    """
    place = next((i for i, spec in enumerate(filters) if spec.kind in WITH_STATE), len(filters))
    clone = FilterSpec(CLONE, CLONE, (("base", BASE), ("state", f"./{SCRATCH}.{CLONE}.state")))
    return (*filters[:place], clone, *filters[place:])


def _settings(pairs: list[str], where: str) -> tuple[tuple[str, str], ...]:
    """``KEY=VALUE`` words; one without ``=`` goes on with the value before it, as in ``types=read,write``."""
    found: list[tuple[str, str]] = []
    for pair in pairs:
        key, equals, value = pair.strip().partition("=")
        if equals and key:
            found.append((key, value))
        elif found and pair.strip():
            found[-1] = (found[-1][0], f"{found[-1][1]},{pair.strip()}")
        else:
            raise InvalidInput(f"{pair[:40]!r} is no setting: KEY=VALUE is wanted", where=where)
    return tuple(found)
