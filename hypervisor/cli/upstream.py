"""A connection to a cluster's master that takes the requests which commands send to a host.

Theory of operation
-------------------
Commands speak hostd's routes. In a cluster most of them have a counterpart in the Kubernetes API (`translated`); those
that have none (archive, console, stop, images, what pods use) go to the daemon of the host that has the pod, which the
master names. Pods that ``hv run`` makes are plain v1 Pods, made by the master and placed by its scheduler::

    hostd's                                         the master's
    GET    /hv/v1/pods                              GET    /api/v1/pods
    POST   /hv/v1/pods                              POST   /api/v1/namespaces/NS/pods
    GET    /hv/v1/pods/NS/POD[?watch=1]             GET    /api/v1/namespaces/NS/pods/POD; a watch, then the host's
    DELETE /hv/v1/pods/NS/POD[?wait=1]              DELETE the same, then a watch until it has gone
    GET    /exec|attach/NS/POD/C                    GET    .../pods/POD/exec|attach?container=C (WebSocket)
    GET    /containerLogs/NS/POD/C                  GET    .../pods/POD/log?container=C
    GET    /portForward/NS/POD                      GET    .../pods/POD/portforward (WebSocket)
    GET    /debug/NS/POD                            GET    .../pods/POD/debug (WebSocket)

Imported only where there is a cluster: TLS costs 25 ms.
"""

from __future__ import annotations

import json
import os
import ssl
import time
from urllib.parse import parse_qsl, unquote

from hypervisor.cli.rest import CONNECT_TIMEOUT, QUICK, Connection, Response, error_from, target
from hypervisor.cli.route import ClusterEndpoint, namespace
from hypervisor.cli.state import Endpoint, read_endpoint
from hypervisor.cli.tls import TlsSocket
from hypervisor.errors import HvError, InvalidInput, NotFound, Unavailable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any

    from hypervisor.cli.rest import Body

    Pairs = list[tuple[str, str]]

_STREAMS = {"input": "stdin", "output": "stdout", "error": "stderr"}
_SUBRESOURCES = {"exec": "exec", "attach": "attach", "containerLogs": "log"}
POD_ARRIVES = 10.0  # seconds that a host gets to take a pod that is bound to it
LOOK_EVERY = 0.03


class Ready(Response):
    """An answer that is there already."""

    def __init__(self, value: Any) -> None:
        self.status = 200
        self.headers = {}
        self._value = value

    def chunks(self) -> Iterator[bytes]:
        return iter((json.dumps(self._value).encode(),))


class Objects(Response):
    """An answer of objects that come one after the other."""

    def __init__(self, found: Iterator[dict[str, Any]]) -> None:
        self.status = 200
        self.headers = {}
        self._found = found

    def chunks(self) -> Iterator[bytes]:
        return iter(())

    def objects(self) -> Iterator[dict[str, Any]]:
        return self._found


def pods_path(where: str = "", name: str = "", subresource: str = "", query: Iterable[tuple[str, str]] = ()) -> str:
    """Request target of pods in the API."""
    scope = ("namespaces", where) if where else ()
    return target(("api", "v1", *scope, "pods", *filter(None, (name, subresource))), query)


def translated(parts: list[str], query: Pairs) -> str | None:
    """The master's request target for a host's; None where it has no counterpart."""
    if parts[0] in _SUBRESOURCES and len(parts) == 4:
        pairs = [(_STREAMS.get(key, key), value) for key, value in query]
        return pods_path(parts[1], parts[2], _SUBRESOURCES[parts[0]], [("container", parts[3]), *pairs])
    if parts[0] == "portForward" and len(parts) == 3:
        return pods_path(parts[1], parts[2], "portforward", query)
    if parts[0] == "debug" and len(parts) == 3:
        return pods_path(parts[1], parts[2], "debug", [(_STREAMS.get(key, key), value) for key, value in query])
    if parts[:3] == ["hv", "v1", "pods"] and len(parts) in (3, 5):
        where, name = parts[3:] or ("", "")
        return pods_path(where, name, query=[(k, v) for k, v in query if k not in ("wait", "watch")])
    return None


