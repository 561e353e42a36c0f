"""A guest's wall clock is brought to the host's.

``setup`` carries the time at which it was sent, and the guest's clock lags by what it then takes to read that: in cold
code perhaps half a second. So each answer tells the guest's time, and a difference is sent back, which does not age
on its way. Cristian's algorithm: the guest took its time between request and answer, so half of that is the most that
one can be wrong by.
"""

from __future__ import annotations

import time
from typing import Any

from hypervisor.errors import ProtocolError
from hypervisor.introspect.agent import AgentStream

SLACK_NS = 1_000_000
_ROUNDS = 4


async def align_clock(stream: AgentStream, answer: dict[str, Any]) -> int:
    """Corrects the guest's clock; by how many ns it may be wrong afterwards.

    :param answer: the one to ``setup``, just received; an agent that tells no time in it is left alone
    :raises HvError: the agent refuses, or has gone
    """
    if "clock_ns" not in answer:
        return 0
    # of how long setup took, nearly all was before the guest took its time for the answer
    behind_ns = time.time_ns() - _clock_of(answer)
    unsure_ns = SLACK_NS
    for _ in range(_ROUNDS):
        if abs(behind_ns) <= unsure_ns:
            break
        sent_ns = time.time_ns()
        answer = await stream.request("clock", {"add_ns": behind_ns})
        received_ns = time.time_ns()
        behind_ns = (sent_ns + received_ns) // 2 - _clock_of(answer)
        unsure_ns = max(SLACK_NS, (received_ns - sent_ns) // 2)
    return abs(behind_ns) + unsure_ns


def _clock_of(answer: dict[str, Any]) -> int:
    told = answer.get("clock_ns")
    if not isinstance(told, int):
        raise ProtocolError("pod VM agent: its answer has no clock_ns")
    return told
