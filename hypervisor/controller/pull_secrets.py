"""imagePullSecrets: what the pod's secrets know of an image's registry."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from typing import Any

from hypervisor.controller.journal import Journal
from hypervisor.controller.podobjects import Lookup
from hypervisor.controller.spec import PodSpec
from hypervisor.errors import HvError
from hypervisor.images.credentials import Credentials
from hypervisor.images.reference import lookups

_DOCKER_HUB = ("docker.io", "index.docker.io", "registry-1.docker.io")


async def pull_credentials(lookup: Lookup, pod: PodSpec, image: str, journal: Journal) -> list[Credentials | None]:
    """Credentials for the image's registry, secret by secret; one that cannot be used is told and left out."""
    registry = lookups(image)[-1].registry
    found: list[Credentials | None] = []
    for name in pod.pull_secrets:
        try:
            entries = await lookup.secret(pod.namespace, name)
            found += list(_credentials(entries, registry))
        except (HvError, ValueError, AttributeError, TypeError) as e:
            what = f"Unable to retrieve some image pull secrets ({name}); attempting to pull without them: {e}"
            journal.note("Warning", "FailedToRetrieveImagePullSecret", what)
    return found


def _credentials(entries: Mapping[str, bytes], registry: str) -> Iterator[Credentials]:
    """:raises ValueError: what is in it is no docker configuration"""
    auths: dict[str, Any] = {}
    if ".dockerconfigjson" in entries:
        auths = json.loads(entries[".dockerconfigjson"]).get("auths") or {}
    elif ".dockercfg" in entries:
        auths = json.loads(entries[".dockercfg"])
    else:
        raise ValueError("it has neither .dockerconfigjson nor .dockercfg")
    for key, auth in auths.items():
        if _host(key) == registry or (_host(key) in _DOCKER_HUB and registry in _DOCKER_HUB):
            yield _credential(auth)


def _host(key: str) -> str:
    """Keys are host names, or URLs as ``https://index.docker.io/v1/``."""
    return key.partition("://")[2].partition("/")[0] if "://" in key else key.partition("/")[0]


def _credential(auth: Mapping[str, Any]) -> Credentials:
    if auth.get("auth"):
        name, _, password = base64.b64decode(auth["auth"]).decode().partition(":")
        return Credentials(name, password)
    return Credentials(str(auth.get("username") or ""), str(auth.get("password") or ""))
