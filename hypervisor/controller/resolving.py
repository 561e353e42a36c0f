"""Which name servers a pod asks, and in which domains it looks: what goes into its ``resolv.conf`` on the pod network.

Source: Kubernetes, "DNS for Services and Pods" (a pod's DNS policy and configuration).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from hypervisor.controller.spec import Network

HOST_FILE = Path("/etc/resolv.conf")
MOST_SERVERS = 3
"""More than that no resolver looks at."""
_CLUSTER_OPTIONS = ("ndots:5",)


def resolving(
    network: Network, namespace: str, domain: str, servers: Sequence[str], host_file: Path = HOST_FILE
) -> Network:
    """The network with the name servers, search domains and options that its policy means.

    :param servers: the cluster's name servers; none: pods ask the host's
    """
    own_search, own_options = network.search, network.options
    if network.policy == "None":
        return network
    if network.policy != "Default" and servers:
        home = (f"{namespace}.svc.{domain}", f"svc.{domain}", domain)
        found, search, options = tuple(servers), (*home, *own_search), _merged(_CLUSTER_OPTIONS, own_options)
    else:
        host_servers, host_search = host_resolver(host_file)
        # A server on the host's loopback cannot be reached from a pod; the cluster's asks it for the pod.
        found, search, options = host_servers or tuple(servers), (*host_search, *own_search), own_options
    together = tuple(dict.fromkeys((*found, *network.dns)))[:MOST_SERVERS]
    return replace(network, dns=together, search=tuple(dict.fromkeys(search)), options=options)


def _merged(usual: Iterable[str], own: Iterable[str]) -> tuple[str, ...]:
    """The pod's own come in place of the usual ones of the same name."""
    listed = tuple(own)
    names = {text.partition(":")[0] for text in listed}
    return (*(text for text in usual if text.partition(":")[0] not in names), *listed)


def host_resolver(file: Path = HOST_FILE) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The host's name servers that a pod can reach, IPv4 only, and its search domains."""
    servers: list[str] = []
    search: tuple[str, ...] = ()
    try:
        lines = file.read_text(errors="replace").splitlines()
    except OSError:
        return (), ()
    for words in (line.split() for line in lines):
        if len(words) > 1 and words[0] == "nameserver" and _reachable(words[1]):
            servers.append(words[1])
        elif words and words[0] in ("search", "domain"):
            search = tuple(word.rstrip(".") for word in words[1:] if word != ".")
    return tuple(servers), search


def _reachable(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return address.version == 4 and not address.is_loopback
