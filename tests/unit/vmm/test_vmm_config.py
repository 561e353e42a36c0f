"""`VmConfig`: every bad value is one error that names the field and how to mend it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hypervisor.errors import InvalidInput
from hypervisor.vmm.config import MAX_IMAGE_DISKS, MIB, DataDisk, ImageDisk, VmConfig
from hypervisor.vmm.guest import GuestImage


def disk(serial: str = "img-0123456789ab", path: str = "/images/x") -> ImageDisk:
    return ImageDisk(serial=serial, path=Path(path))


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("name", {"name": ""}, "use 1 to 320"),
    ("name", {"name": "a,b"}, "'a,b'"),
    ("name", {"name": "-a"}, "the first and last"),
    ("name", {"name": "a\n"}, "use"),
    ("memory_bytes", {"memory_bytes": MIB}, "64 MiB or more"),
    ("memory_bytes", {"memory_bytes": 256 * MIB + 1}, "whole MiB"),
    ("vcpus", {"vcpus": 0}, "give 1 to 64"),
    ("vcpus", {"vcpus": 65}, "give 1 to 64"),
    ("cpu_limit", {"cpu_limit": 0.0}, "between 0.01 and 4096"),
    ("cpu_limit", {"cpu_limit": float("nan")}, "between"),
    ("net", {"net": "bridge"}, "allowed: user, tap, none"),
    ("accelerator", {"accelerator": "hvf"}, "allowed: auto, kvm, tcg"),
    ("console_bytes", {"console_bytes": 1}, "give 4096 to"),
    ("image_disks", {"image_disks": tuple(disk(f"d{i}") for i in range(MAX_IMAGE_DISKS + 1))}, "takes up to"),
    ("image_disks[0].serial", {"image_disks": (disk("x" * 21),)}, "1 to 20"),
    ("image_disks[0].serial", {"image_disks": (disk("a,b"),)}, "1 to 20"),
    ("image_disks[0].serial", {"image_disks": (disk("hv-data"),)}, "taken"),
    ("image_disks[1].serial", {"image_disks": (disk(), disk())}, "taken"),
    ("image_disks[0].path", {"image_disks": (disk(path="x"),)}, "absolute"),
    ("data_disk.size_bytes", {"data_disk": DataDisk(size_bytes=MIB)}, "16 MiB to"),
    ("data_disk.size_bytes", {"data_disk": DataDisk(size_bytes=64 * MIB + 1)}, "multiple of 4096"),
    ("kernel_arguments[0]", {"kernel_arguments": ("a\nb",)}, "printable"),
    ("kernel_arguments", {"kernel_arguments": ("x" * 1025,)}, "1024"),
]


@pytest.mark.parametrize(("where", "fields", "says"), BAD)
def test_bad_value_names_field_and_mend(guest: GuestImage, where: str, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        VmConfig(**{"name": "vm", "guest": guest, **fields})
    assert caught.value.where == where
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_good_values(guest: GuestImage) -> None:
    config = VmConfig(name="ns/pod-1.x", guest=guest, image_disks=(disk(),), data_disk=None, cpu_limit=1.5)
    assert config.net == "user"
    assert config.accelerator == "auto"
