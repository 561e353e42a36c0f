"""``hv exec`` for click: help, completion and mistakes. What it does is in `hypervisor.cli.execute`."""

from __future__ import annotations

import click

from hypervisor.cli import complete
from hypervisor.cli.app import CommandTail, Settings, pass_settings
from hypervisor.cli.execute import ExecArguments, run_exec


@click.command("exec", cls=CommandTail, options_metavar="[-i] [-t] [-c NAME]")
@click.argument("pod", shell_complete=complete.pod_names)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="[--] COMMAND...")
@click.option("-i", "--stdin", is_flag=True, help="Send standard input to the command; its end is passed on.")
@click.option("-t", "--tty", is_flag=True, help="Give the command a terminal.")
@click.option(
    "-c", "--container", metavar="NAME", shell_complete=complete.container_names, help="Default: the pod's first."
)
@pass_settings
def exec_(settings: Settings, pod: str, command: tuple[str, ...], stdin: bool, tty: bool, container: str | None) -> int:
    """Run a command in a running container.

    Exit code: the command's; 126 and 127 when it cannot be executed or found; 125 when hv itself failed.

    Ctrl-C: with -t it is typed into the container's terminal. Without -t it ends hv: the command's input
    ends, its output breaks; one that uses neither goes on.

    \b
    hv exec hello -- uname -r
    hv exec -it hello -- sh
    tar c . | hv exec -i hello -- tar x -C /srv
    """
    return run_exec(settings.state, ExecArguments(pod, command, container or "", stdin, tty))
