"""A command that runs to its end and is answered with all that it wrote: the kubelet's ``POST /run``.

Source: the kubelet's server; ``cmd`` is split at blanks, there is no quoting.
"""

from __future__ import annotations

import asyncio

from multidict import MultiMapping

from hypervisor.agent.wire import FrameType
from hypervisor.errors import HvError, InvalidInput, ResourceExhausted, Timeout
from hypervisor.introspect.agent import AgentStream

MAX_OUTPUT = 1 << 20
TIMEOUT_S = 120.0


def parse(query: MultiMapping[str]) -> tuple[str, ...]:
    """:raises InvalidInput: no command"""
    argv = tuple(query.get("cmd", "").split())
    if not argv:
        raise InvalidInput("no command given; add ?cmd=...", where="cmd")
    return argv


async def output(agent: AgentStream) -> bytes:
    """What the process wrote, stdout and stderr as they came.

    :raises ResourceExhausted: more than `MAX_OUTPUT` bytes; the process is left to end at its next write
    :raises Timeout: it still ran after `TIMEOUT_S` seconds
    :raises HvError: it could not be run, or ended with another code than 0
    """
    written = bytearray()
    try:
        async with asyncio.timeout(TIMEOUT_S):
            async for frame in agent.frames():
                if frame.type in (FrameType.STDOUT, FrameType.STDERR):
                    written += frame.payload
                if len(written) > MAX_OUTPUT:
                    raise ResourceExhausted(f"the command wrote more than {MAX_OUTPUT} bytes; use exec, which streams")
    except TimeoutError as e:
        raise Timeout(f"the command still ran after {TIMEOUT_S:g} s; use exec, which streams") from e
    ending = agent.ending
    if ending is not None and ending.error is not None:
        raise ending.error
    if ending is not None and ending.exit_code:
        tail = bytes(written[-1000:]).decode("utf-8", "replace")
        raise HvError(f"command terminated with exit code {ending.exit_code}: {tail}")
    return bytes(written)
