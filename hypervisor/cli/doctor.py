"""``hv doctor``: what this machine has and lacks."""

from __future__ import annotations

from typing import Any

import click

from hypervisor.cli import output
from hypervisor.cli.app import Settings, pass_settings

HEADER = ("", "CHECK", "FOUND", "FIX")


@click.command("doctor")
@output.format_option("table", "json", "yaml")
@pass_settings
def doctor(settings: Settings, output: str) -> int:
    """Check what this machine has and lacks for running pod VMs.

    Each miss comes with what mends it. Exit code: 1 if hv run could not work here, else 0. Needs no daemon; the first
    call takes some seconds, since KVM is tried with a real guest.
    """
    from hypervisor.vmm.checks import run_checks

    return print_findings([_as_dict(f) for f in run_checks(settings.state)], output)


def _as_dict(finding: Any) -> dict[str, Any]:
    return {name: getattr(finding, name) for name in ("name", "ok", "found", "fix", "needed")}


def print_findings(findings: list[dict[str, Any]], fmt: str) -> int:
    """Prints them; the exit code says whether something that is needed is missing."""
    lacking = [f for f in findings if f["needed"] and not f["ok"]]
    value = {"ok": not lacking, "findings": findings}
    output.show(value, fmt, names=(), header=HEADER, rows=[_row(f) for f in findings])
    if fmt == "table":
        names = ", ".join(str(f["name"]) for f in lacking)
        click.echo(f"\nhv run cannot work here yet: {names}" if lacking else "\nhv run can work here.")
    return 1 if lacking else 0


def _row(finding: dict[str, Any]) -> list[str]:
    mark = "ok" if finding["ok"] else "MISSING" if finding["needed"] else "note"
    return [mark, str(finding["name"]), str(finding["found"]), str(finding["fix"] or "")]
