"""How a patch fails, as the statuses that upstream answers."""

from __future__ import annotations

from hypervisor.kube.errors import ApiError, bad_request

MAX_OPERATIONS = 10_000


def unprocessable(why: str) -> ApiError:
    """422: a patch that is well formed and cannot be applied to this object."""
    return ApiError("Invalid", f"the server rejected our request due to an error in our request: {why}")


def malformed(why: str) -> ApiError:
    """400: no patch of its kind."""
    return bad_request(f"error decoding patch: {why}")


def too_many(count: int) -> ApiError:
    """413: more operations than one request may have."""
    message = f"The allowed maximum operations in a JSON patch is {MAX_OPERATIONS}, got {count}"
    return ApiError("RequestEntityTooLarge", message)
