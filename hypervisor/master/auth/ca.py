"""The cluster's certificate authority: makes, keeps and renews its own certificate, and issues all others.

Every certificate is ECDSA on P-256. A certificate and its key lie in one PEM file, so that no crash can leave a key of
one beside the certificate of another.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import ssl
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from hypervisor.errors import InvalidInput
from hypervisor.master.auth import keyfiles

CA_LIFETIME = dt.timedelta(days=3650)
LIFETIME = dt.timedelta(days=365)
"""Of every certificate but the authority's own, at most."""
RENEW_AT = 0.3
"""A certificate is renewed when less than this part of its lifetime is left."""
BACKDATED = dt.timedelta(minutes=5)
"""Certificates are valid from so long ago, for peers whose clocks are behind."""
CA_NAME = "podvisor-ca"
LONGEST_NAME = 64  # of a common name: RFC 5280, ub-common-name

Clock = Callable[[], dt.datetime]


def utc_now() -> dt.datetime:
    """The wall clock."""
    return dt.datetime.now(dt.UTC)


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A certificate with its private key, both PEM."""

    certificate: bytes
    key: bytes

    @property
    def both(self) -> bytes:
        """As `ssl.SSLContext.load_cert_chain` takes one file."""
        return self.certificate + self.key


@dataclass(frozen=True, slots=True)
class Request:
    """What a certificate is to say.

    :ivar names: subject alternative names: IP addresses and DNS names
    :ivar server: usable by a server
    :ivar client: usable by a client
    """

    common_name: str
    organizations: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    server: bool = False
    client: bool = False
    lifetime: dt.timedelta = LIFETIME


class CertificateAuthority:
    """Issues certificates. Its methods keep no state but files, and may be called from any thread."""

    def __init__(self, directory: Path, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey, now: Clock):
        self.directory = directory
        self.certificate = certificate
        self._key = key
        self._now = now

    @classmethod
    def open(cls, directory: Path, *, now: Clock = utc_now) -> CertificateAuthority:
        """The authority of a folder, which is made (0700) with a new authority when there is none.

        ``ca.pem`` has certificate and key (0600), ``ca.crt`` the certificate alone.

        :raises InvalidInput: ``ca.pem`` is damaged, or no authority's
        """
        keyfiles.private_directory(directory)
        path = directory / "ca.pem"
        content = path.read_bytes() if path.exists() else keyfiles.create(path, _new_authority(now()).both)
        certificate, key = _load(path, content)
        if not _is_authority(certificate):
            raise InvalidInput("its certificate may not sign others; give an authority's", where=str(path))
        if certificate.not_valid_after_utc <= now():
            raise InvalidInput(
                f"the cluster's authority expired at {certificate.not_valid_after_utc}; move the file away to make "
                "another, then give every node and user a new kubeconfig",
                where=str(path),
            )
        keyfiles.write(directory / "ca.crt", _pem(certificate), keyfiles.PUBLIC)
        return cls(directory, certificate, key, now)

    @property
    def pem(self) -> bytes:
        """The certificate that peers verify with."""
        return _pem(self.certificate)

    @property
    def certificate_file(self) -> Path:
        """Where `pem` lies."""
        return self.directory / "ca.crt"

    def issue(self, request: Request) -> KeyPair:
        """A new key and a certificate of it."""
        key = ec.generate_private_key(ec.SECP256R1())
        return KeyPair(self.certify(request, key.public_key()), _key_pem(key))

    def certify(self, request: Request, public_key: ec.EllipticCurvePublicKey | object) -> bytes:
        """A certificate (PEM) of a key that somebody else keeps."""
        now = self._now()
        until = min(now + request.lifetime, self.certificate.not_valid_after_utc)
        builder = _builder(_subject(request), public_key, now - BACKDATED, until).issuer_name(self.certificate.subject)
        for extension, critical in self._extensions(request):
            builder = builder.add_extension(extension, critical)
        return _pem(builder.sign(self._key, hashes.SHA256()))

    def _extensions(self, request: Request) -> Iterable[tuple[x509.ExtensionType, bool]]:
        yield x509.BasicConstraints(ca=False, path_length=None), True
        yield _key_usage(signs_certificates=False), True
        usages = [ExtendedKeyUsageOID.SERVER_AUTH] * request.server + [ExtendedKeyUsageOID.CLIENT_AUTH] * request.client
        yield x509.ExtendedKeyUsage(usages), False
        identifier = self.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        yield x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), False
        if request.names:
            yield x509.SubjectAlternativeName([general_name(n) for n in request.names]), False

    def ensure(self, name: str, request: Request) -> Path:
        """The file ``<name>.pem`` with a certificate that says what `request` does, and is not near its end.

        It is issued anew when it is missing, damaged, another authority's, says something else or expires soon.
        """
        path = self.directory / f"{name}.pem"
        if not self._serves(path, request):
            keyfiles.write(path, self.issue(request).both)
        return path

    def _serves(self, path: Path, request: Request) -> bool:
        try:
            certificate, _ = _load(path, path.read_bytes())
            certificate.verify_directly_issued_by(self.certificate)
        except (OSError, InvalidInput, ValueError, TypeError):
            return False
        except Exception as error:  # cryptography's InvalidSignature derives from Exception alone
            if type(error).__name__ != "InvalidSignature":
                raise
            return False
        return (
            certificate.subject == _subject(request)
            and set(names_of(certificate)) == {_canonical(n) for n in request.names}
            and not near_expiry(certificate, self._now())
        )


def near_expiry(certificate: x509.Certificate, now: dt.datetime) -> bool:
    """Whether it is time to renew it."""
    lifetime = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    return certificate.not_valid_after_utc - now < lifetime * RENEW_AT


def names_of(certificate: x509.Certificate | x509.CertificateSigningRequest) -> Sequence[str]:
    """DNS names and IP addresses of its subject alternative names; other kinds of names as ``kind:value``."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    return [
        str(n.value) if isinstance(n, x509.DNSName | x509.IPAddress) else f"{type(n).__name__}:{n.value}" for n in names
    ]


