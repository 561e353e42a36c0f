"""Imports go down the layers, never up (docs/architecture.md)."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "hypervisor"

# Each room may import the rooms named here, and itself.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "version": set(),
    "agent": {"version"},
    "vsock": {"errors"},
    "memory": {"errors"},
    "iofilter": {"errors"},
    "percpu": {"errors"},
    "vmx": {"errors", "vsock", "memory", "iofilter", "percpu"},
    "vmm": {"errors", "vsock", "memory", "iofilter", "vmx"},
    "images": {"errors"},
    "net": {"errors"},
    "introspect": {"errors", "kube", "vsock", "vmm", "agent"},
    "kube": {"errors"},
    "controller": {
        "errors",
        "version",
        "kube",
        "vsock",
        "iofilter",
        "vmx",
        "vmm",
        "images",
        "net",
        "introspect",
        "agent",
    },
    "master": {"errors", "version", "kube"},
    "cli": {"errors", "version", "kube", "iofilter", "vmx", "vmm", "introspect", "controller", "master"},
}
# The host shares two modules with the guest: the protocol and the log format.
SHARED_WITH_GUEST = {"hypervisor.agent.wire", "hypervisor.agent.logs", "hypervisor.agent.httpget"}


def modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py" or p.parent != PACKAGE)


def imported(path: Path) -> set[str]:
    """Every absolute module name that `path` imports, wherever in the file; type-checking imports too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = absolute(path, node)
            names |= {f"{module}.{alias.name}" for alias in node.names} | {module}
    return names


def absolute(path: Path, node: ast.ImportFrom) -> str:
    """The module that ``from ... import`` names, a relative one made absolute."""
    if not node.level:
        return str(node.module)
    package = path.relative_to(PACKAGE.parent).parts[: -node.level]
    return ".".join([*package, *([node.module] if node.module else [])])


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    own = room(path)
    for name in imported(path):
        parts = name.split(".")
        if parts[0] != "hypervisor" or len(parts) < 2:
            continue
        target = parts[1]
        if not (PACKAGE / target).is_dir() and not (PACKAGE / f"{target}.py").exists():
            continue  # "from hypervisor import x" of a plain name
        assert target == own or target in ALLOWED[own], f"{path}: {own} must not import {name}"
        if target == "agent" and own != "agent" and len(parts) >= 3:
            module = ".".join(parts[:3])
            assert module in SHARED_WITH_GUEST, f"{path}: shared with the agent is only {SHARED_WITH_GUEST}, not {name}"


def test_agent_uses_the_standard_library_only() -> None:
    for path in (PACKAGE / "agent").rglob("*.py"):
        for name in imported(path):
            top = name.split(".")[0]
            assert top in sys.stdlib_module_names or top == "hypervisor", f"{path} imports {name}"


def test_every_room_is_listed() -> None:
    rooms = {
        p.name.removesuffix(".py")
        for p in PACKAGE.iterdir()
        if p.name[0] not in "_." and (p.is_dir() or p.suffix == ".py")
    }
    assert rooms - {"libexec"} <= set(ALLOWED)
