"""The agent without a guest, as the agent's own tests have it."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "agent"))

from agent_under_test import agent, sandbox, standin

__all__ = ["agent", "sandbox", "standin"]
