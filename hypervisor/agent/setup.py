"""``setup``: what makes a freshly booted (or cloned) guest this pod's guest. Once per boot, in this order: clock,
entropy, host name, network, data disk, name files, volumes, shared PID namespace.

Until it has been called, no container can be started; a failure may be mended and the call repeated.
"""

from __future__ import annotations

import binascii
import fcntl
import os
import socket
import struct
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, NamedTuple

from . import storage
from .errors import UNAVAILABLE, AgentError, conflict, from_os, invalid
from .fields import Fields
from .netlink import Netlink
from .spec import parse_name
from .volumes import Volumes, VolumeSpec

_RNDADDENTROPY = 0x40085203
_RNDRESEEDCRNG = 0x5207
_SIOCADDRT = 0x890B
_SIOCSIFFLAGS = 0x8914
_SIOCSIFADDR = 0x8916
_SIOCSIFNETMASK = 0x891C
_IFF_UP_RUNNING = 0x41
_RTF_UP_GATEWAY = 0x3
_CLOCK_SLACK_NS = 1_000_000


class Network(NamedTuple):
    """By hand: no DHCP, so nothing to wait for.

    Either an IPv4 address on a network with a gateway; or `routed`: addresses, each alone on its link, with the host
    (whose hardware address is `peer`, and which has one of `gateways` for each family) as the next hop to everything.
    """

    interface: str
    address: str
    netmask: str
    gateway: str | None
    dns: list[str]
    search: list[str]
    options: tuple[str, ...] = ()
    routed: tuple[str, ...] = ()
    peer: str = ""
    gateways: tuple[str, ...] = ()

    def link(self) -> tuple[object, ...]:
        """What the interface is configured with; the rest is in files."""
        return self[:4] + self[7:]


#: what QEMU's user-mode network is made of, and so most pods'
USER_NETWORK = Network("eth0", "10.0.2.15", "255.255.255.0", "10.0.2.2", [], [])


class Settings(NamedTuple):
    """The checked arguments."""

    hostname: str
    clock_ns: int
    entropy: bytes
    network: Network | None
    data_disk: str | None
    hosts: list[tuple[str, str]]
    volumes: list[VolumeSpec]
    share_process_namespace: bool
    quotas: bool


# ---- arguments -------------------------------------------------------------------------------------------------------


def parse(args: dict[str, Any]) -> Settings:
    """:raises AgentError: Invalid; the message names the field"""
    fields = Fields(args, "setup")
    settings = Settings(
        hostname=_hostname(fields),
        clock_ns=fields.integer("clock_ns", high=2**62),
        entropy=_entropy(fields),
        network=_network(fields),
        data_disk=fields.text("data_disk", None, limit=20),
        hosts=_hosts(fields),
        volumes=[_volume(f) for f in fields.objects("volumes")],
        share_process_namespace=fields.flag("share_process_namespace"),
        quotas=fields.flag("quotas"),
    )
    fields.done()
    return settings


def _hostname(fields: Fields) -> str:
    name: str = fields.text("hostname", limit=64)
    if not name or not name.replace("-", "").replace(".", "").isalnum() or not name.isascii():
        raise invalid(f"setup.hostname: must be letters, digits, dashes and dots, not {name!r}")
    return name


def _entropy(fields: Fields) -> bytes:
    try:
        entropy = binascii.a2b_base64(fields.text("entropy", limit=4096), strict_mode=True)
    except ValueError as e:
        raise invalid(f"setup.entropy: is not base64: {e}") from e
    if not 16 <= len(entropy) <= 512:
        raise invalid(f"setup.entropy: must be 16 to 512 bytes, not {len(entropy)}")
    return entropy


def _ipv4(text: str, where: str) -> str:
    try:
        return socket.inet_ntoa(socket.inet_aton(text)) if text.count(".") == 3 else _bad_address(text, where)
    except OSError:
        return _bad_address(text, where)


def _bad_address(text: str, where: str) -> str:
    raise invalid(f"{where}: must be an IPv4 address, not {text[:80]!r}")


def _network(fields: Fields) -> Network | None:
    value = fields.take("net", dict, "an object or null", None)
    if value is None:
        return None
    net = Fields(value, "setup.net")
    if "addresses" in value:
        return _routed_network(net)
    address, slash, prefix = net.text("address").partition("/")
    if not slash or not prefix.isdigit() or int(prefix) > 32:
        raise invalid("setup.net.address: must be an IPv4 address with its prefix length, as 10.0.2.15/24")
    gateway = net.text("gateway", None)
    network = Network(
        interface=net.text("ifname", "eth0", limit=15),
        address=_ipv4(address, "setup.net.address"),
        netmask=socket.inet_ntoa(struct.pack(">I", (0xFFFFFFFF << (32 - int(prefix))) & 0xFFFFFFFF)),
        gateway=None if gateway is None else _ipv4(gateway, "setup.net.gateway"),
        dns=[_ipv4(server, "setup.net.dns") for server in net.texts("dns", [], limit=64)],
        search=[_domain(name) for name in net.texts("search", [], limit=255)],
        options=tuple(_option(text) for text in net.texts("options", [], limit=63)),
    )
    net.done()
    return network


