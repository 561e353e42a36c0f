"""The way to a pod's node: where it serves, and how what a client asked is asked of it.

Source: Kubernetes, the kubelet's routes (``/containerLogs``, ``/exec``, ``/attach``, ``/portForward``).
"""

from __future__ import annotations

import ssl
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode

import aiohttp
from aiohttp import web
from aiohttp.web_request import BaseRequest
from yarl import URL

from hypervisor.errors import Unavailable
from hypervisor.kube import meta
from hypervisor.kube.errors import ApiError, bad_request, not_found
from hypervisor.master.api.splice import CONNECT_S, NodeAddress, splice

ROUTES: Mapping[str, str] = {
    "exec": "exec",
    "attach": "attach",
    "debug": "debug",
    "portforward": "portForward",
    "log": "containerLogs",
}
"""The kubelet's route by the pod's subresource."""
_RENAMED = {"stdin": "input", "stdout": "output", "stderr": "error"}
_AS_IT_IS = frozenset(("tty", "replay", "exitCode"))
"""The last two are this project's own: what a container has written so far, and its exit code."""
_ONLY_HERE = frozenset(("container", "pretty", "insecureSkipTLSVerifyBackend"))
_TRUE = frozenset(("true", "1"))
_CHUNK = 64 << 10
_ADDRESSES = ("InternalIP", "ExternalIP", "Hostname", "InternalDNS")


class Kubelets:
    """Connections to nodes, with the master's certificate. One event loop; `close` ends them."""

    def __init__(self, tls: ssl.SSLContext) -> None:
        self._tls = tls
        self._session: aiohttp.ClientSession | None = None

    def address(self, node: Mapping[str, Any]) -> NodeAddress:
        """Where a node serves.

        :raises ApiError: its status does not say
        """
        port = meta.get(node, "status", "daemonEndpoints", "kubeletEndpoint", "Port", default=0)
        addresses = {a.get("type"): a.get("address") for a in meta.get(node, "status", "addresses", default=())}
        host = next((addresses[kind] for kind in _ADDRESSES if addresses.get(kind)), "")
        if not port or not host:
            name = meta.get(node, "metadata", "name", default="")
            raise ApiError("ServiceUnavailable", f"node {name} has not said yet where it serves (status.addresses)")
        return NodeAddress(str(host), int(port), self._tls)

    async def splice(self, request: BaseRequest, address: NodeAddress, target: str) -> web.StreamResponse:
        """See `hypervisor.master.api.splice`."""
        return await splice(request, address, target)

    async def relay(
        self, request: BaseRequest, address: NodeAddress, target: str, body: bytes = b""
    ) -> web.StreamResponse:
        """Passes an ordinary request on and its answer back, as it comes.

        :raises Unavailable: the node cannot be reached
        """
        timeout = aiohttp.ClientTimeout(connect=CONNECT_S)
        host = f"[{address.host}]" if ":" in address.host else address.host
        url = f"https://{host}:{address.port}{target}"
        try:
            answer = await self._client().request(
                request.method,
                URL(url, encoded=True),
                ssl=address.tls,
                timeout=timeout,
                data=body or None,
                headers={"Content-Type": request.headers.get("Content-Type", "")} if body else None,
            )
        except (aiohttp.ClientError, TimeoutError) as e:
            raise Unavailable(f"error dialing backend: {address.host}:{address.port}: {e or 'no answer'}") from e
        async with answer:
            content_type = answer.headers.get("Content-Type", "text/plain")
            response = web.StreamResponse(status=answer.status, headers={"Content-Type": content_type})
            await response.prepare(request)
            try:
                async for chunk in answer.content.iter_any():
                    await response.write(chunk)
            except aiohttp.ClientError:
                if request.transport is not None:  # a cut stream must not look complete
                    request.transport.abort()
                raise ConnectionResetError("the node has gone") from None
            await response.write_eof()
        return response

    async def fetch(self, address: NodeAddress, target: str, limit: int) -> bytes:
        """A small document of a node's.

        :param limit: of its size, in bytes
        :raises Unavailable: the node cannot be reached, or does not give it
        """
        host = f"[{address.host}]" if ":" in address.host else address.host
        try:
            async with self._client().get(f"https://{host}:{address.port}{target}", ssl=address.tls) as answer:
                body = await answer.content.read(limit + 1) if answer.status == 200 else b""
                while len(body) <= limit and (more := await answer.content.read(limit)):
                    body += more
        except (aiohttp.ClientError, TimeoutError) as e:
            raise Unavailable(f"{address.host}:{address.port}{target}: {e or 'no answer'}") from e
        if answer.status != 200 or len(body) > limit:
            raise Unavailable(f"{address.host}:{address.port}{target}: answered with {answer.status}")
        return body

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                auto_decompress=False, connector=aiohttp.TCPConnector(limit=0), cookie_jar=aiohttp.DummyCookieJar()
            )
        return self._session

    async def close(self) -> None:
        """Ends all relays under way."""
        if self._session is not None:
            await self._session.close()


def target_of(pod: Mapping[str, Any], subresource: str, container: str, query_string: str) -> str:
    """Path and query at the node.

    :param container: empty for what is about none
    :param query_string: of the client's request
    """
    metadata = pod["metadata"]
    parts = [ROUTES[subresource], metadata["namespace"], metadata["name"], *([container] if container else [])]
    # A command's words are bytes, which need not be text: they come out as they went in.
    given = parse_qsl(query_string, keep_blank_values=True, errors="surrogateescape")
    pairs = [(k, v) for k, v in given if k not in _ONLY_HERE]
    if subresource in ("exec", "attach", "debug"):
        pairs = list(_stream_parameters(pairs))
    if subresource == "portforward":
        pairs = [("port", v) for k, v in pairs if k in ("ports", "port")]
    path = "/".join(quote(p, safe="") for p in parts)
    return f"/{path}" + (f"?{urlencode(pairs, errors='surrogateescape')}" if pairs else "")


def _stream_parameters(pairs: Iterable[tuple[str, str]]) -> Iterable[tuple[str, str]]:
    """The kubelet has other names for the streams, and knows 1 only."""
    for key, value in pairs:
        if key == "command":
            yield key, value
        elif (key in _RENAMED or key in _AS_IT_IS) and value.lower() in _TRUE:
            yield _RENAMED.get(key, key), "1"


def container_of(pod: Mapping[str, Any], wanted: str) -> str:
    """The container that a request is about.

    :raises ApiError: none is named and the pod has several, or it has none of that name
    """
    spec, name = pod.get("spec") or {}, pod["metadata"]["name"]
    names = [c["name"] for key in ("containers", "initContainers") for c in spec.get(key) or ()]
    if wanted:
        if wanted not in names:
            raise bad_request(f"container {wanted} is not valid for pod {name}")
        return wanted
    regular = [c["name"] for c in spec.get("containers") or ()]
    if len(regular) == 1:
        return str(regular[0])
    annotated = meta.get(pod, "metadata", "annotations", "kubectl.kubernetes.io/default-container", default="")
    if annotated in regular:
        return str(annotated)
    raise bad_request(f"a container name must be specified for pod {name}, choose one of: [{' '.join(regular)}]")


def node_of(pod: Mapping[str, Any]) -> str:
    """The name of the node that runs it.

    :raises ApiError: none does
    """
    node = meta.get(pod, "spec", "nodeName", default="")
    if not node:
        raise bad_request(f"pod {pod['metadata']['name']} does not have a host assigned")
    return str(node)


def no_node(name: str) -> ApiError:
    """404 for the node of a pod."""
    return not_found("", "nodes", name)
