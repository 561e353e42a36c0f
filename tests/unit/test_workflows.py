"""GitHub's workflow files: of the published schema's shape, and calling what there is."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "guest-images")]

from lane.suite import QEMUS  # noqa: E402

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
# check-jsonschema carries the schema: nothing is fetched
CHECK = (sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows")


def commands() -> list[str]:
    found: list[str] = []
    for path in WORKFLOWS:
        jobs: dict[str, Any] = yaml.safe_load(path.read_text())["jobs"]
        found += [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    return found


def test_they_have_the_schemas_shape() -> None:
    done = subprocess.run([*CHECK, *map(str, WORKFLOWS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_broken_one_is_seen(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yml"
    broken.write_text(WORKFLOWS[0].read_text().replace("runs-on:", "runs_on:"))
    assert subprocess.run([*CHECK, str(broken)], capture_output=True).returncode == 1


def test_every_target_that_they_make_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    lines = [line for command in commands() for line in re.split(r"&&|\n", re.sub(r"\${{.*?}}", "VALUE", command))]
    calls = [line.replace('"', "").split() for line in lines if line.split()[:1] == ["make"]]
    made = [word for call in calls for word in call[1:] if "=" not in word]
    assert {"unit", "integration", "test-kvm", "test"} <= set(made)
    assert set(made) <= targets


def test_each_qemu_has_its_turn() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/kvm-in-a-guest.yml").read_text())["jobs"]
    assert jobs["guest"]["strategy"]["matrix"]["qemu"] == list(QEMUS)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_no_job_may_hang_or_write_without_need(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    assert all(job["timeout-minutes"] <= 90 for job in workflow["jobs"].values())