def general_name(name: str) -> x509.GeneralName:
    """An IP address or a DNS name."""
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def server_context(pair: Path, authority: Path) -> ssl.SSLContext:
    """TLS of a server that asks for client certificates and refuses those that are expired or another authority's.

    A client without one is let in: whoever authenticates it decides.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(pair)
    context.load_verify_locations(authority)
    context.verify_mode = ssl.CERT_OPTIONAL
    return context


def client_context(pair: Path, authority: Path) -> ssl.SSLContext:
    """TLS of a client that shows a certificate and verifies the server's name."""
    context = ssl.create_default_context(cafile=str(authority))
    context.load_cert_chain(pair)
    return context


def _new_authority(now: dt.datetime) -> KeyPair:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, CA_NAME)])
    builder = _builder(name, key.public_key(), now - BACKDATED, now + CA_LIFETIME).issuer_name(name)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
    builder = builder.add_extension(_key_usage(signs_certificates=True), True)
    return KeyPair(_pem(builder.sign(key, hashes.SHA256())), _key_pem(key))


def _builder(subject: x509.Name, key: object, since: dt.datetime, until: dt.datetime) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder().subject_name(subject).public_key(key)  # type: ignore[arg-type]
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(since).not_valid_after(until)
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), False)  # type: ignore[arg-type]


def _subject(request: Request) -> x509.Name:
    organizations = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, o) for o in request.organizations]
    return x509.Name([*organizations, x509.NameAttribute(NameOID.COMMON_NAME, request.common_name)])


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _load(path: Path, content: bytes) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """:raises InvalidInput: no certificate with its key"""
    try:
        certificate = x509.load_pem_x509_certificate(content)
        key = serialization.load_pem_private_key(content, None)
    except (ValueError, TypeError) as error:
        raise InvalidInput(f"holds no certificate with its key ({error}); restore it", where=str(path)) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise InvalidInput("the certificate is not that of the key; restore the file", where=str(path))
    return certificate, key


def _is_authority(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def _canonical(name: str) -> str:
    return str(general_name(name).value)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
