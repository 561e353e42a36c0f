"""What a pod's record says when its containers have ended, when it was stopped, and when its VM was lost."""

from __future__ import annotations

import time

from hypervisor.controller.backoff import BackoffPolicy
from hypervisor.controller.journal import Journal
from hypervisor.controller.podstatus import phase_of
from hypervisor.controller.record import ContainerRecord, Phase, Running, State, Terminated, Waiting
from hypervisor.controller.spec import PodSpec
from hypervisor.errors import HvError

LOST_EXIT_CODE = 137
"""What Kubernetes gives a container that went away with its sandbox."""


def end_ran(journal: Journal, pod: PodSpec, wanted: str) -> None:
    """The containers have ended, for good or because a stop was asked for."""
    record = journal.record
    if wanted == "run":
        phase = phase_of(record, pod.restart_policy)
        if phase not in ("Succeeded", "Failed"):
            phase = "Failed"
        journal.update(phase=phase)
    else:
        end_stopped(journal)


def end_stopped(journal: Journal) -> None:
    """The pod was stopped, maybe before its containers ran."""
    record = journal.record
    ended = [c.state for c in record.containers]
    good = all(isinstance(s, Terminated) and s.succeeded for s in ended) and not record.reason
    phase: Phase = "Succeeded" if good else "Failed"
    never_ran = all(c.ended is None for c in record.containers)
    changes = {"reason": "Stopped", "message": "stopped before its containers ran"} if never_ran else {}
    journal.update(phase=phase, **({} if record.reason else changes))


def end_lost(journal: Journal, pod: PodSpec, error: HvError, wanted: str, backoff: BackoffPolicy) -> float | None:
    """The VM died or could not be had: seconds until there is to be another one; None: the pod has failed."""
    record = journal.record
    again = pod.restart_policy != "Never" and wanted == "run"
    reason = error.reason
    for container in (*record.init_containers, *record.containers):
        _lose(journal, pod, container, reason, str(error), again=again)
    if not again:
        journal.update(phase="Failed", reason=record.reason or reason, message=str(error), vm_up=False)
        return None
    ran_s = time.time() - record.vm_up_at if record.vm_up else 0.0
    delay = backoff.next(record.vm_delay_s, ran_s)
    message = f"{error}; another VM starts in {delay:g} s"
    journal.update(reason=reason, message=message, vm_up=False, vm_delay_s=delay)
    return delay


def _lose(
    journal: Journal, pod: PodSpec, container: ContainerRecord, reason: str, message: str, *, again: bool
) -> None:
    state: State = container.state
    is_init = container.name in {c.name for c in pod.init_containers}
    if isinstance(state, Running):
        state = Terminated(LOST_EXIT_CODE, reason, message, started_ns=state.started_ns, finished_ns=time.time_ns())
    if not again:
        journal.container(container.name, state=state)
        return
    done = isinstance(state, Terminated) and state.succeeded and pod.restart_policy == "OnFailure"
    if done and not is_init:
        return
    ended = state if isinstance(state, Terminated) else container.last
    journal.container(container.name, state=Waiting(), last=ended)
