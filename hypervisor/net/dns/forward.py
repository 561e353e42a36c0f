"""Questions that are not about the cluster go to the host's own name servers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import dns.asyncquery
import dns.exception
import dns.message

from hypervisor.errors import Unavailable

RESOLV_CONF = Path("/etc/resolv.conf")
ONE_S, ALL_S = 2.0, 5.0
"""Patience with one server, and with all of them together: below what a guest's resolver has."""
AT_ONCE = 128
_MOST_SERVERS = 3


def host_servers(file: Path = RESOLV_CONF) -> tuple[str, ...]:
    """The host's name servers. Reads a small file; empty when there is none."""
    try:
        lines = file.read_text(errors="replace").splitlines()
    except OSError:
        return ()
    words = (line.split() for line in lines)
    return tuple(w[1].partition("%")[0] for w in words if len(w) > 1 and w[0] == "nameserver")[:_MOST_SERVERS]


class Forwarder:
    """Asks the host's servers in their order; so many questions at once and no more."""

    def __init__(self, file: Path = RESOLV_CONF, *, port: int = 53, at_once: int = AT_ONCE) -> None:
        self._file = file
        self._port = port
        self._free = asyncio.Semaphore(at_once)

    async def ask(self, question: dns.message.Message) -> dns.message.Message:
        """A server's answer to the first question of a message.

        :raises Unavailable: no server answers in time, or too many questions wait
        """
        if self._free.locked():
            raise Unavailable("too many questions at once")
        async with self._free:
            servers = await asyncio.to_thread(host_servers, self._file)
            try:
                async with asyncio.timeout(ALL_S):
                    return await self._first(question, servers)
            except TimeoutError:
                raise Unavailable("the host's name servers do not answer in time") from None

    async def _first(self, question: dns.message.Message, servers: Sequence[str]) -> dns.message.Message:
        asked = question.question[0]
        error: Exception | None = None
        for server in servers:
            # A message of one's own: nothing of the guest's but its question goes out, under a number it cannot know.
            query = dns.message.make_query(asked.name, asked.rdtype, asked.rdclass, use_edns=0, payload=1232)
            try:
                answer, _ = await dns.asyncquery.udp_with_fallback(
                    query, server, timeout=ONE_S, port=self._port, ignore_unexpected=True, ignore_errors=True
                )
                return answer
            except (OSError, EOFError, dns.exception.DNSException) as failed:
                error = failed
        raise Unavailable("the host has no name server that answers") from error
