"""What controllers have in common: keys to work on, workers, and knowledge of what they did that no cache shows yet.

Theory of operation
-------------------
::

    informers (shared by all controllers) --change--> keys --> WorkQueue --> worker: sync(key)
                                                                  ^             | error: again, after a back-off
                                                                  +-------------+ result: again, so many seconds later

A controller keeps nothing that it could not learn again from a list: killed at any step, its successor reads what is
and goes on from there. Names of what it makes are either determined by the owner (so that making twice is refused) or
remembered in `Unseen` until the cache shows them (so that making twice does not happen).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import structlog

from hypervisor.errors import HvError
from hypervisor.kube import meta
from hypervisor.kube.client import ApiClient, Object
from hypervisor.kube.errors import ApiError
from hypervisor.kube.events import EventRecorder
from hypervisor.kube.informer import Handler, Indexer, Informer, WorkQueue
from hypervisor.kube.meta import Key
from hypervisor.kube.resources import PODS, Resource

WORKERS = 4
BY_OWNER = "owner"
"""Index: uid of the controlling owner."""
ORPHANS = "orphans"
"""Index: namespace of objects that nobody controls."""
BY_NODE = "node"
"""Index, of pods: the node that they are on."""

log = structlog.get_logger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Context:
    """What controllers are given.

    :ivar caches: one informer for each resource that any controller watches; those of kinds that users define come and
        go (`hypervisor.master.controllers.custom`)
    :ivar queues: of controllers that run, by name
    """

    client: ApiClient
    events: EventRecorder
    caches: dict[Resource, Informer]
    queues: dict[str, WorkQueue[Key]] = field(default_factory=dict)

    def cached(self, resource: Resource, namespace: str, name: str) -> Mapping[str, Any] | None:
        """The object as the cache has it; not to be changed."""
        return self.caches[resource].store.get((namespace, name))

    def all(self, resource: Resource) -> Iterable[Mapping[str, Any]]:
        """Every object of a resource; not to be changed."""
        return self.caches[resource].store

    def owned(self, resource: Resource, owner: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """Objects that `owner` controls, as the cache has them."""
        return list(self.caches[resource].store.by_index(BY_OWNER, meta.uid_of(owner)))

    def orphans(self, resource: Resource, namespace: str) -> list[Mapping[str, Any]]:
        """Objects of a namespace that nobody controls, as the cache has them."""
        return list(self.caches[resource].store.by_index(ORPHANS, namespace))


class Controller(Protocol):
    """One loop."""

    @property
    def name(self) -> str:
        """What the log calls it."""

    @property
    def watches(self) -> Mapping[Resource, Callable[[Mapping[str, Any]], Iterable[Key]]]:
        """For each resource the keys that a change of such an object puts to work."""

    async def sync(self, key: Key) -> float | None:
        """Brings what is to what was asked for, one step at least; may be called again at any time.

        :returns: seconds until it should be called again though nothing changes; None: no need
        """


def owner_key(resource: Resource) -> Callable[[Mapping[str, Any]], Iterable[Key]]:
    """The key of the owner of kind `resource` that controls an object."""

    def keys(obj: Mapping[str, Any]) -> Iterator[Key]:
        owner = meta.controller_of(obj)
        if owner is not None and owner.get("kind") == resource.kind:
            yield str(meta.get(obj, "metadata", "namespace", default="")), str(owner["name"])

    return keys


def own_key(obj: Mapping[str, Any]) -> Iterable[Key]:
    """The object's own key."""
    return (meta.key_of(obj),)


class Unseen:
    """What a controller has made or deleted and its cache does not show yet.

    Without it a controller that is quicker than its cache would make a pod for the second time. An entry goes when the
    informer has told of the object (`note`), whatever became of it since.
    """

    def __init__(self) -> None:
        self._made: dict[str, dict[str, Object]] = {}
        self._owner: dict[str, str] = {}
        self._deleted: set[str] = set()

    @property
    def handler(self) -> Handler:
        """For the informer of what the controller makes."""
        return Handler(
            added=lambda obj: self.note(obj, False),
            updated=lambda _, obj: self.note(obj, False),
            deleted=lambda obj: self.note(obj, True),
        )

    def made(self, owner: str, obj: Object) -> None:
        """`owner` (its uid) has made `obj`."""
        uid = meta.uid_of(obj)
        self._made.setdefault(owner, {})[uid] = obj
        self._owner[uid] = owner

    def deleted(self, uid: str) -> None:
        """The object's deletion was acknowledged."""
        self._deleted.add(uid)

    def note(self, obj: Mapping[str, Any], gone: bool) -> None:
        """The informer told of an object."""
        uid = meta.uid_of(obj)
        owner = self._owner.pop(uid, None)
        if owner is not None:
            self._made[owner].pop(uid, None)
            if not self._made[owner]:
                del self._made[owner]
        if gone or meta.is_deleting(obj):
            self._deleted.discard(uid)

    def overlay(self, owner: str, cached: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """`cached`, with what was made and without what was deleted since."""
        shown = {meta.uid_of(o): o for o in cached}
        for uid, obj in self._made.get(owner, {}).items():
            shown.setdefault(uid, obj)
        return [o for uid, o in shown.items() if uid not in self._deleted]


async def run_controllers(context: Context, controllers: Sequence[Controller]) -> None:
    """Runs them, over informers that run already, until cancelled."""
    async with asyncio.TaskGroup() as group:
        for controller in controllers:
            group.create_task(_run(context, controller), name=f"controller {controller.name}")


async def _run(context: Context, controller: Controller) -> None:
    queue = WorkQueue[Key]()
    context.queues[controller.name] = queue
    for resource, keys in controller.watches.items():
        context.caches[resource].add_handler(_feeder(queue, keys))
    for resource in controller.watches:
        await context.caches[resource].wait_synced()

    async def work(key: Key) -> None:
        again = await controller.sync(key)
        if again is not None:
            queue.add_after(key, again)

    await queue.run(work, workers=WORKERS)


def _feeder(queue: WorkQueue[Key], keys: Callable[[Mapping[str, Any]], Iterable[Key]]) -> Handler:
    def put(obj: Mapping[str, Any]) -> None:
        for key in keys(obj):
            queue.add(key)

    def updated(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        put(old)  # an owner that lost it has to know too
        put(new)

    return Handler(added=put, updated=updated, deleted=put)


def _owner_uid(obj: Object) -> Iterable[str]:
    owner = meta.controller_of(obj)
    return () if owner is None else (str(owner.get("uid")),)


def _orphaned(obj: Object) -> Iterable[str]:
    return (meta.key_of(obj)[0],) if meta.controller_of(obj) is None else ()


def _node_of(obj: Object) -> Iterable[str]:
    name = meta.get(obj, "spec", "nodeName", default="")
    return (name,) if name else ()


def indexers(resource: Resource) -> dict[str, Indexer]:
    """The indexes that controllers ask of the cache of a resource."""
    found: dict[str, Indexer] = {BY_OWNER: _owner_uid, ORPHANS: _orphaned}
    return found | {BY_NODE: _node_of} if resource == PODS else found


async def unless_gone(call: Awaitable[T]) -> T | None:
    """Awaits a write; None where what it is about went, or is another one of that name by now.

    :raises ApiError: any other refusal
    """
    try:
        return await call
    except HvError as e:
        if not is_gone(e):
            raise
        return None


def is_gone(error: HvError) -> bool:
    """The object went, or is another one of that name by now: nothing is left to be done."""
    return isinstance(error, ApiError) and error.reason in ("NotFound", "Conflict")
