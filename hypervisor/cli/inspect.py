"""``hv inspect``: a pod's VM as the hypervisor sees it."""

from __future__ import annotations

from typing import Any

import click

from hypervisor.cli import complete, output
from hypervisor.cli.app import Settings, pass_settings
from hypervisor.cli.state import pod_reference

LINES = 24
"""Of each part, in the table."""


@click.command("inspect")
@click.argument("pod", shell_complete=complete.pod_names)
@output.format_option("table", "json", "yaml")
@pass_settings
def inspect(settings: Settings, pod: str, output: str) -> None:
    """Show a pod's VM as the hypervisor sees it.

    Registers of its CPUs, memory map, block devices, resident pages and faults: asked of QEMU and vmx, not of the
    guest, so that it also answers for one that hangs. The table shows the beginning of each part; json has all of it.
    """
    namespace, name = pod_reference(pod)
    with settings.connect_any() as connection:
        answer = connection.get("hv", "v1", "pods", namespace, name, "inspect")
    rows = [row for part, value in answer.items() for row in _rows(part, value)]
    _show(answer, output, rows)


def _show(answer: dict[str, Any], fmt: str, rows: list[list[str]]) -> None:
    output.show(answer, fmt, names=(), header=("WHAT", "VALUE"), rows=rows)


def _rows(part: str, value: Any) -> list[list[str]]:
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return [[part, line] for line in value[:LINES]]
    flat = list(_flat(part, value))
    return flat[:LINES]


def _flat(name: str, value: Any) -> list[list[str]]:
    """Nested objects as dotted names."""
    if isinstance(value, dict):
        return [row for key, inner in value.items() for row in _flat(f"{name}.{key}", inner)]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [row for index, inner in enumerate(value) for row in _flat(f"{name}.{index}", inner)]
    return [[name, str(value)]]
