"""The certificate authority, its files, and TLS with what it issues."""

from __future__ import annotations

import datetime as dt
import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from authkit import Clock
from cryptography import x509

from hypervisor.errors import InvalidInput
from hypervisor.master.auth import keyfiles, parties
from hypervisor.master.auth.ca import CertificateAuthority, Request, client_context, names_of, server_context


def load(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_keys_are_private_and_stay_the_same(
    ca: CertificateAuthority, open_ca: Callable[[], CertificateAuthority]
) -> None:
    parties.api_server(ca, ["127.0.0.1"])
    modes = {p.name: p.stat().st_mode & 0o777 for p in ca.directory.iterdir()}
    assert modes == {"ca.pem": 0o600, "ca.crt": 0o644, "apiserver.pem": 0o600}
    assert ca.directory.stat().st_mode & 0o777 == 0o700
    assert open_ca().certificate == ca.certificate


@pytest.mark.parametrize("change", ["nothing", "address", "time", "damage", "authority"])
def test_server_certificate_is_renewed_when_needed(ca: CertificateAuthority, clock: Clock, change: str) -> None:
    path = parties.api_server(ca, ["192.0.2.1"])
    before = path.read_bytes()
    if change == "time":
        clock.forward(days=300)
    elif change == "damage":
        path.write_bytes(before[:300])
    elif change == "authority":
        other = CertificateAuthority.open(ca.directory.parent / "other", now=clock)
        path.write_bytes(parties.api_server(other, ["192.0.2.1"]).read_bytes())
    parties.api_server(ca, ["192.0.2.2" if change == "address" else "192.0.2.1"])
    assert (path.read_bytes() == before) == (change == "nothing")
    load(path).verify_directly_issued_by(ca.certificate)
    assert names_of(load(path))[0] == ("192.0.2.2" if change == "address" else "192.0.2.1")
    assert load(path).not_valid_after_utc > clock() + dt.timedelta(days=360 if change != "nothing" else 0)


def test_a_certificate_never_outlives_its_authority(ca: CertificateAuthority, clock: Clock) -> None:
    clock.forward(days=3500)
    assert load(parties.admin(ca)).not_valid_after_utc == ca.certificate.not_valid_after_utc


@pytest.mark.parametrize("damage", ["empty", "cut", "leaf", "expired"])
def test_a_damaged_authority_is_refused_and_left_alone(
    ca: CertificateAuthority, open_ca: Callable[[], CertificateAuthority], clock: Clock, damage: str
) -> None:
    path = ca.directory / "ca.pem"
    content = {
        "empty": b"",
        "cut": path.read_bytes()[:400],
        "leaf": ca.issue(Request("leaf", client=True)).both,
        "expired": path.read_bytes(),
    }[damage]
    path.write_bytes(content)
    if damage == "expired":
        clock.forward(days=4000)
    with pytest.raises(InvalidInput, match=r"ca\.pem"):
        open_ca()
    assert path.read_bytes() == content


def test_two_that_make_an_authority_at_once_have_the_same(tmp_path: Path, clock: Clock) -> None:
    made: list[CertificateAuthority] = []
    threads = [
        threading.Thread(target=lambda: made.append(CertificateAuthority.open(tmp_path / "pki", now=clock)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({a.certificate.serial_number for a in made}) == 1


def test_a_kill_leaves_old_or_new_and_no_litter_after_the_sweep(tmp_path: Path) -> None:
    target = tmp_path / "key"
    keyfiles.write(target, b"old")
    code = (
        "import os, signal, pathlib, sys\n"
        "from hypervisor.master.auth import keyfiles\n"
        "os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL)\n"
        "keyfiles.write(pathlib.Path(sys.argv[1]), b'new')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(target)], check=False, env=dict(os.environ), timeout=30)
    assert done.returncode == -9
    assert target.read_bytes() == b"old"
    keyfiles.sweep(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["key"]


def shake_hands(server: ssl.SSLContext, client: ssl.SSLContext) -> bytes | None:
    """The client certificate that the server saw (DER), after one byte each way.

    :raises ssl.SSLError: either side refused
    """
    ours, theirs = socket.socketpair()
    seen: list[bytes | None] = []

    def serve() -> None:
        try:
            with server.wrap_socket(ours, server_side=True) as tls:
                tls.recv(1)
                seen.append(tls.getpeercert(binary_form=True))
                tls.send(b"y")
        except (ssl.SSLError, ConnectionError):
            ours.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with client.wrap_socket(theirs, server_hostname="localhost") as tls:
            tls.send(b"x")
            tls.recv(1)
    finally:
        theirs.close()
        thread.join(10)
    return seen[0]


@pytest.fixture
def real(tmp_path: Path) -> CertificateAuthority:
    """One of today: TLS has no clock of its own to set."""
    return CertificateAuthority.open(tmp_path / "real")


def test_tls_shows_the_client_to_the_server(real: CertificateAuthority) -> None:
    server = server_context(parties.api_server(real, []), real.certificate_file)
    seen = shake_hands(server, client_context(parties.admin(real), real.certificate_file))
    assert seen is not None
    assert x509.load_der_x509_certificate(seen) == load(parties.admin(real))
    assert shake_hands(server, ssl.create_default_context(cafile=str(real.certificate_file))) is None


@pytest.mark.parametrize("which", ["expired", "foreign", "server's"])
def test_tls_refuses_clients(real: CertificateAuthority, tmp_path: Path, which: str) -> None:
    server = server_context(parties.api_server(real, []), real.certificate_file)
    if which == "expired":
        pair = real.issue(Request("admin", ("system:masters",), client=True, lifetime=dt.timedelta(seconds=-1)))
    elif which == "foreign":
        pair = CertificateAuthority.open(tmp_path / "foreign").issue(Request("admin", ("system:masters",), client=True))
    else:
        pair = real.issue(Request("admin", ("system:masters",), server=True))
    path = tmp_path / "client.pem"
    keyfiles.write(path, pair.both)
    with pytest.raises((ssl.SSLError, ConnectionError, IndexError)):
        shake_hands(server, client_context(path, real.certificate_file))


def test_tls_clients_refuse_a_foreign_server(real: CertificateAuthority, tmp_path: Path) -> None:
    foreign = CertificateAuthority.open(tmp_path / "foreign")
    server = server_context(parties.api_server(foreign, []), foreign.certificate_file)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(server, client_context(parties.admin(real), real.certificate_file))
