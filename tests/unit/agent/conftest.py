"""Fixtures of the agent's tests; agent_under_test.py has them and what they give."""

from __future__ import annotations

from agent_under_test import agent, children_are_reaped, sandbox, standin

__all__ = ["agent", "children_are_reaped", "sandbox", "standin"]
