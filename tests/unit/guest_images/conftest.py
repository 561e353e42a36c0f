"""The builder is a program beside the package: its folder goes on the path for these tests alone."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

GUEST_IMAGES = Path(__file__).parents[3] / "guest-images"
sys.path.insert(0, str(GUEST_IMAGES))

from builder.image import Project, build_image  # noqa: E402
from builder.samples import build_samples  # noqa: E402


@pytest.fixture(scope="session")
def cache() -> Path:
    """Downloaded packages, shared with `make guest-image`, so that the tests fetch nothing twice."""
    return GUEST_IMAGES / "out/cache"


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A copy of what the image is built from, so that nobody's editor changes it under a test."""
    real, copy = Project(GUEST_IMAGES.parent), Project(tmp_path_factory.mktemp("project"))
    inputs = {**real.agent_sources(), "build/guest/init": real.init, "build/guest/hv-exec": real.helper}
    for name, source in inputs.items():
        target = copy.top / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    return copy


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory, project: Project, cache: Path) -> Path:
    """A guest image built by these tests."""
    out = tmp_path_factory.mktemp("image")
    assert build_image(project, out, cache)
    return out


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """Sample images built by these tests."""
    out = tmp_path_factory.mktemp("samples")
    assert build_samples(out, cache)
    return out
