"""The few rtnetlink requests that a pod's network needs, by hand: the standard library has none, and a helper program
would cost 100 ms under emulation.

A request is one message that is answered with an acknowledgement; `OSError` is what the kernel said. "Exists already"
is no error: a setup may be repeated. Sources: rtnetlink(7), linux/rtnetlink.h, linux/if_addr.h, linux/neighbour.h.
"""

from __future__ import annotations

import errno
import os
import socket
import struct

_ACK, _REQUEST, _CREATE, _REPLACE = 4, 1, 0x400, 0x100
_NEWLINK, _NEWADDR, _DELADDR, _NEWROUTE, _NEWNEIGH = 16, 20, 21, 24, 28
_ERROR = 2
_IFF_UP = 1
_IFLA_MTU = 4
_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS = 1, 2, 8
_IFA_F_NODAD = 0x02
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PREFSRC = 1, 4, 5, 7
_NDA_DST, _NDA_LLADDR = 1, 2
_NUD_PERMANENT = 0x80
_RT_TABLE_MAIN, _RTPROT_BOOT, _RTN_UNICAST = 254, 3, 1
_SCOPE_GLOBAL, _SCOPE_LINK = 0, 253
_ANSWER = 8192


def _family(address: str) -> int:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _bytes(address: str) -> bytes:
    return socket.inet_pton(_family(address), address)


def _attribute(kind: int, value: bytes) -> bytes:
    padded = value + b"\0" * (-len(value) % 4)
    return struct.pack("=HH", 4 + len(value), kind) + padded


class Netlink:
    """One socket to the kernel, for one interface. Closed by ``with``. Calls block for microseconds."""

    def __init__(self, interface: str) -> None:
        self.index = socket.if_nametoindex(interface)
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        self._socket.bind((0, 0))

    def __enter__(self) -> Netlink:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def _request(self, kind: int, flags: int, body: bytes) -> None:
        head = struct.pack("=IHHII", 16 + len(body), kind, _REQUEST | _ACK | flags, 1, 0)
        self._socket.send(head + body)
        answer = self._socket.recv(_ANSWER)
        _, answered, _, _, _, code = struct.unpack_from("=IHHIIi", answer)
        if answered == _ERROR and code and -code != errno.EEXIST:
            raise OSError(-code, os.strerror(-code))

    def up(self, mtu: int | None = None) -> None:
        """Brings the interface up."""
        body = struct.pack("=BxHiII", socket.AF_UNSPEC, 0, self.index, _IFF_UP, _IFF_UP)
        if mtu is not None:
            body += _attribute(_IFLA_MTU, struct.pack("=I", mtu))
        self._request(_NEWLINK, 0, body)

    def add_address(self, address: str, prefix: int) -> None:
        """Gives the interface an address; no time is lost on looking for duplicates, the host gave it."""
        self._address(_NEWADDR, _CREATE | _REPLACE, address, prefix)

    def remove_address(self, address: str, prefix: int) -> None:
        """Takes one away, with its routes. Raises OSError when it is not there."""
        self._address(_DELADDR, 0, address, prefix)

    def _address(self, kind: int, flags: int, address: str, prefix: int) -> None:
        raw = _bytes(address)
        body = struct.pack("=BBBBI", _family(address), prefix, 0, _SCOPE_GLOBAL, self.index)
        body += _attribute(_IFA_LOCAL, raw) + _attribute(_IFA_ADDRESS, raw)
        if _family(address) == socket.AF_INET6:
            body += _attribute(_IFA_FLAGS, struct.pack("=I", _IFA_F_NODAD))
        self._request(kind, flags, body)

    def add_neighbour(self, address: str, mac: str) -> None:
        """A peer on the link whose hardware address is known, so that nobody has to ask for it."""
        body = struct.pack("=BxHiHBB", _family(address), 0, self.index, _NUD_PERMANENT, 0, _RTN_UNICAST)
        body += _attribute(_NDA_DST, _bytes(address)) + _attribute(_NDA_LLADDR, bytes.fromhex(mac.replace(":", "")))
        self._request(_NEWNEIGH, _CREATE | _REPLACE, body)

    def add_link_route(self, address: str) -> None:
        """One address that is on this link though no address of ours is in its range."""
        raw = _bytes(address)
        self._route(address, len(raw) * 8, _SCOPE_LINK, _attribute(_RTA_DST, raw))

    def add_default_route(self, gateway: str, source: str) -> None:
        """Everything else goes to `gateway`, from `source`."""
        attributes = _attribute(_RTA_GATEWAY, _bytes(gateway)) + _attribute(_RTA_PREFSRC, _bytes(source))
        self._route(gateway, 0, _SCOPE_GLOBAL, attributes)

    def _route(self, address: str, length: int, scope: int, attributes: bytes) -> None:
        family = _family(address)
        head = struct.pack("=BBBBBBBBI", family, length, 0, 0, _RT_TABLE_MAIN, _RTPROT_BOOT, scope, _RTN_UNICAST, 0)
        body = head + attributes + _attribute(_RTA_OIF, struct.pack("=i", self.index))
        self._request(_NEWROUTE, _CREATE | _REPLACE, body)
