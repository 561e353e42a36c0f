"""Requests to change the chain of a running pod's disk."""

from __future__ import annotations

from typing import Any

import pytest

from hypervisor.controller.livedisks import changed, own_part
from hypervisor.controller.poddisks import as_clone, parse_disks
from hypervisor.errors import Conflict, HvError, InvalidInput, NotFound

CHAIN = as_clone(parse_disks("scratch: stats | throttle,iops=9 | integrity", where="x").scratch)


def names(request: dict[str, Any], disk: str = "scratch") -> list[str]:
    return [spec.name for spec in changed(disk, CHAIN, request)]


def test_the_hosts_part_of_a_chain_begins_with_its_clone() -> None:
    assert [spec.name for spec in CHAIN] == ["stats", "throttle", "linkedclone", "integrity"]
    assert own_part(CHAIN) == 2


def test_a_filter_goes_behind_the_pods_own_or_where_it_is_wanted() -> None:
    add = {"op": "filter-add", "kind": "delay", "name": "slow", "settings": {"us": "5"}}
    assert names(add) == ["stats", "throttle", "slow", "linkedclone", "integrity"]
    assert names(add | {"at": 0}) == ["slow", "stats", "throttle", "linkedclone", "integrity"]


def test_settings_that_are_not_named_stay() -> None:
    made = changed("scratch", CHAIN, {"op": "filter-set", "name": "throttle", "settings": {"burst_iops": "3"}})
    assert dict(made[1].settings) == {"iops": "9", "burst_iops": "3"}


def test_a_filter_is_taken_out() -> None:
    assert names({"op": "filter-remove", "name": "stats"}) == ["throttle", "linkedclone", "integrity"]


@pytest.mark.parametrize(
    ("request_", "kind", "says"),
    [
        ({"op": "filter-remove", "name": "linkedclone"}, InvalidInput, "would give wrong data"),
        ({"op": "filter-remove", "name": "integrity"}, InvalidInput, "would give wrong data"),
        ({"op": "filter-set", "name": "linkedclone", "settings": {"base": "file:/x"}}, InvalidInput, "wrong data"),
        ({"op": "filter-set", "name": "throttle", "settings": {"iops": "x"}}, InvalidInput, "a whole number"),
        ({"op": "filter-set", "name": "throttle", "settings": {"iops": 5}}, InvalidInput, "an object of texts"),
        ({"op": "filter-add", "name": "i", "kind": "integrity"}, InvalidInput, "in the annotation of a new pod"),
        ({"op": "filter-add", "name": "e", "kind": "encrypt"}, InvalidInput, "no filter for a pod's disk"),
        ({"op": "filter-add", "name": "stats", "kind": "stats"}, Conflict, "--as NAME"),
        ({"op": "filter-add", "name": "n", "kind": "null", "at": 3}, InvalidInput, "from 0 to 2"),
        ({"op": "filter-add", "name": "n", "kind": "null", "at": True}, InvalidInput, "from 0 to 2"),
        ({"op": "filter-remove", "name": "nobody"}, NotFound, "there are: stats, throttle"),
        ({"op": "filter-remove"}, InvalidInput, "name"),
        ({"op": "resize", "name": "stats"}, InvalidInput, "filter-add, filter-remove or filter-set"),
    ],
)
def test_what_makes_no_sense_is_refused(request_: dict[str, Any], kind: type[HvError], says: str) -> None:
    with pytest.raises(kind, match=says):
        changed("scratch", CHAIN, request_)
