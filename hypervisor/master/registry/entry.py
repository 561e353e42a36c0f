"""An object as the registry keeps it: its JSON, encoded once, and what selectors look at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from hypervisor.kube.client import Object, WatchType
from hypervisor.kube.errors import bad_request
from hypervisor.kube.selectors import FieldSelector, LabelSelector
from hypervisor.master.kinds.kind import Kind

NOTHING: Mapping[str, str] = {}


class Entry:
    """One object at one revision. Immutable but for the decoded form, which is made when somebody asks for it and kept
    until the object is replaced: bytes cost a fifth of it, and nothing in the collection of garbage.

    :ivar key: ``namespace/name``, the end of its key in the store; the namespace is empty for kinds without one
    :ivar body: its JSON, with apiVersion, kind and resourceVersion
    """

    __slots__ = ("_decoded", "_replaced", "body", "fields", "key", "kind", "labels", "revision")

    def __init__(self, kind: Kind, key: str, revision: int, value: bytes) -> None:
        self.kind = kind
        self.key = key
        self.revision = revision
        self.body, decoded = _stamp(kind, value, revision)
        self._decoded: Object | None = None
        self._replaced = False
        self.labels: Mapping[str, str] = decoded["metadata"].get("labels") or NOTHING
        self.fields = _fields(kind, decoded)

    @property
    def obj(self) -> Object:
        """Decoded; shared by everyone who asks, so not to be changed."""
        if self._decoded is not None:
            return self._decoded
        decoded = self.copy()
        if not self._replaced:
            self._decoded = decoded
        return decoded

    def copy(self) -> Object:
        """Decoded anew, to be changed freely."""
        copy: Object = orjson.loads(self.body)
        return copy

    def forget(self) -> None:
        """Drops the decoded form: the object has been replaced, and only late watchers want it, who decode anew."""
        self._decoded = None
        self._replaced = True

    def at(self, revision: int) -> Entry:
        """The same object, stamped with another revision."""
        return Entry(self.kind, self.key, revision, self.body)

    def matches(self, label: LabelSelector, field: FieldSelector) -> bool:
        """Whether it fits both selectors; the fields asked for are ones that the kind lets select by."""
        return label.matches(self.labels) and field.matches(self.fields.__getitem__)


class Event:
    """One change of one kind, shared by all watchers, as are its encoded forms.

    :ivar previous: what was there before; None for a create and for events that no change made
    """

    __slots__ = ("_line", "_variants", "entry", "previous", "type")

    def __init__(self, what: WatchType, entry: Entry, previous: Entry | None = None) -> None:
        self.type: WatchType = what
        self.entry = entry
        self.previous = previous
        self._line = b""
        self._variants: dict[str, Event] | None = None

    @property
    def object(self) -> Object:
        """See `Entry.obj`."""
        return self.entry.obj

    @property
    def line(self) -> bytes:
        """As a watch's answer carries it, with the newline; encoded when first asked for."""
        if not self._line:
            self._line = b'{"type":"%s","object":%s}\n' % (self.type.encode(), self.entry.body)
        return self._line

    def seen_through(self, label: LabelSelector, field: FieldSelector) -> Event | None:
        """The event for a watcher with these selectors; None: it is not concerned.

        An object that begins to fit is ADDED; one that no longer fits is DELETED, in its last fitting state.
        """
        if not label and not field:
            return self
        before = self.previous is not None and self.previous.matches(label, field)
        if self.type == "DELETED":
            return self if before else None
        now = self.entry.matches(label, field)
        if now:
            return self if before or self.previous is None else self._variant("ADDED")
        return self._variant("DELETED") if before else None

    def _variant(self, what: WatchType) -> Event:
        if self._variants is None:
            self._variants = {}
        if what not in self._variants:
            left = what == "DELETED" and self.previous is not None
            entry = self.previous.at(self.entry.revision) if left and self.previous else self.entry
            self._variants[what] = Event(what, entry)
        return self._variants[what]


def encode(kind: Kind, obj: Mapping[str, Any]) -> bytes:
    """An object as the store keeps it: apiVersion, kind and metadata first, without resourceVersion.

    :raises ApiError: BadRequest: it holds something that JSON cannot say
    """
    metadata = {key: value for key, value in obj["metadata"].items() if key not in ("resourceVersion", "selfLink")}
    first = {"apiVersion": kind.resource.api_version, "kind": kind.resource.kind, "metadata": metadata}
    rest = {key: value for key, value in obj.items() if key not in first}
    try:
        return orjson.dumps(first | rest)
    except TypeError as error:
        raise bad_request(f"the object cannot be encoded as JSON: {error}") from error


def _stamp(kind: Kind, value: bytes, revision: int) -> tuple[bytes, Object]:
    """Puts the revision into the JSON without encoding it again, and decodes it."""
    head = b'{"apiVersion":"%s","kind":"%s","metadata":{' % (
        kind.resource.api_version.encode(),
        kind.resource.kind.encode(),
    )
    version = b'"resourceVersion":"%d"' % revision
    decoded: Object = orjson.loads(value)
    if kind.read is not None:
        value, decoded = _shaped(kind, decoded)
    if value.startswith(head) and "resourceVersion" not in decoded["metadata"]:
        comma = b"" if value.startswith(b"}", len(head)) else b","
        body = b"".join((head, version, comma, value[len(head) :]))
    else:
        body = b"".join((head, version, b",", encode(kind, decoded)[len(head) :]))
        decoded = orjson.loads(body)
    decoded["metadata"]["resourceVersion"] = str(revision)
    return body, decoded


def _shaped(kind: Kind, stored: Object) -> tuple[bytes, Object]:
    shaped = kind.read(stored) if kind.read is not None else stored
    shaped["metadata"].pop("resourceVersion", None)
    return encode(kind, shaped), shaped


def _fields(kind: Kind, obj: Object) -> Mapping[str, str]:
    metadata = obj["metadata"]
    fields = {"metadata.name": metadata.get("name", ""), "metadata.namespace": metadata.get("namespace", "")}
    for path in kind.selectable:
        if path not in fields:
            fields[path] = _text(obj, path)
    return fields


def _text(obj: Any, path: str) -> str:
    """As `hypervisor.kube.selectors.field_text`, ten times as fast: it is called for every write."""
    for step in path.split("."):
        obj = obj.get(step) if type(obj) is dict else None
    if type(obj) is bool:
        return "true" if obj else "false"
    return "" if obj is None else str(obj)
