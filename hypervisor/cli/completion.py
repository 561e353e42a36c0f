"""``hv completion``: the shell code that calls hv back for each Tab."""

from __future__ import annotations

import click
from click.shell_completion import BashComplete, ShellComplete, ZshComplete

from hypervisor.cli.app import cli
from hypervisor.cli.main import COMPLETE_VARIABLE

SHELLS: dict[str, type[ShellComplete]] = {"bash": BashComplete, "zsh": ZshComplete}


@click.command("completion")
@click.argument("shell", type=click.Choice(list(SHELLS)))
def completion(shell: str) -> None:
    """Print the shell code that completes hv's arguments.

    Pods, containers and images are completed from the running daemon.

    \b
    bash:  hv completion bash > ~/.local/share/bash-completion/completions/hv
    zsh:   hv completion zsh > ~/.zfunc/_hv     (a folder of $fpath)
    """
    completer = SHELLS[shell](cli, {}, "hv", COMPLETE_VARIABLE)
    # Not source(): it runs bash to look at its version, and completion code may be made on another machine.
    click.echo(completer.source_template % completer.source_vars())
