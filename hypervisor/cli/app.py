"""The command ``hv`` for click: sub-commands are found by name and imported when they are needed.

Importing all of them would cost every call some 200 ms. The table gives each one's module and the line that ``hv
--help`` prints; a test compares that line with the command's own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

import click

from hypervisor.cli import route, words
from hypervisor.cli.connect import connect, connect_any, connect_running
from hypervisor.cli.main import COMPLETE_VARIABLE, USAGE, command_of
from hypervisor.cli.rest import QUICK, Connection
from hypervisor.cli.state import state_dir

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

# name: (module below hypervisor.cli, attribute, short help), in the order in which they are listed
COMMANDS: dict[str, tuple[str, str, str]] = {
    "run": ("run", "run", "Run a container from an image in a pod VM of its own."),
    "ps": ("ps", "ps", "List pods."),
    "exec": ("exec_command", "exec_", "Run a command in a running container."),
    "logs": ("logs", "logs", "Print what a container wrote to its standard output and error."),
    "attach": ("attach", "attach", "Join the standard streams of a container's own process."),
    "cp": ("cp", "cp", "Copy files between a container and this machine."),
    "port-forward": ("port_forward", "port_forward", "Make ports of a pod reachable on this machine, until Ctrl-C."),
    "stop": ("stop", "stop", "Stop pods; their logs stay until hv rm."),
    "rm": ("stop", "rm", "Remove pods and everything that belongs to them."),
    "suspend": ("snapshot", "suspend", "Put running pods into files; hv resume brings them back."),
    "resume": ("snapshot", "resume", "Have suspended pods go on where they were."),
    "snapshot": ("snapshot", "snapshot", "Take, list, restore and remove snapshots of running pods."),
    "fork": ("snapshot", "fork", "Make several of a running pod, each going on from now."),
    "console": ("console", "console", "Print the console of a pod's VM: kernel and agent messages."),
    "debug": ("debug", "debug", "Open a shell, or run a command, in a pod's guest itself."),
    "inspect": ("inspect", "inspect", "Show a pod's VM as the hypervisor sees it."),
    "trace": ("trace", "trace", "Record what the hypervisor does for a pod, event by event."),
    "top": ("top", "top", "Show what pods use: CPU, memory, processes, disk."),
    "apply": ("apply", "apply", "Start pods from Kubernetes v1 Pod manifests."),
    "image": ("image", "image", "Pull, import, list and remove images."),
    "disk": ("disk", "disk", "Create, clone, filter and open virtual disks."),
    "doctor": ("doctor", "doctor", "Check what this machine has and lacks for running pod VMs."),
    "version": ("version", "version", "Print the versions of hv and of the running daemon."),
    "cluster": (
        "cluster_token",
        "cluster",
        "A Kubernetes cluster on this machine: a master and hosts in the background.",
    ),
    "master": ("master", "master", "Run a cluster's master in the foreground: API server, scheduler, controllers."),
    "hostd": ("host", "hostd", "Run the host's daemon in the foreground."),
    "host": ("node_join", "host", "Start, stop and inspect the host's daemon."),
    "completion": ("completion", "completion", "Print the shell code that completes hv's arguments."),
}


@dataclass(frozen=True)
class Settings:
    """What the global options say; every command gets it."""

    state: str

    def connect(self, timeout: float | None = QUICK) -> Connection:
        """A connection to the daemon, started when there is none (see `hypervisor.cli.connect.connect`)."""
        return connect(self.state, timeout)

    def connect_any(self, timeout: float | None = QUICK) -> Connection:
        """A connection to the cluster's master where one runs, else as `connect`."""
        return connect_any(self.state, timeout)

    def connect_running(self, timeout: float | None = QUICK) -> Connection | None:
        """A connection to the daemon if it runs."""
        return connect_running(self.state, timeout)


pass_settings = click.make_pass_decorator(Settings)


class LazyGroup(click.Group):
    """A group over `COMMANDS`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        command = getattr(import_module(f"hypervisor.cli.{module}"), attribute)
        if not isinstance(command, click.Command):
            raise AssertionError(f"{module}.{attribute} is no command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, short) for name, (_, _, short) in COMMANDS.items()])


class CommandTail(click.Command):
    """A command whose arguments end in somebody else's command line (the rule: `hypervisor.cli.words`)."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        valued = {
            name
            for parameter in self.params
            if isinstance(parameter, click.Option) and not parameter.is_flag and not parameter.count
            for name in parameter.opts
        }
        own, command = words.split(args, valued)
        return super().parse_args(ctx, [*own, "--", *command] if command else own)


@click.group(cls=LazyGroup, context_settings=CONTEXT, subcommand_metavar="COMMAND [ARGS]...")
@click.option(
    "--state-dir",
    metavar="DIR",
    help="Where the host keeps its state. Default: $HV_STATE_DIR, else /var/lib/podvisor for root and "
    "~/.local/state/podvisor for others.",
)
@click.option("--local", is_flag=True, help="Leave the cluster aside: this folder's own host. Also HV_LOCAL=1.")
@click.option("--host", metavar="NAME", help="That host of the cluster alone.")
@click.option("-n", "--namespace", metavar="NAME", help="Of pods that are named without one. Also HV_NAMESPACE.")
@click.pass_context
def cli(ctx: click.Context, state_dir: str | None, local: bool, host: str | None, namespace: str | None) -> None:
    """Run containers, each pod in a virtual machine of its own, with or without KVM.

    A daemon (hostd) owns the pods; commands that need it start it in the background. Where hv cluster up has made a
    cluster and its master runs, commands go through the master, and pods to one of its hosts. PODs are named NAME or
    NAMESPACE/NAME.

    \b
    Exit codes: run, exec and attach end with the container's, or 125 when hv itself
    failed, and 128 + n when signal n ended the process. All others: 0, 1 for a
    failure, 2 for wrong usage. HV_DEBUG=1 adds the stack trace to an error.
    """
    chosen = _state_dir(state_dir)
    route.choose(local=local, namespace=namespace)
    ctx.obj = Settings(route.host_state(chosen, host) if host else chosen)


_state_dir = state_dir


def run_click(args: Sequence[str]) -> int:
    """Runs a command line through click; `HvError` and signals are the caller's."""
    from hypervisor.cli.signals import raise_on_ending_signals

    raise_on_ending_signals()
    try:
        # Not cli.main(): it would turn a broken pipe into exit code 1, and Ctrl-C into a line of its own.
        with cli.make_context("hv", list(args)) as ctx:
            code = cli.invoke(ctx)
    except click.exceptions.Exit as e:
        return e.exit_code
    except click.ClickException as e:
        _explain(e, args)
        return USAGE if isinstance(e, click.UsageError) else e.exit_code
    return code if isinstance(code, int) else 0


def complete(instruction: str) -> int:
    """Answers the shell's completion function (see `hypervisor.cli.completion`)."""
    from click.shell_completion import shell_complete

    return shell_complete(cli, {}, "hv", COMPLETE_VARIABLE, instruction)


def _explain(error: click.ClickException, args: Sequence[str]) -> None:
    """One line, and where the help is; a bare group prints its help."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
        return
    context = getattr(error, "ctx", None)
    where = context.command_path if context is not None else f"hv {command_of(args)}".strip()
    message = " ".join(error.format_message().split()).rstrip(".")
    print(f"hv: {message}; see: {where} --help", file=sys.stderr)  # noqa: T201
