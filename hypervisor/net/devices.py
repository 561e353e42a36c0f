"""Taps and routes of a host, over netlink.

A pod's tap is a point-to-point link between the host and its guest, with no bridge: the host routes one address to each
tap. So every packet of a pod is routed by the host and passes its packet filter; a guest sees no other guest's frames,
and what MAC address it uses matters to nobody: clones of one template keep their template's.

    guest:  eth0 10.88.0.5/32, default via 169.254.1.1 (on link), its neighbour entry fixed
    host:   tap 169.254.1.1/32, route 10.88.0.5/32 to the tap, its neighbour entry fixed

A tap is not persistent: it lives as long as somebody has its descriptor, which is the pod's QEMU. With QEMU the tap,
its address and its route are gone, also after ``kill -9`` of everything.

Source of the link-local next hop: Calico's routed workload interfaces.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from pyroute2 import AsyncIPRoute
from pyroute2.netlink.exceptions import NetlinkError

from hypervisor.errors import HostUnfit, Unavailable
from hypervisor.net.addresses import GATEWAY4, GATEWAY6, HOST_MAC, Address

_NUD_PERMANENT, _IFF_UP = 0x80, 1


class Devices:
    """The kernel's links, addresses and routes. For one event loop; `opened` makes it."""

    def __init__(self, netlink: Any) -> None:
        self._netlink = netlink

    @classmethod
    @asynccontextmanager
    async def opened(cls) -> AsyncIterator[Devices]:
        """A netlink socket for the length of a block."""
        async with AsyncIPRoute() as netlink:
            yield cls(netlink)

    async def index_of(self, name: str) -> int | None:
        """A link's index, or None."""
        found = await self._netlink.link_lookup(ifname=name)
        return int(found[0]) if found else None

    async def taps(self, prefix: str) -> list[str]:
        """The names of all links that begin so."""
        names = [link.get_attr("IFLA_IFNAME", "") async for link in await self._netlink.link("dump")]
        return sorted(name for name in names if name.startswith(prefix))

    async def connect(self, tap: str, mac: str, addresses: tuple[Address, ...], *, mtu: int) -> None:
        """Gives a tap its gateway address, and each of the pod's addresses a route to it. May be repeated.

        :param mac: the guest's
        :raises Unavailable: the tap is gone, or the kernel refuses
        """
        index = await self.index_of(tap)
        if index is None:
            raise Unavailable(f"tap {tap} is gone: its QEMU ended")
        _set_tap_options(tap)
        try:
            await self._netlink.link("set", index=index, address=HOST_MAC, mtu=mtu, state="up")
            await self._netlink.addr("replace", index=index, address=str(GATEWAY4), prefixlen=32, scope=253)
            for address in addresses:
                await self._connect_address(index, mac, address)
        except NetlinkError as error:
            raise Unavailable(f"cannot set up tap {tap}: {error}") from error

    async def lacking(self, wanted: Mapping[str, tuple[Address, ...]]) -> tuple[set[str], set[str]]:
        """The taps that lack a route, an address or are down; and those that are not there.

        :param wanted: the pods' addresses by their taps
        """
        links = {
            link.get_attr("IFLA_IFNAME", ""): (int(link["index"]), bool(link["flags"] & _IFF_UP))
            async for link in await self._netlink.link("dump")
        }
        routes = {
            (route.get_attr("RTA_DST"), route.get_attr("RTA_OIF"))
            for family in (socket.AF_INET, socket.AF_INET6)
            async for route in await self._netlink.route("dump", family=family)
        }
        gateways = {
            int(found["index"])
            async for found in await self._netlink.addr("dump", family=socket.AF_INET)
            if found.get_attr("IFA_ADDRESS") == str(GATEWAY4)
        }
        gone = {tap for tap in wanted if tap not in links}
        broken = set()
        for tap in wanted.keys() - gone:
            index, up = links[tap]
            if not up or index not in gateways or any((str(a), index) not in routes for a in wanted[tap]):
                broken.add(tap)
        return broken, gone

    async def _connect_address(self, index: int, mac: str, address: Address) -> None:
        length = address.max_prefixlen
        if address.version == 6:
            await self._netlink.addr("replace", index=index, address=str(GATEWAY6), prefixlen=64)
        await self._netlink.neigh("replace", dst=str(address), lladdr=mac, ifindex=index, state=_NUD_PERMANENT)
        await self._netlink.route(
            "replace", dst=f"{address}/{length}", oif=index, scope=253 if address.version == 4 else 0
        )


def _set_tap_options(tap: str) -> None:
    """What a guest sends is routed, also to a service's endpoint on the host's loopback; it says nothing of routes."""
    for option, value in (
        ("ipv4/conf/{}/forwarding", "1"),
        ("ipv4/conf/{}/route_localnet", "1"),
        ("ipv4/conf/{}/rp_filter", "0"),
        ("ipv6/conf/{}/accept_ra", "0"),
        ("ipv6/conf/{}/accept_dad", "0"),
    ):
        _write(option.format(tap), value)


def enable_forwarding() -> None:
    """Lets this host route. Raises `HostUnfit` when it may not."""
    for option in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
        if not _write(option, "1") and option.startswith("ipv4"):
            raise HostUnfit(
                "pods' packets are routed by the host, and net.ipv4.ip_forward cannot be set: run hostd as root"
            )


def _write(option: str, value: str) -> bool:
    path = Path("/proc/sys/net") / option
    try:
        if path.read_text().strip() != value:
            path.write_text(value)
    except OSError:
        return False  # no IPv6 here, or the tap went
    return True
