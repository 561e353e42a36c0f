"""Where a host keeps its state, and the address and token of its daemon. On the hot path: imports almost nothing."""

from __future__ import annotations

import json
import os

from hypervisor.cli import route
from hypervisor.errors import HvError, InvalidInput, Unavailable

DEFAULT_ROOT = "/var/lib/podvisor"


def state_dir(override: str | None = None) -> str:
    """The state folder: `override` (``--state-dir``), else ``HV_STATE_DIR``, else the user's default.

    The same rule as `hypervisor.controller.paths.HostPaths` has, without what importing that would cost.

    :returns: an absolute path; it need not exist
    """
    chosen = override or os.environ.get("HV_STATE_DIR")
    if chosen:
        return os.path.abspath(os.path.expanduser(chosen))  # noqa: PTH100, PTH111 - pathlib costs 10 ms of every exec
    if os.geteuid() == 0:
        return DEFAULT_ROOT
    base = os.environ.get("XDG_STATE_HOME", "")
    if not base.startswith("/"):
        base = os.path.expanduser("~/.local/state")  # noqa: PTH111
    return f"{base}/podvisor"


class Endpoint:
    """Where a running daemon listens, and the token it wants. Immutable by convention."""

    __slots__ = ("address", "pid", "port", "state", "token")

    def __init__(self, state: str, address: str, port: int, token: str, pid: int = 0) -> None:
        self.state = state
        self.address = address
        self.port = port
        self.token = token
        self.pid = pid


def read_endpoint(state: str) -> Endpoint | None:
    """What the state folder says of its daemon, which need not be alive; None when there has been none.

    :raises HvError: the files are there but cannot be read or make no sense
    """
    try:
        with open(f"{state}/host.json", encoding="utf-8") as file:  # noqa: PTH123
            host = json.load(file)
        with open(f"{state}/token", encoding="utf-8") as file:  # noqa: PTH123
            token = file.read().strip()
        return Endpoint(state, str(host["address"]), int(host["port"]), token, int(host.get("pid", 0)))
    except FileNotFoundError:
        return None
    except PermissionError as e:
        raise Unavailable(
            f"the state folder {state} belongs to another user ({e.filename}); "
            "run hv as that user, or give a folder of your own with --state-dir"
        ) from e
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise HvError(f"{state}/host.json is damaged ({e}); run: hv host stop, then any command again") from e


def pod_reference(text: str) -> tuple[str, str]:
    """``NAME`` or ``NAMESPACE/NAME`` as namespace and name.

    :raises InvalidInput: neither
    """
    namespace, slash, name = text.rpartition("/")
    if not name or "/" in namespace or (slash and not namespace):
        raise InvalidInput(f"{text!r} is no pod; write NAME or NAMESPACE/NAME")
    return namespace or route.namespace(), name
