"""Paths that are no resources: discovery, OpenAPI, health, version, metrics, keys of service-account tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from aiohttp import web

from hypervisor.kube.errors import ApiError
from hypervisor.master.api import discovery, encode
from hypervisor.master.api.exchange import Exchange, not_allowed, unknown
from hypervisor.master.api.inside import Inside
from hypervisor.master.api.negotiate import representation
from hypervisor.master.api.openapi import OpenApi

_DISCOVERED = frozenset(("/api", "/apis"))
_HEALTH = ("/healthz", "/livez", "/readyz")


class Plain:
    """Answers them; the documents are made once, and anew when users define kinds."""

    def __init__(self, inside: Inside) -> None:
        self._inside = inside
        self._generation = -1
        self._documents: dict[str, bytes] = {}
        self._aggregated: dict[tuple[str, str], bytes] = {}
        self._openapi = OpenApi(inside.kinds)
        self._calls: dict[str, Callable[[], Any]] = {
            "/.well-known/openid-configuration": lambda: inside.tokens.openid_configuration(inside.base_url),
            "/openid/v1/jwks": inside.tokens.jwks,
        }

    def _refresh(self) -> None:
        """Makes the documents of discovery anew after a change of what is served."""
        inside = self._inside
        if self._generation == inside.kinds.generation:
            return
        self._documents = discovery.documents(inside.kinds, inside.base_url.removeprefix("https://"))
        self._documents["/"] = encode.dumps({"paths": sorted(self._paths())})
        self._aggregated = {
            (path, version): encode.dumps(discovery.aggregated(inside.kinds, path == "/api", version))
            for path in _DISCOVERED
            for version in ("v2", "v2beta1")
        }
        self._openapi = OpenApi(inside.kinds)
        self._generation = inside.kinds.generation

    def _paths(self) -> list[str]:
        own = ["/.well-known/openid-configuration", "/openid/v1/jwks", "/metrics", "/openapi/v2", "/openapi/v3"]
        return [*self._documents, *_HEALTH, *own]

    async def answer(self, exchange: Exchange) -> web.StreamResponse:
        """See the module.

        :raises ApiError: NotFound
        """
        self._refresh()
        path = exchange.info.path.rstrip("/") or "/"
        if exchange.info.verb not in ("get", "head"):
            raise not_allowed() if path in self._documents else unknown()
        if path in _DISCOVERED:
            form = representation(exchange.request.headers.get("Accept", ""), discovery=True)
            if form.as_:
                media = f"application/json;g=apidiscovery.k8s.io;v={form.version};as=APIGroupDiscoveryList"
                return exchange.raw(self._aggregated[path, form.version], media=media)
        if path in self._documents:
            return exchange.raw(self._documents[path])
        if path in self._calls:
            return exchange.raw(encode.dumps(self._calls[path]()))
        if path == "/metrics":
            return exchange.raw(self._inside.metrics.text(), media="text/plain; version=0.0.4; charset=utf-8")
        if path.startswith("/openapi/"):
            return await self._openapi.answer(exchange, path)
        return self._health(exchange, path)

    def _health(self, exchange: Exchange, path: str) -> web.Response:
        """``ok``, or which check fails; each check has a path of its own below."""
        root, _, one = path.strip("/").partition("/")
        if f"/{root}" not in _HEALTH:
            raise unknown()
        checks = {"ping": lambda: "", **self._inside.checks}
        if one:
            if one not in checks:
                raise unknown()
            checks = {one: checks[one]}
        found = {name: check() for name, check in checks.items()}
        bad = [name for name, why in found.items() if why]
        lines = [f"[-]{n} failed: {w}" if w else f"[+]{n} ok" for n, w in found.items()]
        if bad:
            text = "\n".join([*lines, f"{root} check failed"])
            return exchange.raw(text.encode() + b"\n", 500, media="text/plain; charset=utf-8")
        verbose = "verbose" in exchange.info.query
        text = "\n".join([*lines, f"{root} check passed\n"]) if verbose else "ok"
        return exchange.raw(text.encode(), media="text/plain; charset=utf-8")


def refused(path: str) -> ApiError:
    """404 that names the path."""
    return ApiError("NotFound", f"the server could not find the requested resource: {path}")
