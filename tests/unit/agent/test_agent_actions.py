"""The host's side of probes over a real agent and real servers: TLS through ``dial``, and redirects."""

from __future__ import annotations

import asyncio
import datetime
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from agent_under_test import AgentUnderTest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from hypervisor.controller.actions import Actions
from hypervisor.controller.spec import HttpAction
from hypervisor.introspect.agent import AgentClient, AgentStream
from hypervisor.vsock.address import UnixVsock


class Direct(AgentClient):
    """A client of an agent that listens on a Unix socket, with no vsock device in between."""

    def __init__(self, path: Path) -> None:
        super().__init__(UnixVsock(path))
        self._path = path

    async def _connect(self) -> AgentStream:
        return AgentStream(*await asyncio.open_unix_connection(self._path))


@pytest.fixture
def actions(agent: AgentUnderTest, monkeypatch: pytest.MonkeyPatch) -> Actions:
    monkeypatch.setattr(agent.agent.engine, "running", lambda _name: None)
    return Actions(Direct(agent.path), "main", "127.0.0.1")


def certificate(folder: Path) -> ssl.SSLContext:
    """A server's, for a name that nobody asks for and long expired: nothing of it is to be verified."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "nobody")])
    began = datetime.datetime(2020, 1, 1)
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    made = made.serial_number(1).not_valid_before(began).not_valid_after(began + datetime.timedelta(1))
    text = made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    plain = serialization.NoEncryption()
    text += key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    (folder / "cert.pem").write_bytes(text)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem")
    return context


@asynccontextmanager
async def serving(answers: dict[str, bytes], context: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """A server that answers by path; its port."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        writer.write(answers[head.split()[1].decode()])
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


def to(location: str) -> bytes:
    return f"HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
BUSY = b"HTTP/1.1 503 Busy\r\nContent-Length: 20000\r\n\r\n" + b"x" * 20000


async def test_https(actions: Actions, tmp_path: Path) -> None:
    async with serving({"/ok": OK, "/busy": BUSY}, certificate(tmp_path)) as port:
        assert (await actions.run(HttpAction(port, "/ok", https=True), 10)).ok
        busy = await actions.run(HttpAction(port, "/busy", https=True), 10)
    assert (busy.ok, busy.message, busy.answered) == (False, "HTTP probe failed with statuscode: 503", True)


async def test_https_to_a_server_without_tls_or_without_anybody(actions: Actions) -> None:
    async with serving({"/": OK}) as port:
        wrong = await actions.run(HttpAction(port, "/", https=True), 1)
    assert not wrong.ok
    gone = await actions.run(HttpAction(port, "/", https=True), 5)
    assert not gone.ok
    assert "refused" in gone.message.lower()


async def test_redirects_within_the_host_are_followed(actions: Actions) -> None:
    async with serving({"/a": to("b"), "/b": to("/c?x=1"), "/c?x=1": BUSY, "/loop": to("/loop")}) as port:
        followed = await actions.run(HttpAction(port, "/a"), 10)
        assert (followed.ok, followed.message) == (False, "HTTP probe failed with statuscode: 503")
        loop = await actions.run(HttpAction(port, "/loop"), 10)
    assert not loop.ok
    assert "stopped after 10 redirects" in loop.message


async def test_a_redirect_elsewhere_is_an_answer(actions: Actions) -> None:
    async with serving({"/": to("http://example.org/")}) as port:
        assert (await actions.run(HttpAction(port, "/"), 10)).ok


async def test_a_redirect_from_http_to_https(actions: Actions, tmp_path: Path) -> None:
    answers = {"/s": OK}
    async with serving(answers, certificate(tmp_path)) as secure, serving(answers) as port:
        answers["/"] = to(f"https://127.0.0.1:{secure}/s")
        assert (await actions.run(HttpAction(port, "/"), 10)).ok
