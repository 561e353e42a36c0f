"""``hv exec``: run a command in a running container.

The hot path: `main` comes here before click is imported (45 ms), with the module `words` as the parser; whatever that
does not understand, it leaves to click, whose command below is the same in other words.
"""

from __future__ import annotations

import os
import sys

from hypervisor.cli import session, words, ws
from hypervisor.cli.connect import connect_any
from hypervisor.cli.rest import Connection, target
from hypervisor.cli.state import pod_reference
from hypervisor.errors import HvError, InvalidInput

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

OWN_ERROR = 125  # hv itself failed, as docker has it: other codes are the process's
FLAGS = {"-i": "stdin", "--stdin": "stdin", "-t": "tty", "--tty": "tty"}
VALUED = {"-c": "container", "--container": "container"}


class ExecArguments:
    """What the command line asks for."""

    __slots__ = ("command", "container", "pod", "stdin", "tty")

    def __init__(self, pod: str, command: Sequence[str], container: str = "", stdin: bool = False, tty: bool = False):
        self.pod = pod
        self.command = list(command)
        self.container = container
        self.stdin = stdin
        self.tty = tty


def parse_quickly(args: Sequence[str]) -> ExecArguments | None:
    """The arguments after ``exec``; None when click should look at them."""
    own, command = words.split(args, VALUED)
    found = words.parse(own, FLAGS, VALUED)
    if found is None or not found.get("") or not command:
        return None
    return ExecArguments(found[""], command, found.get("container", ""), "stdin" in found, "tty" in found)


def run_exec(state: str, asked: ExecArguments) -> int:
    """Runs it; the exit code is the process's.

    :raises HvError: it could not be run
    """
    namespace, name = pod_reference(asked.pod)
    tty = usable_tty(asked.tty, asked.stdin)
    connection = connect_any(state)
    container = asked.container or first_container(connection, namespace, name)
    query = stream_query(asked.stdin, tty) + [("command", word) for word in asked.command]
    protocol = ws.handshake(connection, target(("exec", namespace, name, container), query), session.PROTOCOLS)
    outcome = session.Session(connection, protocol, stdin=0 if asked.stdin else None, tty=tty).run()
    if outcome.exit_code is None:
        raise HvError(f"exec in pod {name}, container {container}: {outcome.message}")
    return outcome.exit_code


def usable_tty(wanted: bool, stdin: bool) -> bool:
    """Whether the process gets a terminal: not when its input would come from something that is none."""
    if wanted and stdin and not os.isatty(0):
        print("hv: standard input is no terminal; going on without -t", file=sys.stderr)  # noqa: T201
        return False
    return wanted


def first_container(connection: Connection, namespace: str, name: str) -> str:
    """The container that is meant when none is named: the pod's first.

    :raises NotFound: there is no such pod
    """
    pod = connection.get("hv", "v1", "pods", namespace, name)
    try:
        return str(pod["spec"]["containers"][0]["name"])
    except (KeyError, IndexError, TypeError) as e:
        raise InvalidInput(f"pod {name} has no containers") from e


def stream_query(stdin: bool, tty: bool) -> list[tuple[str, str]]:
    """The kubelet's names for the streams that are wanted; a terminal has no separate stderr."""
    query = [("output", "1"), ("tty", "1")] if tty else [("output", "1"), ("error", "1")]
    return [("input", "1"), *query] if stdin else query
