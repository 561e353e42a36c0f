"""Entry point of ``hv``: the quick way for ``hv exec``, click for everything else, and every error as one line
(below a VM's failure stands what its console said last).

Exit codes: the container's for run, exec and attach, where 125 means that hv itself failed; 2 wrong usage; 1 any other
failure; 128 + n ended by signal n.
"""

from __future__ import annotations

import os
import signal
import sys

from hypervisor.cli.signals import Interrupted
from hypervisor.errors import HvError, VmFailed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

FAILED, USAGE, OWN_ERROR = 1, 2, 125
COMPLETE_VARIABLE = "_HV_COMPLETE"
CONSOLE_MARK = "; last of the console: "
VALUED = {"--state-dir": "--state-dir", "--host": "--host", "-n": "--namespace", "--namespace": "--namespace"}
"""Global options that take a value, by each of their names."""
CARRIES_EXIT_CODE = frozenset(("run", "exec", "attach"))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line.

    :returns: the exit code
    """
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        return _die_of_sigpipe()
    except Interrupted as e:
        return e.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except HvError as e:
        return _report(e, args)
    except Exception as e:
        return _report_bug(e, args)
    return code


def _run(args: list[str]) -> int:
    instruction = os.environ.get(COMPLETE_VARIABLE)
    if instruction:
        from hypervisor.cli.app import complete

        return complete(instruction)
    code = _exec_quickly(args)
    if code is not None:
        return code
    from hypervisor.cli.app import run_click

    return run_click(args)


def _exec_quickly(args: list[str]) -> int | None:
    """Runs ``[GLOBAL OPTIONS] exec ...``; None when it is something else, or needs click's eye."""
    given: dict[str, str] = {}
    while args and args[0].startswith("-"):
        name, equals, value = args[0].partition("=")
        if name == "--local" and not equals:
            given[name], args = "1", args[1:]
        elif name in VALUED and (equals or len(args) > 1):
            given[VALUED[name]], args = (value, args[1:]) if equals else (args[1], args[2:])
        else:
            return None
    if args[:1] != ["exec"]:
        return None
    from hypervisor.cli import execute, route, state

    asked = execute.parse_quickly(args[1:])
    if asked is None:
        return None
    folder = state.state_dir(given.get("--state-dir"))
    route.choose(local="--local" in given, namespace=given.get("--namespace"))
    return execute.run_exec(route.host_state(folder, given["--host"]) if "--host" in given else folder, asked)


def command_of(args: Sequence[str]) -> str:
    """The sub-command of a command line, as far as one can see it; empty when there is none."""
    skip = False
    for word in args:
        if skip:
            skip = False
        elif word in VALUED:
            skip = True
        elif not word.startswith("-"):
            return word
    return ""


def _report(error: HvError, args: Sequence[str]) -> int:
    if os.environ.get("HV_DEBUG"):
        import traceback

        traceback.print_exception(error)
    print("\n".join(_lines(error)), file=sys.stderr)  # noqa: T201
    return OWN_ERROR if command_of(args) in CARRIES_EXIT_CODE else FAILED


def _lines(error: HvError) -> list[str]:
    """One line; a VM's failure is followed by what QEMU and the console said last, indented."""
    text = str(error).strip() or type(error).__name__
    if not isinstance(error, VmFailed):
        return ["hv: " + " ".join(text.split("\n"))]
    what, mark, excerpt = text.partition(CONSOLE_MARK)  # hostd's short form of it: lines with bars between them
    first, *rest = what.split("\n")
    if mark:
        rest += [mark.lstrip("; "), *excerpt.split(" | ")]
    shown = ("".join(c if c.isprintable() else " " for c in line).rstrip() for line in rest)
    return [f"hv: {first.rstrip(':')}", *(f"    {line}" for line in shown if line)]


def _report_bug(error: Exception, args: Sequence[str]) -> int:
    """What should not happen: still one line, and how to see more."""
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return _report(HvError(f"{where}{error.strerror or error}"), args)
    return _report(HvError(f"{type(error).__name__}: {error} (a bug; HV_DEBUG=1 shows where)"), args)


def _die_of_sigpipe() -> int:
    """Ends as other tools do when the reader of their output has gone: quietly, by SIGPIPE."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)  # so that Python's own flush at exit has nothing to say
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGPIPE)
    return 128 + signal.SIGPIPE


if __name__ == "__main__":
    sys.exit(main())
