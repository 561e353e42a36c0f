"""Addresses of pods."""

from __future__ import annotations

import ipaddress

import pytest

from hypervisor.errors import InvalidInput, ResourceExhausted
from hypervisor.net.addresses import Pool, parse_cidr


def test_each_address_once_and_the_freed_one_last() -> None:
    pool = Pool(parse_cidr("10.0.0.0/29"))
    given = [str(pool.allocate()) for _ in range(6)]
    assert given == [f"10.0.0.{i}" for i in range(1, 7)]
    with pytest.raises(ResourceExhausted, match=r"all 6 addresses of 10\.0\.0\.0/29"):
        pool.allocate()
    pool.free(ipaddress.ip_address("10.0.0.2"))
    pool.free(ipaddress.ip_address("10.0.0.5"))
    assert [str(pool.allocate()) for _ in range(2)] == ["10.0.0.2", "10.0.0.5"]
    pool.free(ipaddress.ip_address("10.0.0.1"))
    pool.free(ipaddress.ip_address("10.0.0.6"))
    assert str(pool.allocate()) == "10.0.0.6"  # not the lowest: the next


def test_what_is_taken_stays_taken() -> None:
    pool = Pool(parse_cidr("fd00::/120"))
    first = ipaddress.ip_address("fd00::1")
    pool.reserve(first)
    assert str(pool.allocate()) == "fd00::2"
    with pytest.raises(InvalidInput, match="two pods"):
        pool.reserve(first)
    with pytest.raises(InvalidInput, match="not of this host's range"):
        pool.reserve(ipaddress.ip_address("fd01::1"))
    assert len(pool) == 2


@pytest.mark.parametrize("text", ["", "10.0.0.1/24", "10.0.0.0/31", "fd00::/127", "web", "10.0.0.0/99"])
def test_ranges_that_will_not_do(text: str) -> None:
    with pytest.raises(InvalidInput, match="podCIDR"):
        parse_cidr(text)
