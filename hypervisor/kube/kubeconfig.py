"""Where an API server is and how to prove who one is: read from a kubeconfig or a pod's service account, and written.

Source: Kubernetes documentation, "Organizing Cluster Access Using kubeconfig Files"; for the in-cluster form,
"Accessing the Kubernetes API from a Pod". Exec plug-ins and auth providers are refused by name: nothing is run on a
file's behalf.
"""

from __future__ import annotations

import base64
import binascii
import os
import ssl
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hypervisor.errors import InvalidInput, NotFound

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_UNSUPPORTED = ("exec", "auth-provider", "username", "password", "act-as", "as")


@dataclass(frozen=True, slots=True)
class Source:
    """Bytes that stand in the file itself or in another one, which may be replaced while we run."""

    data: bytes | None = None
    path: Path | None = None

    def read(self) -> bytes:
        """:raises InvalidInput: the file cannot be read"""
        if self.data is not None or self.path is None:
            return self.data or b""
        try:
            return self.path.read_bytes()
        except OSError as e:
            raise InvalidInput(f"{self.path} cannot be read: {e.strerror}") from e

    def __bool__(self) -> bool:
        return self.data is not None or self.path is not None


NOTHING = Source()


@dataclass(frozen=True, slots=True)
class KubeConfig:
    """One context of a kubeconfig.

    :ivar server: as ``https://127.0.0.1:6443``, without a slash at its end
    :ivar ca: certificates that the server's must come from; the system's where nothing is said
    :ivar token: bearer token
    :ivar namespace: that of commands which do not name one
    :ivar origin: the file, for messages
    """

    server: str
    ca: Source = NOTHING
    certificate: Source = NOTHING
    key: Source = NOTHING
    token: Source = NOTHING
    server_name: str | None = None
    insecure: bool = False
    namespace: str = "default"
    origin: Path | None = None

    def files(self) -> Iterator[Path]:
        """Files whose change changes what this says."""
        sources = (self.ca, self.certificate, self.key, self.token)
        yield from (s.path for s in sources if s.path is not None)
        if self.origin is not None:
            yield self.origin

    def tls(self) -> ssl.SSLContext | None:
        """A context that trusts and presents what this says; None without TLS. Reads files: blocks for some ms.

        :raises InvalidInput: a certificate or key is missing or damaged
        """
        if not self.server.startswith("https:"):
            return None
        try:
            context = ssl.create_default_context(cadata=self.ca.read().decode("ascii") if self.ca else None)
            if self.insecure:
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            if self.certificate:
                load_pair(context, self.certificate.read(), self.key.read())
        except (ssl.SSLError, UnicodeDecodeError, ValueError) as e:
            raise InvalidInput(f"{self.origin or self.server}: certificate or key cannot be used ({e})") from e
        return context

    def bearer(self) -> str:
        """The token as it is now; empty without one."""
        return self.token.read().decode("utf-8", "replace").strip()


