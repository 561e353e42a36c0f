"""Keeps the kernel as it should be: brings the packet filter to a table, and looks whether somebody has been at it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import structlog
from pyroute2.netlink.exceptions import NetlinkError

from hypervisor.errors import HvError
from hypervisor.net import firewall
from hypervisor.net.devices import Devices
from hypervisor.net.pods import ConnectedPod
from hypervisor.net.table import Table, change, whole

MTU = 1500
TAP, TABLE = "pv", "podvisor-"
"""What the names of all hosts' taps and tables begin with."""

log = structlog.get_logger(__name__)


class Upkeep:
    """One host's table and links. For one task.

    :param table: the table's name
    :param taps: what the names of this host's taps begin with
    """

    def __init__(self, table: str, taps: str) -> None:
        self._table = table
        self._taps = taps
        self._applied: Table | None = None

    @property
    def is_whole(self) -> bool:
        """Whether the kernel has what it was given last, as far as is known."""
        return self._applied is not None

    def forget(self) -> None:
        """The next table is brought whole."""
        self._applied = None

    async def bring(self, table: Table) -> None:
        """Makes the kernel's table this one, by what differs. Raises `Unavailable`: the old one is in force."""
        before, self._applied = self._applied, None
        if before is not None:
            try:
                commands = await asyncio.to_thread(change, before, table)
                if commands:
                    await firewall.apply(commands)
                self._applied = table
                return
            except HvError as error:  # somebody else has been at the table
                log.warning("packet filter is made anew", reason=str(error))
        await firewall.apply(await asyncio.to_thread(whole, table))
        self._applied = table

    async def look(self, pods: Sequence[ConnectedPod]) -> list[str]:
        """Puts links right, and forgets a table that was changed by hand; uids of pods whose taps are gone."""
        try:
            if self._applied is not None and (lacking := await firewall.missing(self._applied)):
                log.warning("packet filter was changed by hand; it is put back", lacking=lacking[:5])
                self._applied = None
        except HvError as error:
            log.warning("packet filter cannot be looked at", reason=str(error))
            self._applied = None
        try:
            return await _repair({pod.tap: pod for pod in pods}) if pods else []
        except (HvError, OSError, NetlinkError) as error:
            log.warning("taps and routes cannot be looked at", reason=str(error))
            return []

    async def sweep(self) -> None:
        """Removes the tables of hosts that were killed and whose VMs have gone. A host that lives puts its own back."""
        try:
            async with Devices.opened() as devices:
                alive = {TABLE + tap.removeprefix(TAP)[:4] for tap in await devices.taps(TAP)}
            for table in await firewall.tables():
                if table.startswith(TABLE) and table != self._table and table not in alive:
                    await firewall.remove(table)
        except HvError as error:
            log.warning("packet filters of hosts that are gone were not looked for", reason=str(error))

    async def take_back(self) -> None:
        """The packet filter stays for as long as a pod's VM runs, also when no daemon does."""
        async with Devices.opened() as devices:
            if not await devices.taps(self._taps):
                await firewall.remove(self._table)


async def _repair(pods: dict[str, ConnectedPod]) -> list[str]:
    """Routes and addresses that were taken away come back. A tap cannot: QEMU has it."""
    async with Devices.opened() as devices:
        broken, gone = await devices.lacking({tap: pod.addresses for tap, pod in pods.items()})
        for tap in sorted(broken):
            log.warning("a pod's link was changed by hand; it is put back", tap=tap)
            await devices.connect(tap, pods[tap].mac, pods[tap].addresses, mtu=MTU)
    return [pods[tap].uid for tap in sorted(gone)]
