"""Filters put into the chain of a running pod's disk, taken out, given other settings.

A disk's chain is the pod's own filters, then what the host put there: ``linkedclone``, and filters whose state goes
with the data. Only the first part is the pod's to change.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from aiohttp import web

from hypervisor.controller.api_pods import read_json
from hypervisor.controller.poddisks import CLONE, WITH_STATE, Filters, check_chain, pod_filter
from hypervisor.controller.pods import Pods
from hypervisor.controller.podvm import PodVm
from hypervisor.errors import Conflict, InvalidInput, NotFound, Unavailable
from hypervisor.iofilter.spec import FilterSpec

MAX_BODY = 64 * 1024


@runtime_checkable
class LiveDisks(Protocol):
    """A machine whose disks' chains can be seen and changed."""

    @property
    def changing(self) -> asyncio.Lock:
        """Held from a look at a chain to its change."""

    def chains(self) -> Mapping[str, tuple[str, Filters]]:
        """By the disk's name: its serial and its chain. Raises `Conflict` where QEMU serves the disks."""

    async def change_chain(self, serial: str, filters: Filters) -> float:
        """The chain is another one from now on; seconds for which requests waited. Raises `HvError`, as it was then."""


def own_part(filters: Filters) -> int:
    """How many filters of a chain are the pod's own."""
    return next((i for i, s in enumerate(filters) if s.kind == CLONE or s.kind in WITH_STATE), len(filters))


def changed(disk: str, filters: Filters, request: Mapping[str, Any]) -> Filters:
    """The chain after a request: ``op`` (``filter-add``, ``filter-remove``, ``filter-set``), ``name``; to add and to
    set ``settings``; to add ``kind`` and (may be left out) ``at``. Blocks for some milliseconds.

    :raises InvalidInput: a malformed request, or such a chain makes no sense; `NotFound`, `Conflict`
    """
    operation, name = request.get("op"), request.get("name")
    if not isinstance(name, str) or not name:
        raise InvalidInput("required, and missing", where="name")
    if operation == "filter-add":
        made = _added(disk, filters, name, request)
    elif operation == "filter-remove":
        _own(disk, filters, name)
        made = tuple(spec for spec in filters if spec.name != name)
    elif operation == "filter-set":
        old = _own(disk, filters, name)
        merged = tuple((dict(old.settings) | dict(_settings(request))).items())
        new = pod_filter(disk, old.kind, name, merged, "settings")
        made = tuple(new if spec is old else spec for spec in filters)
    else:
        raise InvalidInput("is filter-add, filter-remove or filter-set", where="op")
    check_chain(disk, made[: own_part(made)], where="filters")
    return made


def _added(disk: str, filters: Filters, name: str, request: Mapping[str, Any]) -> Filters:
    kind, at, own = request.get("kind"), request.get("at"), own_part(filters)
    if kind in WITH_STATE:
        raise InvalidInput(f"{kind} goes with the disk's data: name it in the annotation of a new pod", where="kind")
    if any(spec.name == name for spec in filters):
        raise Conflict(f"disk {disk} has a filter {name} already; name it otherwise: --as NAME")
    place = own if at is None else at
    if type(place) is not int or not 0 <= place <= own:
        raise InvalidInput(f"is a place from 0 to {own}", where="at")
    spec = pod_filter(disk, str(kind), name, _settings(request), "kind")
    return (*filters[:place], spec, *filters[place:])


def _own(disk: str, filters: Filters, name: str) -> FilterSpec:
    for i, spec in enumerate(filters):
        if spec.name == name and i < own_part(filters):
            return spec
        if spec.name == name:
            raise InvalidInput(f"without filter {name} disk {disk} would give wrong data: it stays as it is")
    known = ", ".join(spec.name for spec in filters[: own_part(filters)]) or "none"
    raise NotFound(f"disk {disk} has no filter {name}; there are: {known}")


def _settings(request: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    given = request.get("settings") or {}
    if not isinstance(given, dict) or not all(isinstance(v, str) and "\0" not in k + v for k, v in given.items()):
        raise InvalidInput("are an object of texts", where="settings")
    return tuple(given.items())


def _machine(pod: PodVm) -> LiveDisks:
    machine = pod.machine
    if machine is None or not pod.journal.record.vm_up:
        raise Unavailable(f"pod {pod.pod.name} has no running VM")
    if not isinstance(machine, LiveDisks):
        raise Conflict(f"the disks of pod {pod.pod.name} cannot be changed")
    return machine


async def change_disk(pod: PodVm, disk: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """Does what a request asks of a disk, by its name; for how long requests waited. Raises as `changed`."""
    machine = _machine(pod)
    async with machine.changing:
        chains = machine.chains()
        if disk not in chains:
            raise NotFound(f"pod {pod.pod.name} has no disk {disk[:40]}; there are: {', '.join(sorted(chains))}")
        serial, filters = chains[disk]
        kind = disk.partition("-")[0]
        wanted = await asyncio.to_thread(changed, kind, filters, request)
        return {"pause_s": await machine.change_chain(serial, wanted)}


def add_disk_routes(app: web.Application, pods: Pods) -> None:
    """``GET .../pods/NAMESPACE/POD/disks``: the chains; ``POST .../disks/DISK``: a change (see `changed`)."""

    def pod_of(request: web.Request) -> PodVm:
        return pods.get(request.match_info["namespace"], request.match_info["pod"])

    async def show(request: web.Request) -> web.Response:
        chains = _machine(pod_of(request)).chains()
        items = [
            {"name": name, "serial": serial, "filters": [spec.as_json() for spec in filters]}
            for name, (serial, filters) in chains.items()
        ]
        return web.json_response({"items": items})

    async def change(request: web.Request) -> web.Response:
        wish = await read_json(request, MAX_BODY)
        if not isinstance(wish, dict):
            raise InvalidInput("a change is an object")
        answer = await asyncio.shield(change_disk(pod_of(request), request.match_info["disk"], wish))
        return web.json_response(answer)

    one = "/hv/v1/pods/{namespace}/{pod}/disks"
    app.router.add_get(one, show)
    app.router.add_post(f"{one}/{{disk}}", change)
