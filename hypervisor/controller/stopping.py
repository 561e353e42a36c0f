"""Ending one container in order: its preStop hook, the stop signal, SIGKILL; all within its grace period."""

from __future__ import annotations

import asyncio

from hypervisor.controller.actions import Actions
from hypervisor.controller.journal import Journal
from hypervisor.controller.spec import Action
from hypervisor.errors import HvError, Unavailable
from hypervisor.introspect.agent import AgentClient

EXTENSION_S = 2.0
"""What a container whose hook took all of the grace period gets to end in, as kubelets give it."""


async def stop_container(
    agent: AgentClient, actions: Actions, journal: Journal, name: str, pre_stop: Action | None, grace_s: float
) -> None:
    """Returns when it has ended; harmless when it had. A hook that fails does not keep it from being ended.

    :raises Unavailable: the agent cannot be reached
    """
    left_s = grace_s
    if pre_stop is not None and grace_s > 0:
        loop = asyncio.get_running_loop()
        began = loop.time()
        await _run_hook(actions, journal, name, pre_stop, grace_s)
        left_s = max(EXTENSION_S, grace_s - (loop.time() - began))
    try:
        await agent.stop(name, left_s)
    except Unavailable:
        raise
    except HvError:
        pass  # it ended by itself meanwhile


async def _run_hook(actions: Actions, journal: Journal, name: str, hook: Action, grace_s: float) -> None:
    problem = await run_hook(actions, hook, grace_s)
    if problem:
        journal.note("Warning", "FailedPreStopHook", f"PreStopHook failed: {problem}", name)


async def run_hook(actions: Actions, hook: Action, timeout_s: float) -> str:
    """Runs a hook; why it failed, or nothing. Any answer of an HTTP server will do, as for kubelets."""
    try:
        async with asyncio.timeout(timeout_s):
            outcome = await actions.run(hook, timeout_s)
    except TimeoutError:
        return f"not done within {timeout_s:g} s"
    except HvError as e:
        return str(e)
    if outcome.ok or outcome.answered:
        return ""
    return outcome.message or "the command failed"
