"""modules.bundle: all of the guest's Python modules in one file, for the importer in guest/agent_main.py."""

from __future__ import annotations

from pathlib import Path

from builder.pyroot import LIBRARY, GuestPython


def write_bundle(python: GuestPython, root: Path, agent_folder: str, target: Path) -> int:
    """Gathers the compiled modules that lie below `root`; how many there are.

    They stay where they are besides: what is imported before the bundle is open is found there.

    :raises BuildError: one of them is no compiled module
    """
    rows: list[list[object]] = []
    for base in (root / LIBRARY, root / agent_folder):
        for path in sorted(base.rglob("*.pyc")):
            parts = path.relative_to(base).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            name = ".".join(parts[:-1] if is_package else parts)
            shown = f"/{path.relative_to(root).with_suffix('.py')}"
            rows.append([name, str(path), shown, is_package])
    python.ask("bundle", rows=rows, target=str(target))
    return len(rows)