def _routed_network(net: Fields) -> Network:
    routed = net.texts("addresses", [], limit=64)
    for address in routed:
        _any_address(address, "setup.net.addresses")
    peer = net.text("peer", limit=17)
    if len(peer.split(":")) != 6 or not all(len(p) == 2 and set(p) <= set("0123456789abcdef") for p in peer.split(":")):
        raise invalid("setup.net.peer: must be a hardware address, as ee:ee:ee:ee:ee:ee")
    if not routed:
        raise invalid("setup.net.addresses: must not be empty")
    gateways = net.texts("gateways", [], limit=64)
    for gateway in gateways:
        _any_address(gateway, "setup.net.gateways")
    if any(_gateway_of(address, gateways) is None for address in routed):
        raise invalid("setup.net.gateways: must have one of each family that the pod has addresses of")
    network = Network(
        interface=net.text("ifname", "eth0", limit=15),
        address=routed[0],
        netmask="",
        gateway=None,
        dns=[_ipv4(server, "setup.net.dns") for server in net.texts("dns", [], limit=64)],
        search=[_domain(name) for name in net.texts("search", [], limit=255)],
        options=tuple(_option(text) for text in net.texts("options", [], limit=63)),
        routed=tuple(routed),
        peer=peer,
        gateways=tuple(gateways),
    )
    net.done()
    return network


def _gateway_of(address: str, gateways: Iterable[str]) -> str | None:
    """The next hop of that address's family."""
    return next((gateway for gateway in gateways if (":" in gateway) == (":" in address)), None)


def _any_address(text: str, where: str) -> None:
    family = socket.AF_INET6 if ":" in text else socket.AF_INET
    try:
        socket.inet_pton(family, text)
    except OSError:
        raise invalid(f"{where}: must be IP addresses, not {text[:80]!r}") from None


def _domain(name: str) -> str:
    if not name.isprintable() or not name or " " in name:
        raise invalid(f"setup.net.search: must be domain names, not {name!r}")
    return name


def _option(text: str) -> str:
    if not text or not text.isprintable() or " " in text:
        raise invalid(f"setup.net.options: must be options of a resolver, as ndots:5, not {text!r}")
    return text


def _hosts(fields: Fields) -> list[tuple[str, str]]:
    rows = fields.take("hosts", list, "a list of [address, name] pairs", [])
    for row in rows:
        plain = isinstance(row, list) and len(row) == 2 and all(isinstance(x, str) and x.isprintable() for x in row)
        if not plain or not row[0] or not row[1] or " " in row[0]:
            raise invalid(f"setup.hosts: must be a list of [address, name] pairs, not {str(row)[:80]}")
    return [(row[0], row[1]) for row in rows]


def _volume(fields: Fields) -> VolumeSpec:
    spec = VolumeSpec(
        name=parse_name(fields),
        medium=fields.choice("medium", ("disk", "memory"), "disk"),
        size_bytes=fields.integer("size_bytes", None, low=4096),
        group=fields.integer("group", None, high=2**32 - 2),
    )
    fields.done()
    return spec


# ---- doing it --------------------------------------------------------------------------------------------------------


def set_clock(wanted_ns: int) -> None:
    """Sets the wall clock, unless it is within a millisecond already."""
    if abs(time.time_ns() - wanted_ns) > _CLOCK_SLACK_NS:
        time.clock_settime_ns(time.CLOCK_REALTIME, wanted_ns)


def shift_clock(add_ns: int) -> None:
    """Moves the wall clock: unlike a time of day, a difference does not age on its way here."""
    if add_ns:
        time.clock_settime_ns(time.CLOCK_REALTIME, time.time_ns() + add_ns)


def add_entropy(entropy: bytes) -> None:
    """Credits `entropy` and makes the kernel use it at once: clones of one template must not share random numbers."""
    fd = os.open("/dev/urandom", os.O_WRONLY | os.O_CLOEXEC)
    try:
        padded = entropy + bytes(-len(entropy) % 4)
        fcntl.ioctl(fd, _RNDADDENTROPY, struct.pack("ii", len(entropy) * 8, len(padded)) + padded)
        fcntl.ioctl(fd, _RNDRESEEDCRNG)
    finally:
        os.close(fd)


def _sockaddr(address: str) -> bytes:
    return struct.pack("=HH4s8x", socket.AF_INET, 0, socket.inet_aton(address))


def _default_route(gateway: str) -> bytes:
    """struct rtentry (linux/route.h), 120 bytes on 64-bit machines."""
    anywhere = _sockaddr("0.0.0.0")
    head = struct.pack("@L16s16s16sH", 0, anywhere, _sockaddr(gateway), anywhere, _RTF_UP_GATEWAY)
    return head.ljust(120, b"\0")


