"""Every filter has a page, and the page names each of its settings: what the filter itself says there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hypervisor.errors import HvError
from hypervisor.iofilter.loop import DiskLoop, filter_classes

PAGES = Path(__file__).parents[3] / "docs" / "filters"
OWN_PAGE = [found.name for found in filter_classes() if found.name != "template"]


def settings_of(kind: str, folder: Path) -> list[str]:
    """The names that the filter knows, from what it says to one that it does not know."""
    data = folder / "data"
    data.write_bytes(bytes(1 << 20))
    with DiskLoop() as loop:
        disk = loop.open_file("d", data)
        try:
            with pytest.raises(HvError) as refused:
                disk.add(kind, kind, (("nonesuch", "1"),))
        finally:
            disk.close()
    listed = re.search(r"there is no setting nonesuch; there is: (.*)", str(refused.value))
    assert listed
    return [] if listed[1].startswith("none") else listed[1].split(", ")


@pytest.mark.parametrize("kind", OWN_PAGE)
def test_the_page_names_the_settings(kind: str, tmp_path: Path) -> None:
    page = (PAGES / f"{kind}.md").read_text()
    for name in settings_of(kind, tmp_path):
        assert f"`{name}`" in page, f"docs/filters/{kind}.md says nothing of {name}"


@pytest.mark.parametrize("kind", OWN_PAGE)
def test_the_index_has_the_page_and_the_order(kind: str) -> None:
    order = next(found.order for found in filter_classes() if found.name == kind)
    assert f"| [{kind}]({kind}.md) | {order} |" in (PAGES / "README.md").read_text()
