"""Names of images, as docker has them, and digests.

``busybox`` means ``docker.io/library/busybox:latest``; ``quay.io/a/b@sha256:...`` is pinned to one content.
Only ``sha256`` digests are taken: every registry in use makes them, and one algorithm is one thing to get right.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from hypervisor.errors import InvalidInput

DEFAULT_REGISTRY = "docker.io"
DEFAULT_TAG = "latest"
LOCAL_REGISTRY = "localhost"
"""Imported images without a registry in their name live under this; nothing is ever pulled from it."""
SAMPLES = "podvisor"
"""Short names are also looked for as ``localhost/podvisor/<name>``: the sample images."""

_NAME_LIMIT = 255
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_COMPONENT = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_LABEL = r"(?:[A-Za-z0-9]|[A-Za-z0-9][A-Za-z0-9-]*[A-Za-z0-9])"
_REGISTRY = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9A-Fa-f:]+\])(?::[0-9]{{1,5}})?")
_IMAGE_ID = re.compile(r"(?:sha256:[0-9a-f]{4,64}|[0-9a-f]{12,64})")


def parse_digest(text: object, *, what: str = "digest") -> str:
    """The 64 hex digits of ``sha256:<hex>``.

    :param what: what the digest belongs to, for the error
    :raises InvalidInput: it is no sha256 digest in lower case
    """
    match = _DIGEST.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise InvalidInput(f"{what}: {_quoted(text)} is no digest; write sha256: and 64 hex digits in lower case")
    return match[1]


def digest_of(data: bytes) -> str:
    """``sha256:<hex>`` of some bytes."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def id_prefix(text: str) -> str | None:
    """The hex digits, if ``text`` can mean an image id: at least 12 of them, or ``sha256:`` and at least 4."""
    return text.removeprefix("sha256:") if _IMAGE_ID.fullmatch(text) else None


@dataclass(frozen=True, order=True)
class Reference:
    """A full name: registry, repository, and a tag or a digest (a digest wins over a tag that stands beside it)."""

    registry: str
    repository: str
    tag: str | None
    digest: str | None

    @property
    def name(self) -> str:
        """Registry and repository."""
        return f"{self.registry}/{self.repository}"

    def __str__(self) -> str:
        return f"{self.name}@{self.digest}" if self.digest else f"{self.name}:{self.tag}"

    @property
    def familiar(self) -> str:
        """What a person would type: without ``docker.io/``, ``library/`` and ``localhost/``."""
        text = str(self)
        for prefix in (f"{DEFAULT_REGISTRY}/library/", f"{DEFAULT_REGISTRY}/", f"{LOCAL_REGISTRY}/"):
            if text.startswith(prefix):
                return text.removeprefix(prefix)
        return text

    @property
    def is_local(self) -> bool:
        """True for imported images: there is no registry to pull them from."""
        return self.registry == LOCAL_REGISTRY

    @property
    def is_loopback(self) -> bool:
        """True if the registry runs on this machine: there, as docker has it, plain HTTP is accepted too."""
        host = self.registry.rsplit(":", 1)[0] if not self.registry.endswith("]") else self.registry
        return host in ("localhost", "[::1]") or re.fullmatch(r"127(\.[0-9]{1,3}){3}", host) is not None

    def with_digest(self, digest: str) -> Reference:
        """The same repository, pinned to ``digest``."""
        return Reference(self.registry, self.repository, None, digest)


def parse(text: str, *, default_registry: str = DEFAULT_REGISTRY) -> Reference:
    """The full name that ``text`` stands for.

    :param default_registry: for a name that has none: ``docker.io`` for pulls, ``localhost`` for imports
    :raises InvalidInput: it is no name of an image; the message says why and how to write it
    """
    rest, digest = _split_digest(text)
    rest, tag = _split_tag(rest, text)
    registry, repository = _split_registry(rest, default_registry)
    _check_registry(registry, text)
    _check_repository(repository, text)
    if registry == DEFAULT_REGISTRY and "/" not in repository:
        repository = f"library/{repository}"
    return Reference(registry, repository, None if digest else (tag or DEFAULT_TAG), digest)


def has_registry(text: str) -> bool:
    """True if the name says which registry it means."""
    first, slash, _ = text.partition("/")
    return bool(slash) and _looks_like_registry(first)


def lookups(text: str) -> list[Reference]:
    """Where to look for ``text`` among the stored images, best first.

    A full name is looked for as it stands; a short one first among the imported images, then among the samples,
    then as docker would read it.

    :raises InvalidInput: it is no name of an image
    """
    pulled = parse(text)
    if has_registry(text):
        return [pulled]
    local = parse(text, default_registry=LOCAL_REGISTRY)
    found = [local]
    if "/" not in local.repository:
        found.append(Reference(LOCAL_REGISTRY, f"{SAMPLES}/{local.repository}", local.tag, local.digest))
    return [*found, pulled]


def _quoted(text: object) -> str:
    shown = repr(text)
    return shown if len(shown) <= 90 else f"{shown[:80]}... ({len(shown)} characters)"


def _split_digest(text: str) -> tuple[str, str | None]:
    rest, at, digest = text.partition("@")
    return (rest, "sha256:" + parse_digest(digest, what=f"image {_quoted(text)}")) if at else (rest, None)


def _split_tag(rest: str, text: str) -> tuple[str, str | None]:
    path, colon, tag = rest.rpartition(":")
    if not colon or "/" in tag:
        return rest, None
    if not _TAG.fullmatch(tag):
        raise InvalidInput(f"image {_quoted(text)}: bad tag {_quoted(tag)}; use at most 128 of A-Z a-z 0-9 _ . -")
    return path, tag


def _looks_like_registry(first: str) -> bool:
    return "." in first or ":" in first or first == "localhost" or first.lower() != first


def _split_registry(rest: str, default: str) -> tuple[str, str]:
    first, slash, path = rest.partition("/")
    if not slash or not _looks_like_registry(first):
        return default, rest
    return (DEFAULT_REGISTRY if first in ("index.docker.io", "registry-1.docker.io") else first), path


def _check_registry(registry: str, text: str) -> None:
    port = registry.rpartition(":")[2] if registry.count(":") == 1 else "0"
    if not _REGISTRY.fullmatch(registry) or int(port if port.isdigit() else 0) > 65535:
        raise InvalidInput(f"image {_quoted(text)}: bad registry {_quoted(registry)}; write HOST[:PORT]/NAME[:TAG]")


def _check_repository(repository: str, text: str) -> None:
    if not repository:
        raise InvalidInput(f"image {_quoted(text)}: the name is empty; write [REGISTRY/]NAME[:TAG], as busybox:latest")
    if len(repository) > _NAME_LIMIT:
        raise InvalidInput(f"image {_quoted(text)}: the name is longer than {_NAME_LIMIT} characters")
    for component in repository.split("/"):
        if not _COMPONENT.fullmatch(component):
            raise InvalidInput(
                f"image {_quoted(text)}: bad name part {_quoted(component)}; use a-z 0-9, and . _ - between them"
            )
