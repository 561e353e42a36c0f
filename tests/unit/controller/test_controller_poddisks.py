"""The annotation that names the chains of a pod's disks."""

from __future__ import annotations

import pytest

from hypervisor.controller.poddisks import parse_disks
from hypervisor.errors import InvalidInput
from hypervisor.iofilter.spec import FilterSpec

WHERE = 'metadata.annotations["hv.io/filters"]'


def test_a_pod_without_the_annotation_has_its_hosts_disks() -> None:
    disks = parse_disks(None, where=WHERE)
    assert (disks.scratch, disks.image, disks.served) == ((), (), False)


@pytest.mark.parametrize("text", ["", "image:", " ; "])
def test_an_annotation_without_filters_still_asks_for_vmx(text: str) -> None:
    assert parse_disks(text, where=WHERE).served


def test_one_chain_is_for_all_disks_and_a_named_one_for_its_own() -> None:
    both = parse_disks("stats|throttle,iops=500", where=WHERE)
    assert (
        both.scratch
        == both.image
        == (FilterSpec("stats", "stats"), FilterSpec("throttle", "throttle", (("iops", "500"),)))
    )
    each = parse_disks("scratch: error,types=read,write,skip=9 ; image: stats | stats", where=WHERE)
    assert each.scratch == (FilterSpec("error", "error", (("types", "read,write"), ("skip", "9"))),)
    assert [spec.name for spec in each.image] == ["stats", "stats-2"]


def test_a_filter_with_a_state_has_a_file_of_its_own() -> None:
    (spec,) = parse_disks("scratch: integrity", where=WHERE).scratch
    assert spec.settings == (("state", "./scratch.integrity.state"),)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nothing", "'nothing' is no filter for a pod's disk; there are delay, error"),
        ("linkedclone,base=file:/etc/shadow", "is no filter for a pod's disk"),
        ("scratch: integrity | throttle,iops=3", r"throttle \(inspection\) cannot come after integrity"),
        ("throttle", "neither iops nor bytes is set"),
        ("delay,us=soon", "scratch: us=soon: a whole number is wanted"),
        ("trace,records=7", "must be from 16"),
        ("stats,iops", "'iops' is no setting"),
        ("integrity", "integrity is for the scratch disk"),
        ("scratch: integrity,state=./mine", "a pod's filters name no files"),
        ("data: stats", "'data' is no disk; there are scratch and image"),
        ("image: stats; image: trace", "'image' is named twice"),
        ("|".join(["null"] * 17), "at most 16"),
    ],
)
def test_what_makes_no_sense_is_refused_and_named(text: str, says: str) -> None:
    with pytest.raises(InvalidInput, match=says) as refused:
        parse_disks(text, where=WHERE)
    assert refused.value.where == WHERE
