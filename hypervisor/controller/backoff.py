"""How long to wait before trying again: the delays that Kubernetes documents for restarts and image pulls."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BackoffPolicy:
    """Delays in seconds: the first failure is answered at once, the next after `initial_s`, then doubling.

    :ivar cap_s: no delay is longer
    :ivar reset_s: what has run this long counts as well again: its next failure is a first one
    """

    initial_s: float = 10.0
    cap_s: float = 300.0
    reset_s: float = 600.0

    def next(self, previous_s: float | None, ran_s: float) -> float:
        """The delay after a failure.

        :param previous_s: the delay before the attempt that failed now; None before any failure
        :param ran_s: how long that attempt ran
        """
        if previous_s is None or ran_s >= self.reset_s:
            return 0.0
        return min(max(self.initial_s, previous_s * 2), self.cap_s)
