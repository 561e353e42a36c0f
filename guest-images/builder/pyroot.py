"""The guest's Python: which modules, compiled how, put where.

`GuestPython` runs the guest's unpacked (never installed) interpreter on this machine, through the guest's own loader.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder import tree
from builder.errors import BuildError

LIBRARY = "usr/lib/python3.11"
_INSIDE = Path(__file__).with_name("inside.py")
# Always loaded, before or besides any import statement: text encodings, and what the interpreter imports by name.
_IMPLICIT = (
    "encodings",
    "encodings.aliases",
    "codecs",
    "io",
    "abc",
    "os",
    "stat",
    "posixpath",
    "genericpath",
    "warnings",
)


@dataclass(frozen=True)
class GuestPython:
    """The interpreter below `prefix`, a tree that holds usr/bin/python3.11, its libraries and its standard library."""

    prefix: Path

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Runs one command of `inside`.

        :raises BuildError: it failed; the message has its last words
        """
        argv = [
            str(self.prefix / tree.LOADER),
            "--library-path",
            str(self.prefix / tree.LIBRARIES),
            str(self.prefix / "usr/bin/python3.11"),
            # Without column numbers code objects are smaller: nobody sees carets in a guest that has no sources.
            *("-S", "-s", "-B", "-X", "utf8", "-X", "no_debug_ranges", str(_INSIDE)),
        ]
        # A fixed hash seed keeps the order of set constants, and so the byte code, the same from run to run.
        environment = {"PYTHONHOME": str(self.prefix / "usr"), "PYTHONHASHSEED": "0", "PATH": "/usr/bin:/bin"}
        request = json.dumps({"command": command, **arguments})
        done = subprocess.run(argv, input=request, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise BuildError(f"the guest's Python failed to {command}: {done.stderr.strip()[-800:]}")
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer


def assemble(packages: Mapping[str, Path], prefix: Path) -> GuestPython:
    """The guest's Python with its whole library below `prefix`, to be run on this machine.

    :param packages: unpacked packages by name
    """
    tree.lay_out(prefix, (tree.LIBRARIES,))
    tree.copy_file(packages["python3.11-minimal"] / "usr/bin/python3.11", prefix / "usr/bin/python3.11")
    for name in ("libpython3.11-minimal", "libpython3.11-stdlib"):
        tree.merge(packages[name] / LIBRARY, prefix / LIBRARY)
    tree.copy_file(packages["liblz4-1"] / tree.LIBRARIES / "liblz4.so.1", prefix / tree.LIBRARIES / "liblz4.so.1")
    tree.install_libraries(prefix, [*packages.values()], optional=True)
    return GuestPython(prefix)


@dataclass(frozen=True)
class Selection:
    """Files below the full library that the guest gets, as paths relative to it."""

    sources: tuple[str, ...]
    extensions: tuple[str, ...]


def select(python: GuestPython, agent_parent: Path, names: Sequence[str], excludes: Sequence[str]) -> Selection:
    """What of the standard library the agent needs.

    :param agent_parent: the folder that holds the `hypervisor` package with the agent
    :param names: modules to have besides the agent's
    :raises BuildError: one of `names` does not exist
    """
    library = python.prefix / LIBRARY
    path = [str(library), str(library / "lib-dynload"), str(agent_parent)]
    agent = [".".join(p.relative_to(agent_parent).with_suffix("").parts) for p in sorted(agent_parent.rglob("*.py"))]
    agent = [name.removesuffix(".__init__") for name in agent]
    found = python.ask("find", path=path, names=[*_IMPLICIT, *names, *agent], excludes=list(excludes))
    if found["missing"]:
        raise BuildError(f"Python's library in the guest has no {', '.join(found['missing'])}")
    files = sorted(Path(f) for f in found["files"].values() if Path(f).is_relative_to(library))
    relative = [str(f.relative_to(library)) for f in files]
    return Selection(
        sources=tuple(f for f in relative if f.endswith(".py")),
        extensions=tuple(f for f in relative if f.endswith(".so")),
    )


def install(python: GuestPython, selection: Selection, root: Path) -> None:
    """Puts the selection below `root`, sources compiled (without docstrings) and left out themselves.

    :raises BuildError: a source does not compile
    """
    library = python.prefix / LIBRARY
    jobs: list[list[str]] = []
    for source in selection.sources:
        target = (root / LIBRARY / source).with_suffix(".pyc")
        target.parent.mkdir(parents=True, exist_ok=True)
        jobs.append([str(library / source), str(target), f"/{LIBRARY}/{source}"])
    python.ask("compile", jobs=jobs, optimize=2)
    for extension in selection.extensions:
        target = root / LIBRARY / extension
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(library / extension, target)


def install_agent(python: GuestPython, agent_parent: Path, root: Path, folder: str) -> list[str]:
    """Puts the agent's package below ``root/folder``, compiled, with its docstrings; the names of its modules.

    :raises BuildError: a source does not compile
    """
    jobs: list[list[str]] = []
    names: list[str] = []
    for source in sorted(agent_parent.rglob("*.py")):
        relative = source.relative_to(agent_parent)
        target = (root / folder / relative).with_suffix(".pyc")
        target.parent.mkdir(parents=True, exist_ok=True)
        jobs.append([str(source), str(target), f"/{folder}/{relative}"])
        names.append(".".join(relative.with_suffix("").parts).removesuffix(".__init__"))
    python.ask("compile", jobs=jobs, optimize=0)
    return names


def compile_in_place(python: GuestPython, library: Path) -> None:
    """Puts compiled files beside the sources of a whole library (`__pycache__`), so that no container has to.

    :raises BuildError: a source does not compile
    """
    jobs: list[list[str]] = []
    for source in sorted(library.rglob("*.py")):
        cached = source.parent / "__pycache__" / f"{source.stem}.cpython-311.pyc"
        cached.parent.mkdir(exist_ok=True)
        jobs.append([str(source), str(cached), f"/{LIBRARY}/{source.relative_to(library)}"])
    python.ask("compile", jobs=jobs, optimize=0)


def check_imports(python: GuestPython, root: Path, folder: str, names: Sequence[str]) -> None:
    """Imports `names` from the finished root alone.

    :param folder: where below `root` the agent's package lies
    :raises BuildError: a module that the agent imports was not packed
    """
    path = [str(root / LIBRARY), str(root / LIBRARY / "lib-dynload"), str(root / folder)]
    errors = python.ask("check", path=path, names=list(names))["errors"]
    if errors:
        text = "; ".join(f"{name}: {error}" for name, error in errors.items())
        raise BuildError(f"the guest's root lacks something (add it to EXTRA_PYTHON_MODULES in packages.py): {text}")
