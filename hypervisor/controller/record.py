"""What became of a pod so far: frozen values that go to ``status.json`` and come back from it.

`PodRecord` holds everything that a daemon must know to take a pod over from one that was killed. Times are nanoseconds
since the epoch; container start times are the guest's, and name an instance; all others are the host's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

NS = 1_000_000_000
Phase = Literal["Pending", "Running", "Succeeded", "Failed"]
TERMINAL: tuple[Phase, ...] = ("Succeeded", "Failed")
Suspend = Literal["", "suspending", "suspended", "resuming"]


@dataclass(frozen=True, slots=True)
class Waiting:
    """Not running (yet, or at present); `reason` is Kubernetes' word for why."""

    reason: str = "ContainerCreating"
    message: str = ""


@dataclass(frozen=True, slots=True)
class Running:
    """Running since `started_ns` (the guest's clock; names the instance)."""

    started_ns: int


@dataclass(frozen=True, slots=True)
class Terminated:
    """Ended. `exit_code` is 128 + n for signal n."""

    exit_code: int
    reason: str
    message: str = ""
    signal: int | None = None
    started_ns: int = 0
    finished_ns: int = 0

    @property
    def succeeded(self) -> bool:
        return self.exit_code == 0


State = Waiting | Running | Terminated
_STATES: dict[str, type[Waiting] | type[Running] | type[Terminated]] = {
    "waiting": Waiting,
    "running": Running,
    "terminated": Terminated,
}


@dataclass(frozen=True, slots=True)
class ContainerRecord:
    """One container.

    :ivar last: how the instance before the present one ended
    :ivar delay_s: the back-off before the present attempt; None before any failure
    :ivar exited_at: host time (seconds since the epoch) at which the last end was seen
    :ivar started: it runs, and its startup probe has been content
    :ivar ready: it runs and takes requests, by its readiness probe
    :ivar sidecar: an init container that runs beside the main ones
    """

    name: str
    state: State = Waiting()
    last: Terminated | None = None
    restarts: int = 0
    image_id: str = ""
    delay_s: float | None = None
    exited_at: float = 0.0
    started: bool = False
    ready: bool = False
    sidecar: bool = False

    @property
    def ended(self) -> Terminated | None:
        """How the newest instance that has ended did so."""
        return self.state if isinstance(self.state, Terminated) else self.last


@dataclass(frozen=True, slots=True)
class Intent:
    """What the user wants of the pod now; a later one never weakens an earlier.

    :ivar at: seconds since the epoch
    """

    kind: Literal["run", "stop", "delete"] = "run"
    grace_s: float = 0.0
    at: float = 0.0


@dataclass(frozen=True, slots=True)
class PodRecord:
    """A pod's state.

    :ivar reason: machine-readable word for why the pod failed, or why it waits
    :ivar vm_up: the present VM has been set up: its agent, not this record, knows which containers run
    :ivar vm_starts: VMs started for this pod
    :ivar vm_delay_s: the back-off before the present VM; None before any VM was lost
    :ivar vm_up_at: seconds since the epoch
    :ivar ready_at: when the containers last became ready, or ceased to be; seconds since the epoch
    :ivar closed: logs are archived and the VM is gone: nothing is left to do but delete
    :ivar timing: seconds of each phase of the newest start
    :ivar suspend: whether its VM is in files (`hypervisor.controller.suspension`)
    """

    phase: Phase = "Pending"
    reason: str = ""
    message: str = ""
    intent: Intent = Intent()
    containers: tuple[ContainerRecord, ...] = ()
    init_containers: tuple[ContainerRecord, ...] = ()
    vm_up: bool = False
    vm_starts: int = 0
    vm_delay_s: float | None = None
    vm_up_at: float = 0.0
    started_at: float = 0.0
    ready_at: float = 0.0
    closed: bool = False
    timing: Mapping[str, float] = field(default_factory=dict)
    suspend: Suspend = ""

    @property
    def terminal(self) -> bool:
        """The pod has ended for good."""
        return self.phase in TERMINAL

    @property
    def ready(self) -> bool:
        """Every container that is to run does, and is ready."""
        lasting = (*(c for c in self.init_containers if c.sidecar), *self.containers)
        return bool(self.containers) and all(c.ready for c in lasting)

    @property
    def initialized(self) -> bool:
        """Every init container has done its work: the main ones may run."""
        began = any(c.ended or isinstance(c.state, Running) for c in self.containers)
        return all(
            (began or c.started) if c.sidecar else isinstance(c.state, Terminated) and c.state.succeeded
            for c in self.init_containers
        )

    def container(self, name: str) -> ContainerRecord:
        """The record of a container or init container, which must exist."""
        return next(c for c in (*self.init_containers, *self.containers) if c.name == name)

    def with_container(self, name: str, **changes: Any) -> PodRecord:
        """This record with fields of one container replaced."""

        def changed(group: tuple[ContainerRecord, ...]) -> tuple[ContainerRecord, ...]:
            return tuple(replace(c, **changes) if c.name == name else c for c in group)

        return replace(self, containers=changed(self.containers), init_containers=changed(self.init_containers))


def to_json(record: PodRecord) -> dict[str, Any]:
    """The record as JSON values; `from_json` gives it back."""
    data = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
    data["intent"] = dataclasses.asdict(record.intent)
    data["timing"] = dict(record.timing)
    for group in ("containers", "init_containers"):
        data[group] = [_container_to_json(c) for c in data[group]]
    return data


def _container_to_json(container: ContainerRecord) -> dict[str, Any]:
    data = dataclasses.asdict(container)
    kind = next(kind for kind, cls in _STATES.items() if isinstance(container.state, cls))
    return data | {"state": {kind: dataclasses.asdict(container.state)}}


def from_json(data: Mapping[str, Any]) -> PodRecord:
    """The record that `to_json` wrote.

    :raises (KeyError, TypeError, ValueError): it did not write this
    """
    groups = {g: tuple(_container_from_json(c) for c in data[g]) for g in ("containers", "init_containers")}
    known = {f.name for f in dataclasses.fields(PodRecord)}
    rest = {key: value for key, value in data.items() if key in known and key not in groups}
    return PodRecord(**(rest | groups | {"intent": Intent(**data["intent"])}))


def _container_from_json(data: Mapping[str, Any]) -> ContainerRecord:
    ((kind, state),) = data["state"].items()
    last = data["last"]
    return ContainerRecord(
        **(dict(data) | {"state": _STATES[kind](**state), "last": None if last is None else Terminated(**last)})
    )
