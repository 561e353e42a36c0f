"""``hv doctor``: what this machine has and lacks."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hypervisor.cli import output
from hypervisor.cli.app import Settings, pass_settings

if TYPE_CHECKING:
    from hypervisor.vmm.checks import Finding

HEADER = ("", "CHECK", "FOUND")
MARKS = {"ok": "ok", "warn": "note", "fail": "MISSING"}


@click.command("doctor")
@output.format_option("table", "json", "yaml")
@pass_settings
def doctor(settings: Settings, output: str) -> int:
    """Check what this machine has and lacks for running pod VMs.

    Each miss comes with what mends it. Exit code: 1 if hv run could not work here, else 0. Needs no daemon; the first
    call takes some seconds, since KVM is tried with a real guest.
    """
    from hypervisor.vmm.checks import run_checks

    return print_findings(asyncio.run(run_checks(state_directory=Path(settings.state))), output)


def print_findings(findings: list[Finding], fmt: str) -> int:
    """Prints them; the exit code says whether something that is needed is missing."""
    from hypervisor.vmm.checks import main_job_possible

    possible = main_job_possible(findings)
    value = {"ok": possible, "findings": [asdict(f) for f in findings]}
    rows = [row for f in findings for row in _rows(f)]
    output.show(value, fmt, names=(), header=HEADER, rows=rows)
    if fmt == "table":
        lacking = ", ".join(f.name for f in findings if f.needed_for_main_job and f.status == "fail")
        click.echo("\nhv run can work here." if possible else f"\nhv run cannot work here yet: {lacking}")
    return 0 if possible else 1


def _rows(finding: Finding) -> list[tuple[str, str, str]]:
    """What was found, and below it what mends it: beside each other they would be wider than any terminal."""
    rows = [(MARKS[finding.status], finding.name, finding.found)]
    return [*rows, ("", "", f"fix: {finding.fix}")] if finding.fix else rows
