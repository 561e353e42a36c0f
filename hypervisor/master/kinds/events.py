"""One Event in its two forms: core v1, which is kept, and events.k8s.io/v1, a view of it.

Source: Kubernetes API reference, Event v1 events.k8s.io (its ``deprecated*`` fields are the core form's).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Field of events.k8s.io/v1, field of core v1; all others have the same name in both.
_RENAMED = (
    ("regarding", "involvedObject"),
    ("note", "message"),
    ("reportingController", "reportingComponent"),
    ("deprecatedSource", "source"),
    ("deprecatedFirstTimestamp", "firstTimestamp"),
    ("deprecatedLastTimestamp", "lastTimestamp"),
    ("deprecatedCount", "count"),
)
_TO_CORE = dict(_RENAMED)
_TO_VIEW = {core: view for view, core in _RENAMED}


def to_core(event: Mapping[str, Any]) -> dict[str, Any]:
    """The core form of an events.k8s.io/v1 Event."""
    return {_TO_CORE.get(key, key): value for key, value in event.items()} | {"apiVersion": "v1"}


def from_core(event: Mapping[str, Any]) -> dict[str, Any]:
    """The events.k8s.io/v1 form of a core Event."""
    return {_TO_VIEW.get(key, key): value for key, value in event.items()} | {"apiVersion": "events.k8s.io/v1"}
