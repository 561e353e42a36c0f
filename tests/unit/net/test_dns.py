"""The name server: real sockets, a real upstream server of the test's own, and questions that no one should ask."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import ClassVar

import dns.asyncquery
import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hypervisor.net.dns.answer import Answerer
from hypervisor.net.dns.forward import Forwarder, host_servers
from hypervisor.net.dns.names import Record
from hypervisor.net.dns.server import OPEN_OF_ONE, NameServer


class Names:
    KNOWN: ClassVar[dict[str, list[Record]]] = {
        "web.own": [Record("A", "10.0.0.1"), Record("AAAA", "fd00::1")],
        "many.own": [Record("A", f"10.1.{i // 250}.{i % 250}") for i in range(500)],
        "alias.own": [Record("CNAME", "web.own.")],
        "out.own": [Record("CNAME", "far.example.")],
        "loop.own": [Record("CNAME", "loop.own.")],
        "inner.own": [],
    }

    def is_own(self, name: str) -> bool:
        return name.endswith(".own")

    def lookup(self, name: str) -> Sequence[Record] | None:
        return self.KNOWN.get(name)


class Upstream(asyncio.DatagramProtocol):
    """Answers each question for a name of ``example`` with one address; others never."""

    def __init__(self) -> None:
        self.asked = 0
        self.enough = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self.asked += 1
        if self.asked == OPEN_OF_ONE:
            self.enough.set()
        query = dns.message.from_wire(data)
        if query.question[0].name.to_text().endswith("example."):
            response = dns.message.make_response(query)
            response.answer.append(dns.rrset.from_text(query.question[0].name, 60, "IN", "A", "192.0.2.5"))
            self.transport.sendto(response.to_wire(), addr)  # type: ignore[attr-defined]


@asynccontextmanager
async def serving(folder: Path, may_ask: bool = True) -> AsyncIterator[tuple[NameServer, Upstream]]:
    (folder / "resolv.conf").write_text("nameserver 127.0.0.1\n")
    transport, upstream = await asyncio.get_running_loop().create_datagram_endpoint(Upstream, ("127.0.0.1", 0))
    port = transport.get_extra_info("sockname")[1]
    answerer = Answerer(Names(), Forwarder(folder / "resolv.conf", port=port))
    try:
        async with NameServer.opened(answerer, lambda *_: may_ask, "127.0.0.1") as server:
            yield server, upstream
    finally:
        transport.close()


async def ask(
    server: NameServer, name: str, kind: str = "A", *, tcp: bool = False, payload: int = 1232
) -> dns.message.Message:
    query = dns.message.make_query(name, kind, use_edns=0, payload=payload)
    by = dns.asyncquery.tcp if tcp else dns.asyncquery.udp
    return await by(query, "127.0.0.1", port=server.port, timeout=20)


def data(answer: dns.message.Message) -> list[str]:
    return sorted(item.to_text() for rrset in answer.answer for item in rrset)


async def test_own_names(tmp_path: Path) -> None:
    async with serving(tmp_path) as (server, upstream):
        assert data(await ask(server, "WEB.own")) == ["10.0.0.1"]
        assert data(await ask(server, "web.own", "AAAA", tcp=True)) == ["fd00::1"]
        nothing = await ask(server, "inner.own")
        assert (nothing.rcode(), nothing.answer) == (dns.rcode.NOERROR, [])
        assert (await ask(server, "nobody.own")).rcode() == dns.rcode.NXDOMAIN
        assert data(await ask(server, "alias.own")) == ["10.0.0.1", "web.own."]
        assert len(data(await ask(server, "loop.own"))) >= 1
        assert upstream.asked == 0


async def test_other_names_are_asked_of_the_hosts_server(tmp_path: Path) -> None:
    async with serving(tmp_path) as (server, _):
        assert data(await ask(server, "www.example")) == ["192.0.2.5"]
        assert data(await ask(server, "out.own")) == ["192.0.2.5", "far.example."]


async def test_no_server_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hypervisor.net.dns.forward.ONE_S", 0.1)
    async with serving(tmp_path) as (server, _):
        assert (await ask(server, "www.elsewhere")).rcode() == dns.rcode.SERVFAIL
        (tmp_path / "resolv.conf").write_text("")
        assert (await ask(server, "www.example")).rcode() == dns.rcode.SERVFAIL


async def test_what_does_not_fit_is_asked_for_again_over_tcp(tmp_path: Path) -> None:
    async with serving(tmp_path) as (server, _):
        for payload in (512, 1232, 65535):
            answer = await ask(server, "many.own", payload=payload)
            assert answer.flags & dns.flags.TC
            assert len(answer.to_wire()) <= max(512, min(payload, 1232))
        assert len(data(await ask(server, "many.own", tcp=True))) == 500


async def test_who_may_not_ask_hears_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path, may_ask=False) as (server, _):
        with pytest.raises(dns.exception.Timeout):
            await dns.asyncquery.udp(dns.message.make_query("web.own", "A"), "127.0.0.1", port=server.port, timeout=0.5)
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        assert await reader.read() == b""
        writer.close()


async def test_one_pod_does_not_keep_others_from_asking(tmp_path: Path) -> None:
    """More questions than a pod may have open, to a server that never answers: no more of them are asked."""
    async with serving(tmp_path) as (server, upstream):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            for i in range(3 * OPEN_OF_ONE):
                client.sendto(dns.message.make_query(f"{i}.never", "A").to_wire(), ("127.0.0.1", server.port))
            async with asyncio.timeout(20):
                await upstream.enough.wait()
            await asyncio.sleep(0.2)  # more would have come by now
        assert upstream.asked == OPEN_OF_ONE


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda q: q.set_opcode(dns.opcode.STATUS), dns.rcode.NOTIMP),
        (lambda q: q.question.clear(), dns.rcode.FORMERR),
        (lambda q: q.question.append(q.question[0]), dns.rcode.FORMERR),
    ],
)
async def test_questions_that_are_none(tmp_path: Path, change: object, code: int) -> None:
    query = dns.message.make_query("web.own", "A")
    change(query)  # type: ignore[operator]
    said = await Answerer(Names(), Forwarder(tmp_path / "none")).answer(query.to_wire(), "udp")
    assert said is not None
    assert said[3] & 0xF == code


@pytest.mark.parametrize("kind", ["ANY", "AXFR"])
async def test_questions_for_everything_are_refused(tmp_path: Path, kind: str) -> None:
    query = dns.message.make_query("web.own", kind)
    wire = await Answerer(Names(), Forwarder(tmp_path / "none")).answer(query.to_wire(), "tcp")
    assert wire is not None
    assert wire[3] & 0xF == dns.rcode.REFUSED


GOOD = dns.message.make_query("web.own", "A", use_edns=0).to_wire()
CHANGED = st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=6)


def mutated(changes: list[tuple[int, int]]) -> bytes:
    wire = bytearray(GOOD)
    for place, value in changes:
        wire[place] = value
    return bytes(wire)


@settings(max_examples=400, deadline=None)
@given(
    st.one_of(st.binary(max_size=200), CHANGED.map(mutated), st.binary(max_size=60).map(lambda tail: GOOD[:12] + tail))
)
def test_whatever_comes_is_answered_in_bounds_or_not_at_all(wire: bytes) -> None:
    said = asyncio.run(Answerer(Names(), Forwarder(Path("/nonexistent"))).answer(wire, "udp"))
    if said is None:
        assert len(wire) < 12 or wire[2] & 0x80
        return
    assert said[:2] == wire[:2]
    assert said[2] & 0x80
    assert len(said) <= 1232


async def test_tcp_connections_that_say_nothing_sensible_end(tmp_path: Path) -> None:
    async with serving(tmp_path) as (server, _):
        for sent in (b"\0", struct.pack(">H", 500) + b"x", struct.pack(">H", 3) + b"abc", b"\0\0"):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(sent)
            writer.write_eof()
            assert await reader.read() == b""
            writer.close()


def test_the_hosts_servers(tmp_path: Path) -> None:
    file = tmp_path / "resolv.conf"
    file.write_text(
        "search a\nnameserver 192.0.2.1\nnameserver\nnameserver fe80::1%eth0\nnameserver 1.1.1.1\nnameserver 2.2.2.2\n"
    )
    assert host_servers(file) == ("192.0.2.1", "fe80::1", "1.1.1.1")