def configure_network(network: Network) -> None:
    """Address, netmask, up, default route; raises OSError."""
    if network.routed:
        configure_routed(network)
        return
    name = network.interface.encode()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as s:
        fcntl.ioctl(s, _SIOCSIFADDR, struct.pack("16s16s8x", name, _sockaddr(network.address)))
        fcntl.ioctl(s, _SIOCSIFNETMASK, struct.pack("16s16s8x", name, _sockaddr(network.netmask)))
        fcntl.ioctl(s, _SIOCSIFFLAGS, struct.pack("16sH22x", name, _IFF_UP_RUNNING))
        if network.gateway is not None:
            with suppress(FileExistsError):  # setup is being repeated
                fcntl.ioctl(s, _SIOCADDRT, _default_route(network.gateway))


def configure_routed(network: Network) -> None:
    """Every address alone on the link; everything goes to the host; raises OSError."""
    with Netlink(network.interface) as netlink:
        netlink.up()
        for address in network.routed:
            v6 = ":" in address
            gateway = str(_gateway_of(address, network.gateways))
            netlink.add_address(address, 128 if v6 else 32)
            netlink.add_neighbour(gateway, network.peer)
            if not v6:
                netlink.add_link_route(gateway)
            netlink.add_default_route(gateway, address)


def name_files(settings: Settings) -> dict[str, str]:
    """/etc/hosts, /etc/hostname and /etc/resolv.conf, which all containers of the pod share."""
    address = settings.network.address if settings.network else "127.0.1.1"
    short = settings.hostname.partition(".")[0]
    names = settings.hostname if short == settings.hostname else f"{settings.hostname} {short}"
    rows = [
        ("127.0.0.1", "localhost"),
        ("::1", "localhost ip6-localhost ip6-loopback"),
        (address, names),
        *settings.hosts,
    ]
    resolv = ""
    if settings.network is not None:
        resolv = "".join(f"nameserver {server}\n" for server in settings.network.dns)
        if settings.network.search:
            resolv = f"search {' '.join(settings.network.search)}\n{resolv}"
        if settings.network.options:
            resolv += f"options {' '.join(settings.network.options)}\n"
    return {
        "hosts": "".join(f"{ip}\t{name}\n" for ip, name in rows),
        "hostname": f"{settings.hostname}\n",
        "resolv.conf": resolv,
    }


def _write_name_files(settings: Settings) -> None:
    """On the data disk for the containers, which may write to them, and in /run for the agent's own root."""
    for name, text in name_files(settings).items():
        for directory in (f"{storage.DATA}/etc", storage.RUN):
            storage.write_whole(f"{directory}/{name}", text.encode())


def unconfigure_network(interface: str) -> None:
    """Takes the address away, and with it the routes; raises OSError."""
    name = interface.encode()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as s:
        fcntl.ioctl(s, _SIOCSIFADDR, struct.pack("16s16s8x", name, _sockaddr("0.0.0.0")))
        fcntl.ioctl(s, _SIOCSIFFLAGS, struct.pack("16sH22x", name, 0))


class Setup:
    """Does it, once."""

    def __init__(self, volumes: Volumes) -> None:
        self.done = False
        self.network: Network | None = None  # as it has been configured
        self._busy = False
        self._volumes = volumes

    async def run(self, settings: Settings) -> None:
        """:raises AgentError: Conflict when it was done already; whatever fails"""
        if self.done or self._busy:
            raise conflict("setup: was called before; a guest is set up once per boot")
        self._busy = True
        try:
            self._volumes.forget()
            set_clock(settings.clock_ns)
            add_entropy(settings.entropy)
            socket.sethostname(settings.hostname)
            self.connect(settings.network)
            if not os.path.lexists(storage.SHARED_MEMORY):  # PID 1 has made them all long ago
                storage.make_directories()
            await storage.mount_data(settings.data_disk, quotas=settings.quotas)
            self._volumes.quotas.on = settings.quotas
            _write_name_files(settings)
            for volume in settings.volumes:
                self._volumes.add(volume)
            self.done = True
        except OSError as e:
            raise from_os("setup", e) from e
        finally:
            self._busy = False

    def renew(self, settings: Settings) -> None:
        """What a guest that went on from a snapshot must not share with whatever else goes on from it: clock, entropy,
        host name, addresses. Disk and volumes stay.

        :raises AgentError: whatever fails
        """
        try:
            set_clock(settings.clock_ns)
            add_entropy(settings.entropy)
            socket.sethostname(settings.hostname)
            self.connect(settings.network)
            _write_name_files(settings)
        except OSError as e:
            raise from_os("renew", e) from e

    def connect(self, network: Network | None) -> None:
        """Configures the network, unless it is so already: a template does it for its clones.

        :raises AgentError: Unavailable
        """
        before = self.network
        if before is not None and network is not None and before.link() == network.link():
            return
        try:
            if before is not None:
                self.network = None
                unconfigure_network(before.interface)
            if network is not None:
                configure_network(network)
                self.network = network
        except OSError as e:
            where = f"network {(network or before or USER_NETWORK).interface}"
            raise AgentError(UNAVAILABLE, f"{where}: cannot be configured: {e.strerror}") from e
