"""VmxConfig: checked, and the same after its way to the zygote."""

from __future__ import annotations

from pathlib import Path

import pytest

from hypervisor.errors import InvalidInput
from hypervisor.iofilter.spec import FilterSpec
from hypervisor.vmx.config import BlockConfig, VmxConfig, VmxFds
from hypervisor.vsock.backend import VsockLimits


def test_json_there_and_back(tmp_path: Path) -> None:
    config = VmxConfig(
        directory=tmp_path,
        guest_cid=5,
        uid=1,
        gid=2,
        cgroups=(Path("/a"), Path("/b")),
        vsock=VsockLimits(max_connections=7),
        stream_limits=(1, 2),
        blocks=(
            BlockConfig(serial="hv-root", read_only=True),
            BlockConfig(serial="x", read_only=False, queues=3, filters=(FilterSpec("delay", "d", (("us", "1"),)),)),
        ),
    )
    assert VmxConfig.from_json(config.to_json()) == config


def test_paths(tmp_path: Path) -> None:
    config = VmxConfig(directory=tmp_path, guest_cid=5)
    assert config.address.path == tmp_path / "vsock.sock"
    assert config.frontend_path == tmp_path / "vhost.sock"
    assert config.control_path == tmp_path / "vmx.sock"


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"guest_cid": 2}, "guest_cid"),
        ({"uid": 5}, "uid"),
        ({"uid": 0, "gid": 0}, "uid"),
        ({"directory": Path("/no")}, "directory"),
    ],
)
def test_bad_values_are_named(tmp_path: Path, changes: dict[str, object], where: str) -> None:
    values: dict[str, object] = {"directory": tmp_path, "guest_cid": 5} | changes
    with pytest.raises(InvalidInput) as caught:
        VmxConfig(**values).validate()  # type: ignore[arg-type]
    assert caught.value.where == where


def test_descriptors_travel_in_order() -> None:
    assert VmxFds(frontend=3, streams=((4, 5), (6, 7))).flat() == [3, 4, 5, 6, 7]
    assert VmxFds(streams=((4, 5),)).flat() == [4, 5]
    assert VmxFds(streams=((4, 5),), blocks=((6, 7), (8, None)), bases=(9,)).flat() == [4, 5, 6, 7, 8, 9]
