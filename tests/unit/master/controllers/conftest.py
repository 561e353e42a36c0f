"""A whole master for each test of its controllers."""

from whole_master import cluster

__all__ = ["cluster"]