class MasterConnection(Connection):
    """As `Connection`, to a cluster. One request at a time."""

    def __init__(self, cluster: ClusterEndpoint, timeout: float | None = QUICK) -> None:
        """:raises OSError: the master does not listen"""
        self._cluster = cluster
        self._timeout = timeout
        self._host: Connection | None = None
        super().__init__(Endpoint(cluster.root, "127.0.0.1", cluster.port, ""), timeout)

    def _open(self) -> TlsSocket:
        pki = f"{self._cluster.root}/master/pki"
        try:
            context = ssl.create_default_context(cafile=f"{pki}/ca.crt")
            context.load_cert_chain(f"{pki}/admin.pem")
        except PermissionError as e:
            root = self._cluster.root
            raise Unavailable(
                f"the keys of the cluster in {root} are another user's; hv --local leaves it aside"
            ) from e
        except OSError as e:
            raise HvError(f"{pki}: {e.strerror or e}; run: hv cluster up") from e
        return TlsSocket((self.endpoint.address, self.endpoint.port), context, CONNECT_TIMEOUT)

    def close(self) -> None:
        """Ends it, and the connection to a host that it led to."""
        if self._host is not None:
            self._host.close()
        super().close()

    def set_timeout(self, timeout: float | None) -> None:
        self._timeout = timeout
        super().set_timeout(timeout)

    def request(
        self, method: str, where: str, body: Body | None = None, headers: Iterable[tuple[str, str]] = ()
    ) -> Response:
        path, _, text = where.partition("?")
        parts = [unquote(part, errors="surrogateescape") for part in path.strip("/").split("/")]
        query = parse_qsl(text, keep_blank_values=True, errors="surrogateescape")
        wanted = translated(parts, query)
        if wanted is None:
            return self._elsewhere(method, where, parts, body, headers)
        if method == "POST":
            wanted = pods_path(_namespace_of(body))
        if ("watch", "1") in query:
            return Objects(self._watch(parts[3], parts[4]))
        if method != "DELETE":
            return super().request(method, wanted, body, headers)
        return self._delete(parts[3], parts[4], wanted, wait=("wait", "1") in query)

    # ---- pods --------------------------------------------------------------------------------------------------------

    def api(self, method: str, where: str, value: Any = None, kind: str = "application/json") -> Any:
        """The JSON that the Kubernetes API answers with.

        :raises HvError: it refused; see `hypervisor.cli.rest.error_from`
        """
        body = None if value is None else json.dumps(value).encode()
        answer = super().request(method, where, body, (("Content-Type", kind),) if body else ())
        if answer.status >= 400:
            raise error_from(answer.status, answer.read())
        return answer.json()

    def _read(self, where: str, name: str) -> dict[str, Any]:
        return dict(self.api("GET", pods_path(where, name)))

    def _delete(self, where: str, name: str, wanted: str, *, wait: bool) -> Response:
        answer = super().request("DELETE", wanted)
        if answer.status >= 400 or not wait:
            return answer
        removed = answer.json()
        uid = removed["metadata"]["uid"]
        try:
            while self._read(where, name)["metadata"]["uid"] == uid:
                time.sleep(LOOK_EVERY)
        except NotFound:
            pass
        return Ready(removed)

    def _watch(self, where: str, name: str) -> Iterator[dict[str, Any]]:
        """The pod, whenever it changes: as the master has it until a host of this machine has it, which knows first
        and keeps the VM of a pod that is over for those who watch.
        """
        query = [("watch", "1"), ("fieldSelector", f"metadata.name={name}")]
        events = Connection.request(self, "GET", pods_path(where, query=query))
        if events.status >= 400:
            raise error_from(events.status, events.read())
        for event in events.objects():
            if event.get("type") == "ERROR":
                raise error_from(int(event["object"].get("code") or 500), json.dumps(event["object"]).encode())
            if event.get("type") == "DELETED":
                return
            pod = event["object"]
            yield pod
            host = self._host_of(pod)
            ended = (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed")
            if host is not None and not ended and (there := _when_there(host, where, name)) is not None:
                self._host = host
                yield from there.objects()
                return

    def _host_of(self, pod: dict[str, Any]) -> Connection | None:
        """The daemon of the host that it is bound to; None without one, or on another machine."""
        node = str((pod.get("spec") or {}).get("nodeName") or "")
        return self._daemon(node) if node else None

    def _daemon(self, node: str) -> Connection | None:
        endpoint = read_endpoint(self._cluster.host(node))
        try:
            return None if endpoint is None else Connection(endpoint, self._timeout)
        except OSError:
            return None

    # ---- what only hosts have ----------------------------------------------------------------------------------------

    def _elsewhere(
        self, method: str, where: str, parts: list[str], body: Body | None, headers: Iterable[tuple[str, str]]
    ) -> Response:
        if parts == ["hv", "v1", "top"]:
            return Ready(self._top())
        self._host = self._host_with(parts[3], parts[4]) if parts[2:3] == ["pods"] else self._any_host()
        return self._host.request(method, where, body, headers)

    def _host_with(self, where: str, name: str) -> Connection:
        pod = self._read(where, name)
        node = str((pod.get("spec") or {}).get("nodeName") or "")
        if not node:
            raise Unavailable(f"pod {name} has not been given to a host yet; see: kubectl describe pod {name}")
        found = self._daemon(node)
        if found is None:
            raise Unavailable(f"host {node}, which has pod {name}, does not answer on this machine; see: hv host ls")
        return found

    def _hosts(self) -> Iterator[Connection]:
        for name in sorted(os.listdir(f"{self._cluster.root}/hosts")):  # noqa: PTH208
            found = self._daemon(name)
            if found is not None:
                yield found

    def _any_host(self) -> Connection:
        """Images are shared by the hosts of a local cluster."""
        for found in self._hosts():
            return found
        raise Unavailable("no host of the cluster answers; see: hv cluster status")

    def _top(self) -> dict[str, Any]:
        answers = []
        for host in self._hosts():
            with host:
                answers.append(host.get("hv", "v1", "top"))
        return {**(answers[0] if answers else {}), "pods": [p for a in answers for p in a.get("pods") or ()]}


def _when_there(host: Connection, where: str, name: str) -> Response | None:
    """The host's watch of a pod as soon as it has it; None when it does not take it."""
    deadline = time.monotonic() + POD_ARRIVES
    while time.monotonic() < deadline:
        answer = host.request("GET", target(("hv", "v1", "pods", where, name), [("watch", "1")]))
        if answer.status == 200:
            return answer
        answer.read()
        time.sleep(LOOK_EVERY)
    host.close()
    return None


def _namespace_of(body: Body | None) -> str:
    try:
        manifest = json.loads(body) if isinstance(body, bytes) else {}
        return str(manifest["metadata"].get("namespace") or namespace())
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise InvalidInput("the manifest has no metadata") from e
