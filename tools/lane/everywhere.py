"""``python -m lane.everywhere RESULTS...``: fails when a test that needs something scarce was skipped in every run.

Where every run had KVM, tests marked tcg are excused, in a line of their own: one cannot take it away.

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


def skipped_everywhere(runs: Iterable[list[Case]]) -> list[Case]:
    """Tests that no run has run, as the last run has them."""
    cases = [case for run in runs for case in run]
    ran = {case.name for case in cases if case.skipped is None}
    return sorted({case.name: case for case in cases if case.name not in ran}.values())


def main(paths: list[str]) -> int:
    """Exit status: 0, or 1 after a line for each test that was skipped everywhere or each file that cannot be read."""
    try:
        runs = [read(Path(path)) for path in paths]
    except (OSError, ElementTree.ParseError) as e:
        print(f"everywhere: error: results cannot be read: {e}", file=sys.stderr)
        return 1
    lost = skipped_everywhere(runs)
    if not any("kvm" in case.needs and case.skipped is not None for run in runs for case in run):
        excused = [case for case in lost if "tcg" in case.needs]
        lost = [case for case in lost if case not in excused]
        print(f"everywhere: {len(excused)} tests about machines without KVM were not run: each machine here has it")
    for case in lost:
        print(
            f"everywhere: error: {case.name} was skipped in each of {len(runs)} runs: {case.skipped}", file=sys.stderr
        )
    count = dict.fromkeys(sorted({need for run in runs for case in run for need in case.needs}), 0)
    for name in {case.name: case for run in runs for case in run if case.skipped is None}.values():
        for need in name.needs:
            count[need] += 1
    print("everywhere: tests run by what they need: " + ", ".join(f"{need} {n}" for need, n in count.items()))
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
