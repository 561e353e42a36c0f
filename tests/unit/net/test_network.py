"""A host's part of the pod network: what it remembers, and what it tells the packet filter. No kernel."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from hypervisor.errors import InvalidInput, ResourceExhausted
from hypervisor.net.network import HostNetwork

CLUSTER = ("10.88.0.0/16", "10.96.0.0/16")


def network(folder: Path, *ranges: str) -> HostNetwork:
    made = HostNetwork(folder / "network.json")
    if ranges:
        made.set_ranges(ranges, CLUSTER)
    return made


async def test_a_pod_keeps_its_addresses(tmp_path: Path) -> None:
    first = network(tmp_path, "10.88.0.0/24", "fd88::/64")
    assert await first.allocate("a") == ("10.88.0.1", "fd88::1")
    assert await first.allocate("b") == ("10.88.0.2", "fd88::2")
    assert await first.allocate("a") == ("10.88.0.1", "fd88::1")
    second = network(tmp_path)  # a daemon that starts anew
    assert second.addresses("b") == ("10.88.0.2", "fd88::2")
    await second.release("b")
    second.keep_only({"a"})
    third = network(tmp_path)
    assert third.addresses("b") == ()
    assert third.addresses("a") == ("10.88.0.1", "fd88::1")


async def test_many_at_once(tmp_path: Path) -> None:
    made = network(tmp_path, "10.88.0.0/24")
    given = await asyncio.gather(*(made.allocate(f"pod-{i}") for i in range(50)))
    assert len(set(given)) == 50
    again = network(tmp_path)
    assert all(again.addresses(f"pod-{i}") == given[i] for i in range(50))


async def test_pods_wait_for_the_ranges(tmp_path: Path) -> None:
    made = network(tmp_path)
    waiting = asyncio.create_task(made.allocate("a"))
    await asyncio.sleep(0)
    assert not waiting.done()
    made.set_ranges(("10.88.0.0/24",), CLUSTER)
    assert await waiting == ("10.88.0.1",)


async def test_none_left_takes_none(tmp_path: Path) -> None:
    made = network(tmp_path, "10.88.0.0/30", "fd88::/64")
    await made.allocate("a")
    await made.allocate("b")
    with pytest.raises(ResourceExhausted):
        await made.allocate("c")
    await made.release("a")
    assert (await made.allocate("c"))[0] == "10.88.0.1"


async def test_another_range_forgets_what_is_not_its_own(tmp_path: Path) -> None:
    made = network(tmp_path, "10.88.0.0/24")
    await made.allocate("a")
    made.set_ranges(("10.88.7.0/24",), CLUSTER)
    assert made.addresses("a") == ()
    assert await made.allocate("a") == ("10.88.7.1",)


@pytest.mark.parametrize("ranges", [(), ("10.0.0.0/24", "10.0.1.0/24"), ("10.0.0.1/24",)])
def test_ranges_are_checked(tmp_path: Path, ranges: tuple[str, ...]) -> None:
    made = HostNetwork(tmp_path / "network.json")
    with pytest.raises(InvalidInput):
        made.set_ranges(ranges, CLUSTER)


def test_a_damaged_file_is_no_reason_to_stop(tmp_path: Path) -> None:
    (tmp_path / "network.json").write_text("{")
    assert network(tmp_path).addresses("a") == ()


def test_hosts_have_other_names(tmp_path: Path) -> None:
    one, two = HostNetwork(tmp_path / "1"), HostNetwork(tmp_path / "2")
    assert one.tap_prefix != two.tap_prefix
    assert one.table != two.table
    assert len(one.tap_prefix) == 6
