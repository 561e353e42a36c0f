"""``hv debug``: a process in a pod's guest, beside the containers."""

from __future__ import annotations

import os

import click

from hypervisor.cli import complete, session, ws
from hypervisor.cli.app import CommandTail, Settings, pass_settings
from hypervisor.cli.execute import stream_query
from hypervisor.cli.rest import target
from hypervisor.cli.state import pod_reference
from hypervisor.errors import HvError


@click.command("debug", cls=CommandTail, options_metavar="[-i] [-T]")
@click.argument("pod", shell_complete=complete.pod_names)
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="[--] [COMMAND...]")
@click.option("-i", "--stdin", is_flag=True, help="Send standard input to the command; without a command it always is.")
@click.option("-T", "--no-tty", is_flag=True, help="Give it no terminal, even where there is one.")
@pass_settings
def debug(settings: Settings, pod: str, command: tuple[str, ...], stdin: bool, no_tty: bool) -> int:
    """Open a shell, or run a command, in a pod's guest itself.

    It runs beside the containers as the guest's root: it sees all processes (ps), the pod's network (ip, netstat, wget)
    and each container's files (/proc/PID/root). The tools are busybox's and python3. The guest's own files cannot be
    written; /tmp can. Whatever the session started ends with it.

    In a cluster it needs the right to create or get pods/debug, which nobody has but who may do everything.

    \b
    hv debug web
    hv debug web -- dmesg
    """
    namespace, name = pod_reference(pod)
    stdin = stdin or not command
    tty = not no_tty and not command and os.isatty(0)
    with settings.connect_any() as connection:
        query = stream_query(stdin, tty) + [("command", word) for word in command]
        protocol = ws.handshake(connection, target(("debug", namespace, name), query), session.PROTOCOLS)
        outcome = session.Session(connection, protocol, stdin=0 if stdin else None, tty=tty).run()
    if outcome.exit_code is None:
        raise HvError(f"debug of pod {name}: {outcome.message}")
    return outcome.exit_code
