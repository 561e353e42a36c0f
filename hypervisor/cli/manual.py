"""docs/cli.md, made from the commands' own help: ``python -m hypervisor.cli.manual > docs/cli.md``.

A test compares the two, so that the page cannot drift.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import click

from hypervisor.cli.app import CONTEXT, cli

HEAD = """# The command line

Made from the commands' own help by `python -m hypervisor.cli.manual > docs/cli.md`; a test keeps it true.

`hv` talks to the daemon of one host, `hostd`, over HTTP on loopback, or to the master of a cluster
([cluster.md](cluster.md)). A command that needs the daemon starts it in the background when it does not run. Tables are
for people: with `-o json` a command prints the objects of the API.
Nothing is coloured but the progress bars of a pull, which a pipe gets as lines, and `NO_COLOR` in black and white.

Environment: `HV_STATE_DIR` (as `--state-dir`), `HV_LOCAL=1` (`--local`), `HV_NAMESPACE` (`-n`), `HV_DEBUG=1` (stack
traces), `NO_COLOR`.
"""
WIDTH = 100


def manual() -> str:
    """The whole page."""
    return HEAD + "".join(_section(path, command) for path, command in commands())


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every command with its path, groups before what is in them."""
    yield "hv", cli
    with click.Context(cli, info_name="hv") as root:
        for name in cli.list_commands(root):
            command = cli.get_command(root, name)
            if command is None:
                raise AssertionError(f"{name} is listed and not there")
            yield f"hv {name}", command
            if isinstance(command, click.Group):
                yield from ((f"hv {name} {sub}", c) for sub, c in command.commands.items())


def _section(path: str, command: click.Command) -> str:
    settings = dict(CONTEXT) | {"terminal_width": WIDTH, "max_content_width": WIDTH}
    with click.Context(command, info_name=path, **settings) as context:  # type: ignore[arg-type]
        return f"\n## {path}\n\n```\n{command.get_help(context)}\n```\n"


if __name__ == "__main__":
    sys.stdout.write(manual())
