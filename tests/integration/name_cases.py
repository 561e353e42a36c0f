"""Names of the cluster, asked by the guest's own resolver: a script for the Python image, and what it must say."""

from __future__ import annotations

import json
from typing import Any

from conftest import wait_for
from local_cluster import Cluster

HEADLESS = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {"name": "each"},
    "spec": {"clusterIP": "None", "ipFamilyPolicy": "RequireDualStack", "selector": {"app": "web"},
             "ports": [{"name": "http", "port": 8080}]},
}  # fmt: skip
ELSEWHERE = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {"name": "elsewhere"},
    "spec": {"type": "ExternalName", "externalName": "web.default.svc.cluster.local"},
}
SCRIPT = """
import json, socket, struct, sys

def addresses(name):
    try:
        return sorted({found[4][0] for found in socket.getaddrinfo(name, 80, proto=socket.IPPROTO_TCP)})
    except OSError as error:
        return str(error)

def over_tcp(name, kind):
    server = next(line.split()[1] for line in open("/etc/resolv.conf") if line.startswith("nameserver"))
    labels = b"".join(bytes([len(part)]) + part.encode() for part in name.split("."))
    query = struct.pack(">HHHHHH", 7, 0x100, 1, 0, 0, 0) + labels + struct.pack(">BHH", 0, kind, 1)
    with socket.create_connection((server, 53), timeout=20) as connection:
        connection.sendall(struct.pack(">H", len(query)) + query)
        answer = connection.makefile("rb").read(14)
    return struct.unpack(">H", answer[8:10])[0]

asked = json.loads(sys.argv[1])
said = {name: addresses(name) for name in asked["names"]}
said["reverse"] = [socket.gethostbyaddr(a)[0] for a in asked["reverse"]]
said["tcp"] = [over_tcp(name, kind) for name, kind in asked["tcp"]]
said["resolv.conf"] = open("/etc/resolv.conf").read()
print(json.dumps(said))
"""


def ask(cluster: Cluster, *names: str, reverse: tuple[str, ...] = (), tcp: tuple[tuple[str, int], ...] = ()) -> Any:
    """What the reader's resolver says."""
    asked = json.dumps({"names": names, "reverse": reverse, "tcp": tcp})
    return json.loads(cluster.kubectl("exec", "reader", "--", "python3", "-c", SCRIPT, asked))


def check_names(cluster: Cluster, web: list[str]) -> None:
    """
    :param web: addresses of the pods behind the Services
    """
    cluster.kubectl("apply", "-f", "-", stdin="\n---\n".join(map(json.dumps, (HEADLESS, ELSEWHERE))))
    wait_for(lambda: ask(cluster, "each")["each"] == sorted(web), "the headless Service has its pods")
    own = sorted(cluster.kubectl("get", "service", "web", "-o", "jsonpath={.spec.clusterIPs[*]}").split())
    first = next(a for a in web if "." in a)
    one = f"{first.replace('.', '-')}.each"
    pod = f"{first.replace('.', '-')}.default.pod.cluster.local"
    said = ask(
        cluster, "web", "web.default", "web.default.svc.cluster.local", "elsewhere", one, pod, "nobody",
        reverse=(own[0],), tcp=(("_http._tcp.each.default.svc.cluster.local", 33),),
    )  # fmt: skip
    assert said["web"] == said["web.default"] == said["web.default.svc.cluster.local"] == said["elsewhere"] == own
    assert said[one] == said[pod] == [first]
    assert "not known" in said["nobody"]
    assert said["reverse"] == ["web.default.svc.cluster.local"]
    assert said["tcp"] == [len(web)]
    assert "search default.svc.cluster.local svc.cluster.local cluster.local" in said["resolv.conf"]
    assert "options ndots:5" in said["resolv.conf"]
    found = cluster.kubectl("exec", "client", "--", "nslookup", "web.default.svc.cluster.local")
    assert all(address in found for address in own)
