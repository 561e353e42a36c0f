"""QEMU's command line for each kind of machine, as golden files: ``pytest tests/unit/vmm --regenerate`` writes them."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest

from hypervisor.vmm.argv import Machine, mac_of, render_argv
from hypervisor.vmm.capabilities import HostCapabilities
from hypervisor.vmm.config import MIB, ImageDisk, VmConfig
from hypervisor.vmm.guest import GuestImage
from hypervisor.vmm.identity import VmIdentity
from hypervisor.vmm.plan import IMAGE_SLOTS, ClonePlan, plan_launch, plan_template
from hypervisor.vmm.templates.build import template_key

GOLDEN = Path(__file__).parent / "golden"
DIRECTORY = Path("/var/lib/podvisor/pods/0a1b2c3d/vm")
IDENTITY = VmIdentity(cid=10_001, uid=0x70000001)
IMAGES = (
    ImageDisk(serial="img-0123456789ab", path=Path("/var/lib/podvisor/images/a.erofs")),
    ImageDisk(serial="img-ba9876543210", path=Path("/var/lib/podvisor/images/b.erofs")),
)
ODD = (ImageDisk(serial="odd", path=Path('/a b/c,d="e"\\f,,g/ü.img')),)

CASES = {
    "tcg": ({}, {}),
    "kvm": ({"accelerator": "kvm"}, {"kvm_unusable": None}),
    "kernel-vsock": ({}, {"vsock": "kernel"}),
    "net-none": ({"net": "none"}, {}),
    "no-data-disk": ({"data_disk": None}, {}),
    "several-disks": ({"image_disks": IMAGES}, {}),
    "odd-names": ({"image_disks": ODD}, {}),
    "disks-by-vmx": ({"image_disks": IMAGES, "block": "vmx"}, {}),
    "big": ({"memory_bytes": 4096 * MIB, "vcpus": 8, "kernel_arguments": ("debug", "x=y")}, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str, guest: GuestImage, capabilities: HostCapabilities, request: pytest.FixtureRequest) -> None:
    fields, host = CASES[name]
    config = VmConfig(**{"name": "default/web", "guest": guest, **fields})  # type: ignore[arg-type]
    plan = plan_launch(config, replace(capabilities, **host), DIRECTORY, IDENTITY)  # type: ignore[arg-type]
    compare(name, plan.argv, request)


def compare(name: str, argv: tuple[str, ...], request: pytest.FixtureRequest) -> None:
    text = "".join(f"{line}\n" for line in _lines(argv))
    path = GOLDEN / f"{name}.txt"
    if request.config.getoption("--regenerate", default=False):
        path.write_text(text)
    assert text == path.read_text(), f"{path.name} differs; `pytest tests/unit/vmm --regenerate` if that is meant"


CLONE = ClonePlan(
    template=Path("/var/lib/podvisor/templates/x"),
    ram_bytes=256 * MIB,
    ram_sha256="00" * 32,
    mappings=((0, 65536, 1, 0),),
)


def test_golden_template(guest: GuestImage, capabilities: HostCapabilities, request: pytest.FixtureRequest) -> None:
    config = VmConfig(name="default/web", guest=guest, image_disks=IMAGES)
    plan = plan_template(config, capabilities, DIRECTORY, IDENTITY)
    assert plan is not None
    compare("template", plan.argv, request)


def test_the_kernels_vsock_device_is_in_a_template(guest: GuestImage, capabilities: HostCapabilities) -> None:
    """Its CID is no pod's, and makes no other template; a clone's is its own."""
    host = replace(capabilities, vsock="kernel")
    config = VmConfig(name="default/web", guest=guest)
    plans = [plan_template(config, host, DIRECTORY, replace(IDENTITY, cid=cid)) for cid in (10_001, 10_002)]
    assert plans[0] is not None and plans[1] is not None
    assert f"vhost-vsock-pci,id=vsock,guest-cid={(1 << 30) + 10_001},vhostfd=12" in plans[0].argv
    assert 12 in plans[0].confinement.keep_fds
    keys = [template_key(plan, (7, 2, 0), "digest") for plan in plans if plan is not None]
    assert keys[0] == keys[1]
    clone = plan_launch(config, host, DIRECTORY, IDENTITY, clone=CLONE)
    assert "vhost-vsock-pci,id=vsock,guest-cid=10001,vhostfd=12" in clone.argv
    assert clone.vmx.guest_cid is None


def test_golden_clone(guest: GuestImage, capabilities: HostCapabilities, request: pytest.FixtureRequest) -> None:
    config = VmConfig(name="default/web", guest=guest, image_disks=IMAGES[:1])
    plan = plan_launch(config, capabilities, DIRECTORY, IDENTITY, clone=CLONE)
    compare("clone", plan.argv, request)
    environment = dict(plan.confinement.environment)
    assert environment["HV_RAM"] == f"{256 * MIB}:13:serve:14"
    assert {13, 14} <= set(plan.confinement.keep_fds)


def test_a_clone_has_its_templates_devices(guest: GuestImage, capabilities: HostCapabilities) -> None:
    """In the same order, so in the same PCI slots; only what stands behind a disk differs."""
    for count in range(IMAGE_SLOTS + 1):
        disks = tuple(ImageDisk(serial=f"img-{i}", path=Path(f"/{i}")) for i in range(count))
        config = VmConfig(name="x", guest=guest, image_disks=disks)
        template = plan_template(config, capabilities, DIRECTORY, IDENTITY)
        assert template is not None
        clone = plan_launch(config, capabilities, DIRECTORY, IDENTITY, clone=CLONE)
        assert _devices(clone.argv) == _devices(template.argv)


def _devices(argv: tuple[str, ...]) -> list[str]:
    values = [value for option, value in itertools.pairwise(argv) if option in ("-device", "-machine", "-m", "-cpu")]
    return [re.sub(r",serial=[^,]*", "", value) for value in values]


@pytest.mark.parametrize(
    ("fields", "host"),
    [
        ({"kernel_arguments": ("debug",)}, {}),
        ({"data_disk": None}, {}),
        ({"image_disks": tuple(ImageDisk(serial=f"i{i}", path=Path(f"/{i}")) for i in range(IMAGE_SLOTS + 1))}, {}),
        ({}, {"lazy_ram_unusable": "no"}),
    ],
)
def test_what_no_template_fits_starts_cold(
    fields: dict[str, object], host: dict[str, object], guest: GuestImage, capabilities: HostCapabilities
) -> None:
    config = VmConfig(**{"name": "x", "guest": guest, **fields})  # type: ignore[arg-type]
    assert plan_template(config, replace(capabilities, **host), DIRECTORY, IDENTITY) is None  # type: ignore[arg-type]


def _lines(argv: tuple[str, ...]) -> list[str]:
    """An option with its value on each line."""
    lines: list[str] = []
    for word in argv:
        if word.startswith("-") or not lines:
            lines.append(word)
        else:
            lines[-1] += f" {word}"
    return lines


def test_no_golden_file_is_stale() -> None:
    assert {path.stem for path in GOLDEN.glob("*.txt")} == {*CASES, "template", "clone"}


def test_every_disk_has_one_descriptor(guest: GuestImage, capabilities: HostCapabilities) -> None:
    config = VmConfig(name="x", guest=guest, image_disks=IMAGES)
    plan = plan_launch(config, capabilities, DIRECTORY, IDENTITY)
    numbers = [disk.fd for disk in plan.disks]
    assert numbers == [20, 21, 22, 23]
    assert set(numbers) < set(plan.confinement.keep_fds)


def test_render_is_pure() -> None:
    machine = Machine(
        qemu=Path("/q"), name="n", accelerator="tcg", memory_bytes=64 * MIB, vcpus=1, kernel=Path("/k"),
        initrd=Path("/i"), cmdline="", disks=(), vsock="kernel", cid=3, mac=None,
    )  # fmt: skip
    assert render_argv(machine) == render_argv(machine)
    assert "-netdev" not in render_argv(machine)


def test_mac_is_local_and_unique() -> None:
    assert mac_of(10_000) == "52:54:00:00:27:10"
    assert len({mac_of(cid) for cid in range(3, 1000)}) == 997
