"""CIDs and users of VMs: never two owners at a time."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace

import pytest

from hypervisor.errors import ResourceExhausted
from hypervisor.vmm.capabilities import HostCapabilities
from hypervisor.vmm.identity import FIRST_CID, IdentityPool, running_uids


def test_distinct_while_held(capabilities: HostCapabilities) -> None:
    pool = IdentityPool(capabilities)
    taken = [pool.take() for _ in range(4)]
    assert len({i.cid for i in taken}) == len({i.uid for i in taken}) == 4
    assert all(i.cid >= FIRST_CID for i in taken)
    with pytest.raises(ResourceExhausted, match="all 4 users"):
        pool.take()
    pool.release(taken[2])
    pool.release(taken[2])
    assert pool.take().uid == taken[2].uid


def test_an_adopted_vms_identity_is_taken(capabilities: HostCapabilities) -> None:
    earlier = IdentityPool(capabilities).take()
    pool = IdentityPool(capabilities)
    pool.claim(earlier)
    others = [pool.take() for _ in range(3)]
    assert earlier.uid not in {i.uid for i in others}
    assert earlier.cid not in {i.cid for i in others}


def test_no_users_for_an_ordinary_user(capabilities: HostCapabilities) -> None:
    assert IdentityPool(replace(capabilities, uid_range=None)).take().uid is None


def test_own_uid_is_running() -> None:
    assert os.getuid() in running_uids()


@pytest.mark.root
def test_a_uid_is_not_reused_while_a_process_has_it(capabilities: HostCapabilities) -> None:
    first = 0x70000000
    with subprocess.Popen(["sleep", "100"], user=first) as process:
        try:
            pool = IdentityPool(replace(capabilities, uid_range=(first, first + 1)))
            assert pool.take().uid == first + 1
            with pytest.raises(ResourceExhausted):
                pool.take()
        finally:
            process.kill()
    assert pool.take().uid == first
