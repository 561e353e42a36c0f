"""Folders that several hosts of one machine share."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from hypervisor.controller.paths import HostPaths
from hypervisor.controller.templates import open_templates


def test_links_lead_to_what_is_shared(tmp_path: Path) -> None:
    for name in ("images", "templates"):
        (tmp_path / name).mkdir()
        (tmp_path / "host" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "host" / name).symlink_to(tmp_path / name)
    shared, own = HostPaths(tmp_path / "host"), HostPaths(tmp_path / "other")
    assert (shared.images, shared.templates) == (tmp_path / "images", tmp_path / "templates")
    assert own.images == tmp_path / "other" / "images"


async def test_only_the_one_user_of_a_folder_sweeps_it(tmp_path: Path) -> None:
    parts = cast(Any, [None] * 3)
    litter = tmp_path / ".build-0123"
    with open_templates(tmp_path, *parts) as first:
        assert first.alone
        litter.mkdir()
        with open_templates(tmp_path, *parts) as second:
            assert not second.alone
            await second.sweep("digest")
            assert litter.exists()
    with open_templates(tmp_path, *parts) as third:
        assert third.alone
