"""``python -m lane.everywhere RESULTS...``: fails when a test that needs something scarce was skipped in every run.

Such a test (marked kvm, vhost_vsock, tcg, net_admin or uffd) may be skipped on one machine as long as another run has
it: the host's, or the KVM lane's. Read from the runs' JUnit results, in which tests/conftest.py has put the marks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree


class Case(NamedTuple):
    """One test in one run.

    :param skipped: why; None: it ran
    """

    name: str
    needs: frozenset[str]
    skipped: str | None


def read(path: Path) -> list[Case]:
    """Tests with such a mark in one JUnit file.

    :raises OSError, xml.etree.ElementTree.ParseError: there is none
    """
    return [case for element in ElementTree.parse(path).iter("testcase") if (case := _case(element)).needs]


def _case(element: ElementTree.Element) -> Case:
    needs = " ".join(p.get("value", "") for p in element.iter("property") if p.get("name") == "needs")
    skip = element.find("skipped")
    reason = None if skip is None else skip.get("message", "")
    return Case(f"{element.get('classname')}::{element.get('name')}", frozenset(needs.split()), reason)


def skipped_everywhere(runs: Iterable[list[Case]]) -> dict[str, str]:
    """Names of tests that no run has run, each with the reason that the last run gave."""
    reasons: dict[str, str] = {}
    ran: set[str] = set()
    for case in (case for run in runs for case in run):
        if case.skipped is None:
            ran.add(case.name)
        else:
            reasons[case.name] = case.skipped
    return {name: reason for name, reason in reasons.items() if name not in ran}


def main(paths: list[str]) -> int:
    """Exit status: 0, or 1 after a line for each test that was skipped everywhere or each file that cannot be read."""
    try:
        runs = [read(Path(path)) for path in paths]
    except (OSError, ElementTree.ParseError) as e:
        print(f"everywhere: error: results cannot be read: {e}", file=sys.stderr)
        return 1
    lost = skipped_everywhere(runs)
    for name, reason in sorted(lost.items()):
        print(f"everywhere: error: {name} was skipped in each of {len(runs)} runs: {reason}", file=sys.stderr)
    count = dict.fromkeys(sorted({need for run in runs for case in run for need in case.needs}), 0)
    for name in {case.name: case for run in runs for case in run if case.skipped is None}.values():
        for need in name.needs:
            count[need] += 1
    print("everywhere: tests run by what they need: " + ", ".join(f"{need} {n}" for need, n in count.items()))
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
