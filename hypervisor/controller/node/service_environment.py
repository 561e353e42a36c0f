"""Variables that tell containers of the Services: of their own namespace, and always of ``default/kubernetes``.

Source: Kubernetes documentation, "Discovering services" (environment variables) and ``enableServiceLinks``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from hypervisor.kube.client import Object
from hypervisor.kube.meta import get

MASTER = ("default", "kubernetes")


def service_variables(services: Iterable[Object], namespace: str, *, links: bool) -> dict[str, str]:
    """The variables of a container in `namespace`.

    :param links: of all Services there, not of the API server's only
    """
    chosen: dict[str, Object] = {}
    for service in services:
        where = (str(get(service, "metadata", "namespace")), str(get(service, "metadata", "name")))
        if where == MASTER:
            chosen.setdefault(where[1], service)
        elif links and where[0] == namespace:
            chosen[where[1]] = service
    return {key: value for name in sorted(chosen) for key, value in _variables(name, chosen[name]).items()}


def _variables(name: str, service: Object) -> dict[str, str]:
    address, ports = str(get(service, "spec", "clusterIP", default="")), get(service, "spec", "ports", default=())
    if address in ("", "None") or not ports:
        return {}
    prefix = _word(name)
    found = {f"{prefix}_SERVICE_HOST": address, f"{prefix}_SERVICE_PORT": str(ports[0]["port"])}
    found |= {f"{prefix}_SERVICE_PORT_{_word(p['name'])}": str(p["port"]) for p in ports if p.get("name")}
    found[f"{prefix}_PORT"] = _url(address, ports[0])
    for port in ports:
        found |= _link(f"{prefix}_PORT_{port['port']}_{_protocol(port)}", address, port)
    return found


def _link(prefix: str, address: str, port: Mapping[str, Any]) -> dict[str, str]:
    """As container links had it, which much software still reads."""
    return {
        prefix: _url(address, port),
        f"{prefix}_PROTO": _protocol(port).lower(),
        f"{prefix}_PORT": str(port["port"]),
        f"{prefix}_ADDR": address,
    }


def _protocol(port: Mapping[str, Any]) -> str:
    return str(port.get("protocol") or "TCP")


def _url(address: str, port: Mapping[str, Any]) -> str:
    host = f"[{address}]" if ":" in address else address
    return f"{_protocol(port).lower()}://{host}:{port['port']}"


def _word(name: str) -> str:
    return name.upper().replace("-", "_")
