"""Ranges as users write them, and what is free in them."""

from __future__ import annotations

from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypervisor.errors import InvalidInput
from hypervisor.master.network.ranges import Ranges, free_address, free_port, free_subnet


@pytest.mark.parametrize(
    ("field", "text", "said"),
    [
        ("services", "10.96.0.0", "too small"),
        ("services", "10.96.0.1/16", "host bits"),
        ("services", "10.96.0.0/16,10.97.0.0/16", "one of IPv4 and one of IPv6"),
        ("services", "nonsense", "10.96.0.0/16"),
        ("services", "10.244.128.0/20", "overlap"),
        ("pods", "10.244.0.0/25", "no room"),
        ("node_ports", "80", "30000-32767"),
        ("node_ports", "400-300", "30000-32767"),
        ("node_ports", "1-70000", "30000-32767"),
    ],
)
def test_a_range_that_will_not_do_is_refused(field: str, text: str, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        Ranges.parse(**{field: text})


def test_addresses_are_given_until_none_is_left() -> None:
    network = ip_network("10.9.0.0/28")
    taken: set[object] = set()
    while (address := free_address(network, taken)) is not None:
        assert address not in taken
        taken.add(address)
    assert taken == {f"10.9.0.{n}" for n in range(2, 15)}  # not the network, the first, the broadcast


def test_ports_are_given_until_none_is_left() -> None:
    taken: set[object] = set()
    while (port := free_port(range(30000, 30040), taken)) is not None:
        assert port not in taken
        taken.add(port)
    assert taken == set(range(30000, 30040))


def test_the_lower_end_is_left_to_those_who_name_their_address() -> None:
    network = ip_network("10.96.0.0/16")
    for _ in range(50):
        assert int(ip_network(free_address(network, ())).network_address) - int(network[0]) > 256  # type: ignore[arg-type]


@given(st.lists(st.tuples(st.integers(0, 255), st.integers(24, 30)), max_size=40))
def test_a_nodes_part_overlaps_nobodys(parts: list[tuple[int, int]]) -> None:
    network = ip_network("10.244.0.0/16")
    taken = [ip_network(f"10.244.{third}.0/{bits}") for third, bits in parts]
    found = free_subnet(network, taken)
    assert found is not None
    assert found.prefixlen == 24
    assert found.subnet_of(network)  # type: ignore[arg-type]
    assert not any(found.overlaps(t) for t in taken)
    thirds = {third for third, _ in parts}
    assert found == ip_network(f"10.244.{min(set(range(256)) - thirds)}.0/24")


def test_no_part_is_left() -> None:
    assert free_subnet(ip_network("10.0.0.0/23"), [ip_network("10.0.0.0/24"), ip_network("10.0.1.128/25")]) is None
    assert str(free_subnet(ip_network("fd00::/56"), [ip_network("fd00::/64")])) == "fd00:0:0:1::/64"
