"""Credentials for registries, kept where skopeo, podman and docker keep them.

A password travels on stdin or in a file of mode 0600, never in an argument list, an environment or a log.
"""

from __future__ import annotations

import base64
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypervisor.errors import InvalidInput, Unavailable
from hypervisor.images import skopeo
from hypervisor.images.reference import DEFAULT_REGISTRY, Reference, parse

_TIMEOUT_S = 60.0
_DOCKER_HUB_KEYS = ("docker.io", "index.docker.io", "registry-1.docker.io")


@dataclass(frozen=True)
class Credentials:
    """Who one is to a registry: a name and a password, or an auth file that says so."""

    username: str = ""
    password: str = field(default="", repr=False)
    authfile: Path | None = None


def default_auth_file() -> Path:
    """Where :func:`login` writes: skopeo's and podman's file, or one in the home folder where there is none."""
    if chosen := os.environ.get("REGISTRY_AUTH_FILE"):
        return Path(chosen)
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / "containers/auth.json"
    if os.geteuid() == 0:
        return Path("/run/containers/0/auth.json")
    return _config_home() / "containers/auth.json"


def find_auth_file(registry: str) -> Path | None:
    """The first auth file that knows ``registry``: skopeo's and podman's, then docker's."""
    docker = Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker") / "config.json"
    places = (default_auth_file(), _config_home() / "containers/auth.json", docker)
    return next((path for path in places if _knows(path, registry)), None)


async def login(registry: str, username: str, password: str, *, authfile: Path | None = None) -> Path:
    """Verify credentials against the registry and keep them; the file that they are kept in (mode 0600).

    On failure nothing is kept.

    :raises InvalidInput: no name of a registry, or it refuses the name or password
    :raises Unavailable: it cannot be reached
    """
    reference = _registry(registry)
    if not username or "\n" in username or "\n" in password:
        raise InvalidInput("a user name must not be empty, and neither it nor the password have line breaks")
    path = authfile or default_auth_file()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise Unavailable(f"cannot keep credentials in {path.parent}: {error.strerror}") from error
    options = ["--authfile", str(path), "--username", username, "--password-stdin", *tls_options(reference, "")]
    await skopeo.run(
        ["login", *options, reference.registry],
        what=f"registry {reference.registry}",
        timeout=_TIMEOUT_S,
        stdin=password.encode(),
    )
    path.chmod(0o600)
    return path


async def logout(registry: str, *, authfile: Path | None = None) -> None:
    """Forget the credentials for a registry.

    :raises InvalidInput: no name of a registry
    :raises Unavailable: there were none
    """
    reference = _registry(registry)
    path = authfile or default_auth_file()
    await skopeo.run(
        ["logout", "--authfile", str(path), reference.registry],
        what=f"registry {reference.registry}",
        timeout=_TIMEOUT_S,
    )


def auth_options(reference: Reference, credentials: Credentials | None, folder: Path) -> list[str]:
    """Options for ``skopeo inspect`` and ``skopeo copy``.

    :param folder: a private one, removed afterwards, where a password given here is put into a file
    """
    if credentials is None:
        path = find_auth_file(reference.registry)
    elif credentials.username:
        path = _write(folder / "auth.json", reference.registry, credentials)
    else:
        path = credentials.authfile
    return ["--authfile", str(path)] if path else []


def tls_options(reference: Reference, prefix: str) -> list[str]:
    """Plain HTTP too for registries on this machine, as docker has it; for all others HTTPS with a good certificate."""
    return [f"--{prefix}tls-verify=false"] if reference.is_loopback else []


def _registry(text: str) -> Reference:
    """A reference that stands for a registry."""
    name = text.removeprefix("https://").removeprefix("http://").rstrip("/")
    try:
        reference = parse(f"{name}/x")
    except InvalidInput:
        reference = None
    if reference is None or "/" in name or (reference.registry != name and name not in _DOCKER_HUB_KEYS):
        raise InvalidInput(f"{text!r} is no name of a registry; write HOST[:PORT], as quay.io or 127.0.0.1:5000")
    return reference


def _write(path: Path, registry: str, credentials: Credentials) -> Path:
    secret = base64.b64encode(f"{credentials.username}:{credentials.password}".encode()).decode()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump({"auths": {registry: {"auth": secret}}}, file)
    return path


def _knows(path: Path, registry: str) -> bool:
    """Whether an auth file has anything for a registry. One that cannot be read has not: skopeo would say more."""
    try:
        document: Any = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    if not isinstance(document, dict):
        return False
    if document.get("credsStore"):
        return True
    keys = [*(document.get("auths") or {}), *(document.get("credHelpers") or {})]
    return any(_same_registry(str(key), registry) for key in keys)


def _same_registry(key: str, registry: str) -> bool:
    host = key.removeprefix("https://").removeprefix("http://").partition("/")[0]
    return host == registry or (registry == DEFAULT_REGISTRY and host in _DOCKER_HUB_KEYS)


def _config_home() -> Path:
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
