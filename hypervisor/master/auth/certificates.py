"""Certificate signing requests in the API server: admission rules, and the controller that approves and signs.

Theory of operation::

    posted (the API server writes down by whom) -- approved, by a person or by the controller --> signed
                                                \\-- denied -> removed after an hour
    what nobody decides about is removed after a day, what was signed after an hour
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from hypervisor.kube import meta
from hypervisor.kube.client import ApiClient
from hypervisor.kube.errors import ApiError, Cause, forbidden, invalid
from hypervisor.kube.meta import Key
from hypervisor.kube.resources import CSRS, NODES, Resource
from hypervisor.master.admission.plugin import AdmissionRequest, Operation
from hypervisor.master.auth import csr, reviews
from hypervisor.master.auth.authorizer import Authorizer
from hypervisor.master.auth.ca import CertificateAuthority
from hypervisor.master.auth.user import Attributes
from hypervisor.master.auth.views import ObjectView

KEPT_DECIDED = 3600.0  # seconds
KEPT_PENDING = 24 * 3600.0
ASK_AGAIN = 0.5  # seconds until a node's request is looked at again whose Node has no addresses yet

Object = dict[str, Any]


class CertificateRequests:
    """An admission plug-in: who posted a request is what the API server knows, never what the request says; approving
    and signing need the verbs ``approve`` and ``sign`` on the signer.
    """

    operations: frozenset[Operation] = frozenset(("CREATE", "UPDATE"))
    plurals = frozenset((CSRS.qualified,))

    def __init__(self, authorizer: Authorizer) -> None:
        self._authorizer = authorizer

    async def admit(self, request: AdmissionRequest) -> None:
        """:raises ApiError: Invalid, Forbidden"""
        if request.operation == "CREATE" and not request.subresource:
            _write_down(request)
            return
        old = request.old or {}
        request.object["spec"] = old.get("spec") or request.object.get("spec")
        if request.subresource == "approval":
            self._must(request, "approve")
        elif request.subresource == "status" and _certificate(request.object) != _certificate(old):
            self._must(request, "sign")

    def _must(self, request: AdmissionRequest, verb: str) -> None:
        signer = str((request.object.get("spec") or {}).get("signerName") or "")
        names = (signer, f"{signer.partition('/')[0]}/*")
        asked = (Attributes(request.user, verb, csr.GROUP, "*", "signers", name=name) for name in names)
        if not any(self._authorizer.decide(a).allowed for a in asked):
            why = f"user not permitted to {verb} requests with signerName {signer!r}"
            raise forbidden(CSRS.group, CSRS.plural, request.name, why)


def _certificate(obj: Mapping[str, Any]) -> str:
    return str((obj.get("status") or {}).get("certificate") or "")


def _write_down(request: AdmissionRequest) -> None:
    spec: Object = request.object.setdefault("spec", {})
    for field in ("username", "uid", "groups", "extra"):
        spec.pop(field, None)
    rendered = reviews.render_user(request.user)
    spec |= rendered
    request.object.pop("status", None)
    causes = list(_causes(spec, request.object))
    if causes:
        raise invalid(CSRS.group, CSRS.kind, request.name, causes)


def _causes(spec: Mapping[str, Any], obj: Mapping[str, Any]) -> Iterable[Cause]:
    if "/" not in str(spec.get("signerName") or ""):
        yield Cause("FieldValueInvalid", "must be a domain, a slash and a name", "spec.signerName")
    if not spec.get("usages"):
        yield Cause("FieldValueRequired", "usages must be provided", "spec.usages")
    seconds = spec.get("expirationSeconds")
    if seconds is not None and (not isinstance(seconds, int) or seconds < csr.SHORTEST):
        yield Cause("FieldValueInvalid", f"must be at least {csr.SHORTEST}", "spec.expirationSeconds")
        return
    try:
        wanted = csr.parse(obj)
    except csr.BadRequestFile as error:
        yield Cause("FieldValueInvalid", str(error), "spec.request")
        return
    if wanted.signer == csr.CLIENT and "system:masters" in wanted.organizations:
        message = "use of kubernetes.io/kube-apiserver-client signer with system:masters group is not allowed"
        yield Cause("FieldValueForbidden", message, "spec.request")


def _own_key(obj: Mapping[str, Any]) -> Iterable[Key]:
    return (meta.key_of(obj),)


class CertificateController:
    """Approves what needs nobody's look, signs what is approved, and tidies up. A `Controller` of the master's."""

    name = "certificates"
    watches: Mapping[Resource, Callable[[Mapping[str, Any]], Iterable[Key]]] = {CSRS: _own_key}

    def __init__(
        self,
        client: ApiClient,
        ca: CertificateAuthority,
        authorizer: Authorizer,
        view: ObjectView,
        now: Callable[[], float] = time.time,
        *,
        approve_serving: bool = True,
    ) -> None:
        self._client = client
        self._approve_serving = approve_serving
        self._ca = ca
        self._authorizer = authorizer
        self._view = view
        self._now = now

    async def sync(self, key: Key) -> float | None:
        """One step with one request; see `hypervisor.master.controllers.base.Controller`."""
        obj = self._view.get(CSRS, key[1])
        if obj is None or meta.is_deleting(obj):
            return None
        try:
            return await self._step(dict(obj))
        except ApiError as error:
            if error.reason not in ("Conflict", "NotFound"):
                raise
            return ASK_AGAIN

    async def _step(self, obj: Object) -> float | None:
        decided = meta.is_true(obj, "Approved") or meta.is_true(obj, "Denied") or meta.is_true(obj, "Failed")
        left = self._left(obj, KEPT_DECIDED if decided else KEPT_PENDING)
        if left <= 0:
            await self._client.delete(CSRS, obj["metadata"]["name"], uid=obj["metadata"].get("uid", ""))
            return None
        if obj["spec"].get("signerName") not in csr.SIGNERS:
            return left
        if not decided:
            return await self._approve(obj, left)
        if meta.is_true(obj, "Approved") and not _certificate(obj) and not meta.is_true(obj, "Failed"):
            await self._sign(obj)
        return left

    async def _approve(self, obj: Object, left: float) -> float:
        wanted = csr.parse(obj)
        if wanted.signer == csr.SERVING and not self._approve_serving:
            return left
        if csr.approved_unasked(wanted, self._authorizer, list(self._view.list(NODES))):
            why = "Auto approving a certificate that a node may have"
            await self._put(obj, "approval", _condition("Approved", "AutoApproved", why))
            return left
        waits = wanted.signer == csr.SERVING and not csr.refusal(wanted)
        return ASK_AGAIN * 4 if waits else left

    async def _sign(self, obj: Object) -> None:
        wanted = csr.parse(obj)
        why = csr.refusal(wanted)
        if why:
            await self._put(obj, "status", _condition("Failed", "SignerValidationFailure", why))
            return
        certificate = base64.b64encode(csr.sign(self._ca, wanted)).decode()
        await self._client.update(
            CSRS, obj | {"status": {**obj["status"], "certificate": certificate}}, subresource="status"
        )

    async def _put(self, obj: Object, subresource: str, condition: Object) -> None:
        status = dict(obj.get("status") or {})
        status["conditions"] = [*(status.get("conditions") or ()), condition]
        await self._client.update(CSRS, obj | {"status": status}, subresource=subresource)

    def _left(self, obj: Object, kept: float) -> float:
        """Seconds until it is removed."""
        return meta.parse_time(obj["metadata"]["creationTimestamp"]) + kept - self._now()


def _condition(kind: str, reason: str, message: str) -> Object:
    now = meta.now()
    return {
        "type": kind,
        "status": "True",
        "reason": reason,
        "message": message,
        "lastUpdateTime": now,
        "lastTransitionTime": now,
    }
