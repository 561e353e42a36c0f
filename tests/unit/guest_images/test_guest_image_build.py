"""The guest image as files: reproducible, described by its manifest, rebuilt only when something changed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from builder import manifest, stamp
from builder.errors import BuildError
from builder.image import FILES, Project, build_image

TOP = Path(__file__).parents[3]


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir()) if p.is_file()}


def test_same_inputs_same_bytes(image: Path, project: Project, tmp_path: Path, cache: Path) -> None:
    umask = os.umask(0o077)  # nor may it matter who builds
    try:
        build_image(project, tmp_path / "elsewhere", cache)
    finally:
        os.umask(umask)
    assert digests(image) == digests(tmp_path / "elsewhere")
    assert set(FILES) < set(digests(image))


def test_nothing_is_built_when_nothing_changed(image: Path, project: Project, cache: Path) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in image.iterdir()}
    assert not build_image(project, image, cache)
    assert before == {p.name: p.stat().st_mtime_ns for p in image.iterdir()}


def test_build_leaves_no_scratch_behind(image: Path) -> None:
    assert sorted(p.name for p in image.iterdir()) == sorted([*FILES, "manifest.json", ".inputs"])


def test_manifest_tells_the_truth(image: Path) -> None:
    described = json.loads((image / "manifest.json").read_text())
    for part in ("kernel", "kernel_compressed", "initrd", "root"):
        path = image / described[part]["file"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == described[part]["sha256"]
        assert path.stat().st_size == described[part]["size"]
    assert described["version"] == 1
    assert described["agent_wire_version"] == 1
    assert described["kernel"]["release"].endswith("-cloud-amd64")
    assert described["packages"]["crun"]
    assert described["modules"].index("virtio") < described["modules"].index("virtio_blk")
    assert "vsock_loopback" not in described["modules"]
    assert manifest.damaged_files(image) == []


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_damage_is_seen_and_mended(image: Path, project: Project, cache: Path, name: str) -> None:
    good = (image / name).read_bytes()
    (image / name).write_bytes(good[:-1] + bytes([good[-1] ^ 1]) if name != "manifest.json" else b"{}")
    assert manifest.damaged_files(image) == [name]
    assert build_image(project, image, cache)
    assert (image / name).read_bytes() == good


def test_new_inputs_make_a_new_stamp(tmp_path: Path) -> None:
    file = tmp_path / "agent.py"
    missing = stamp.digest({"crun": "1"}, {"agent.py": file})
    file.write_text("one")
    present = stamp.digest({"crun": "1"}, {"agent.py": file})
    file.write_text("two")
    seen = {missing, present, stamp.digest({"crun": "1"}, {"agent.py": file}), stamp.digest({"crun": "2"}, {})}
    assert len(seen) == 4


def test_failed_build_leaves_the_old_image(image: Path, project: Project, cache: Path, tmp_path: Path) -> None:
    """The agent imports a module that no package has."""
    shutil.copytree(project.top, tmp_path / "project")
    (tmp_path / "project/hypervisor/agent/main.py").write_text("import no_such_module\n")
    before = digests(image)
    with pytest.raises(BuildError, match="no_such_module"):
        build_image(Project(tmp_path / "project"), image, cache)
    assert digests(image) == before


def test_errors_are_one_line_and_a_status(tmp_path: Path) -> None:
    """A builder that cannot find its native programs says which make target is missing."""
    program = [
        sys.executable, "-c",
        "import sys; from pathlib import Path; from builder import __main__ as m; "
        "m._HERE = Path(sys.argv.pop()); sys.exit(m.main())",
    ]  # fmt: skip
    fake = tmp_path / "project/guest-images"
    (fake.parent / "hypervisor/agent").mkdir(parents=True)
    for name in ("__init__.py", "version.py"):
        (fake.parent / "hypervisor" / name).write_text("")
    arguments = ["image", "--out", str(tmp_path / "out"), "--cache", str(TOP / "guest-images/out/cache"), str(fake)]
    done = subprocess.run([*program, *arguments], cwd=TOP / "guest-images", capture_output=True, text=True)
    assert done.returncode == 1
    assert "build/guest/init is not built; run `make native`" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