def load_pair(context: ssl.SSLContext, certificate: bytes, key: bytes) -> None:
    """Has `context` present a PEM certificate (chain) and its key, which never reach a disk.

    :raises ssl.SSLError: they are damaged or do not belong together
    """
    fd = os.memfd_create("pair", os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(fd), "wb") as file:
            file.write(certificate.rstrip() + b"\n" + key.rstrip() + b"\n")
        context.load_cert_chain(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


# ---- reading ---------------------------------------------------------------------------------------------------------


def load(path: Path, context: str | None = None) -> KubeConfig:
    """A context of a kubeconfig file, the current one where none is named.

    :raises NotFound: there is no such file
    :raises InvalidInput: it is damaged, or wants something that is not supported
    """
    try:
        data = yaml.safe_load(path.read_bytes())
    except FileNotFoundError as e:
        raise NotFound(f"there is no kubeconfig {path}") from e
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as e:
        raise InvalidInput(f"kubeconfig {path} cannot be read: {str(e).splitlines()[0]}") from e
    if not isinstance(data, Mapping):
        raise InvalidInput(f"kubeconfig {path} is no mapping")
    name = context or data.get("current-context")
    chosen = _named(data, "contexts", "context", name, path)
    cluster = _named(data, "clusters", "cluster", chosen.get("cluster"), path)
    user = _named(data, "users", "user", chosen["user"], path) if chosen.get("user") else {}
    return _config(cluster, user, chosen, path)


def _named(data: Mapping[str, Any], group: str, key: str, name: object, path: Path) -> Mapping[str, Any]:
    for item in data.get(group) or ():
        if isinstance(item, Mapping) and item.get("name") == name and isinstance(item.get(key), Mapping):
            found: Mapping[str, Any] = item[key]
            return found
    raise InvalidInput(f"kubeconfig {path} has no {key} named {name!r}", where=group)


def _config(cluster: Mapping[str, Any], user: Mapping[str, Any], context: Mapping[str, Any], path: Path) -> KubeConfig:
    server = cluster.get("server")
    if not isinstance(server, str) or not server.startswith(("https://", "http://")):
        raise InvalidInput(f"kubeconfig {path}: {server!r} is no http or https URL", where="server")
    for key in _UNSUPPORTED:
        if user.get(key):
            raise InvalidInput(f"kubeconfig {path}: not supported; use a client certificate or a token", where=key)
    certificate, key_ = _source(user, "client-certificate", path), _source(user, "client-key", path)
    if bool(certificate) != bool(key_):
        raise InvalidInput(f"kubeconfig {path}: client-certificate and client-key go together")
    return KubeConfig(
        server=server.rstrip("/"),
        ca=_source(cluster, "certificate-authority", path),
        certificate=certificate,
        key=key_,
        token=_token(user, path),
        server_name=cluster.get("tls-server-name"),
        insecure=bool(cluster.get("insecure-skip-tls-verify")),
        namespace=str(context.get("namespace") or "default"),
        origin=path,
    )


def _source(data: Mapping[str, Any], key: str, path: Path) -> Source:
    if data.get(f"{key}-data"):
        try:
            return Source(data=base64.b64decode(data[f"{key}-data"], validate=True))
        except (binascii.Error, TypeError, ValueError) as e:
            raise InvalidInput(f"kubeconfig {path}: not base64", where=f"{key}-data") from e
    return Source(path=path.parent / data[key]) if data.get(key) else NOTHING


def _token(user: Mapping[str, Any], path: Path) -> Source:
    if user.get("tokenFile"):
        return Source(path=path.parent / user["tokenFile"])
    return Source(data=str(user["token"]).encode()) if user.get("token") else NOTHING


def in_cluster(folder: Path = SERVICE_ACCOUNT) -> KubeConfig:
    """What a pod's service account gives.

    :raises NotFound: this is no pod
    """
    host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT")
    if not host or not port or not (folder / "token").exists():
        raise NotFound("not in a pod: there is no service account's token")
    host = f"[{host}]" if ":" in host else host
    namespace = (folder / "namespace").read_text().strip() if (folder / "namespace").exists() else "default"
    return KubeConfig(
        f"https://{host}:{port}",
        ca=Source(path=folder / "ca.crt"),
        token=Source(path=folder / "token"),
        namespace=namespace,
    )


# ---- writing ---------------------------------------------------------------------------------------------------------


def render(
    *,
    server: str,
    ca: bytes,
    user: str,
    cluster: str = "podvisor",
    certificate: bytes = b"",
    key: bytes = b"",
    token: str = "",
    namespace: str = "",
) -> dict[str, Any]:
    """A kubeconfig of one context; PEM bytes go into it, so that it works wherever it is copied to."""

    def text(data: bytes) -> str:
        return base64.b64encode(data).decode()

    credentials: dict[str, str] = {}
    if certificate:
        credentials |= {"client-certificate-data": text(certificate), "client-key-data": text(key)}
    if token:
        credentials["token"] = token
    context = {"cluster": cluster, "user": user} | ({"namespace": namespace} if namespace else {})
    name = f"{user}@{cluster}"
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": cluster, "cluster": {"server": server, "certificate-authority-data": text(ca)}}],
        "users": [{"name": user, "user": credentials}],
        "contexts": [{"name": name, "context": context}],
        "current-context": name,
    }


def write(path: Path, config: Mapping[str, Any]) -> None:
    """Writes a kubeconfig, all or nothing, readable by its owner only."""
    write_private(path, yaml.safe_dump(dict(config), sort_keys=False).encode())


def write_private(path: Path, data: bytes) -> None:
    """Replaces a file, all or nothing and on stable storage, mode 0600."""
    fd, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mkstemp makes it 0600
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
