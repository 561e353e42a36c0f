"""One question, one answer: bytes in, bytes out. Whatever comes in, nothing is raised and an answer is bounded.

Messages are parsed and made by dnspython. Sources: RFC 1035, RFC 6891 (sizes), RFC 8482 (questions for everything).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Literal

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rrset
import structlog

from hypervisor.errors import HvError
from hypervisor.net.dns.forward import Forwarder
from hypervisor.net.dns.names import TTL_S, Names, Record

Transport = Literal["udp", "tcp"]
UDP_LEAST, UDP_MOST, TCP_MOST = 512, 1232, 65535
LONGEST_CHAIN = 8
_HEADER = 12
_REFUSED_TYPES = frozenset((dns.rdatatype.ANY, dns.rdatatype.AXFR, dns.rdatatype.IXFR))

log = structlog.get_logger(__name__)


class Answerer:
    """Answers from the cluster's names and, about others, with what the host's servers say."""

    def __init__(self, names: Names, forwarder: Forwarder) -> None:
        self._names = names
        self._forwarder = forwarder

    async def answer(self, wire: bytes, transport: Transport) -> bytes | None:
        """The answer; None: what came is no question and gets none."""
        if len(wire) < _HEADER or wire[2] & 0x80:  # an answer: to answer that could go on for ever
            return None
        try:
            query = dns.message.from_wire(wire)
        except Exception:  # hostile input through a library: an answer all the same, and the server goes on
            return _failure(wire, dns.rcode.FORMERR)
        try:
            return _wire(query, await self._respond(query), transport)
        except Exception:
            log.exception("a question was not answered")
            return _failure(wire, dns.rcode.SERVFAIL)

    async def _respond(self, query: dns.message.Message) -> dns.message.Message:
        response = dns.message.make_response(query, recursion_available=True)
        if query.opcode() != dns.opcode.QUERY:
            response.set_rcode(dns.rcode.NOTIMP)
        elif len(query.question) != 1:
            response.set_rcode(dns.rcode.FORMERR)
        elif query.question[0].rdclass != dns.rdataclass.IN or query.question[0].rdtype in _REFUSED_TYPES:
            response.set_rcode(dns.rcode.REFUSED)
        else:
            await self._fill(response, query.question[0].name, query.question[0].rdtype)
        return response

    async def _fill(self, response: dns.message.Message, name: dns.name.Name, wanted: dns.rdatatype.RdataType) -> None:
        """Follows names that stand for others, also to where the host's servers have to be asked."""
        for _ in range(LONGEST_CHAIN):
            text = name.to_text(omit_final_dot=True).lower()
            if not self._names.is_own(text):
                await self._forward(response, name, wanted)
                return
            response.flags |= dns.flags.AA
            found = self._names.lookup(text)
            if found is None:
                response.set_rcode(dns.rcode.NXDOMAIN)
                return
            alias = [record for record in found if record.type == "CNAME"]
            _add(response, name, alias or [r for r in found if dns.rdatatype.from_text(r.type) == wanted])
            if not alias or wanted == dns.rdatatype.CNAME:
                return
            name = dns.name.from_text(alias[0].data)

    async def _forward(
        self, response: dns.message.Message, name: dns.name.Name, wanted: dns.rdatatype.RdataType
    ) -> None:
        try:
            answer = await self._forwarder.ask(dns.message.make_query(name, wanted))
        except HvError as error:
            log.info("a name is not resolved", reason=str(error))
            response.set_rcode(dns.rcode.SERVFAIL)
            return
        response.set_rcode(answer.rcode())
        response.answer.extend(answer.answer)
        response.authority.extend(answer.authority)


def _add(response: dns.message.Message, name: dns.name.Name, records: Sequence[Record]) -> None:
    by_type: dict[str, list[str]] = {}
    for record in records:
        by_type.setdefault(record.type, []).append(record.data)
    for kind, data in by_type.items():
        response.answer.append(dns.rrset.from_text_list(name, TTL_S, "IN", kind, data))


def _wire(query: dns.message.Message, response: dns.message.Message, transport: Transport) -> bytes:
    """Over UDP no more than the guest said it takes; what is left out is marked so, and asked for again over TCP."""
    most = TCP_MOST if transport == "tcp" else min(max(query.payload, UDP_LEAST), UDP_MOST)
    try:
        return bytes(response.to_wire(max_size=most))
    except dns.exception.TooBig:
        cut = dns.message.make_response(query, recursion_available=True)
        cut.set_rcode(response.rcode())
        cut.flags |= dns.flags.TC
        return bytes(cut.to_wire(max_size=most))


def _failure(wire: bytes, code: int) -> bytes:
    """An answer to what could not be read: the header alone."""
    number, flags = struct.unpack_from(">HH", wire)
    return struct.pack(">HHHHHH", number, 0x8000 | (flags & 0x7900) | code, 0, 0, 0, 0)
