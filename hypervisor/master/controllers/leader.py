"""Of several masters on one etcd one runs the control loops: who holds a Lease.

Theory of operation
-------------------
::

    waiting --the Lease is free, or was not renewed for DURATION_S--> leading --renewed every RENEW_S--> leading
       ^                                                                 |
       +--- loops ended <--- not renewed for GIVE_UP_S, or somebody else's +      ended: let go, the next one takes it

A leader that cannot renew ends its loops before anybody may take the Lease (``GIVE_UP_S < DURATION_S``), and at once
where somebody has it all the same. Time is measured by each master's own clock from what it saw change.
Source: Kubernetes, "Leases" (leader election).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import structlog

from hypervisor.errors import HvError
from hypervisor.kube import meta
from hypervisor.kube.client import ApiClient, Object
from hypervisor.kube.errors import ApiError
from hypervisor.kube.resources import LEASES

NAMESPACE, NAME = "kube-system", "kube-controller-manager"
DURATION_S, GIVE_UP_S, RENEW_S = 15.0, 10.0, 2.0
_log = structlog.get_logger(__name__)


class Leadership:
    """Runs something only while this process holds the Lease.

    :param identity: of this master; one that was killed and starts again under the same leads on without waiting
    """

    def __init__(self, client: ApiClient, identity: str) -> None:
        self._client = client
        self._identity = identity
        self._seen: tuple[str, float] = ("", 0.0)
        self._renewed = 0.0

    async def run(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Leads whenever it can, for ever; the Lease is let go at the end."""
        while True:
            if not await self._tried():
                await asyncio.sleep(RENEW_S)
                continue
            _log.info("leads the control loops", identity=self._identity)
            await self._lead(work)
            _log.warning("leads no longer", identity=self._identity)

    async def _lead(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        task = asyncio.create_task(work(), name="leading")
        try:
            while not task.done():
                await asyncio.wait((task,), timeout=RENEW_S)
                held = await self._tried()
                if held is False or (held is None and time.monotonic() - self._renewed > GIVE_UP_S):
                    return
        finally:
            task.cancel()
            results = await asyncio.gather(task, return_exceptions=True)
            await self._let_go()
            if isinstance(results[0], Exception):
                raise results[0]

    async def _tried(self) -> bool | None:
        """Takes or renews the Lease; False: it is another's; None: nobody could be asked."""
        began = time.monotonic()
        try:
            taken = await asyncio.wait_for(self._take(), RENEW_S)
        except (HvError, TimeoutError) as error:
            _log.info("the leader's lease cannot be had", error=str(error) or "no answer")
            return None
        if taken:
            self._renewed = began
        return taken

    async def _take(self) -> bool:
        try:
            lease = await self._client.get(LEASES, NAME, NAMESPACE)
        except ApiError as error:
            if error.reason != "NotFound":
                raise
            body: Object = {"metadata": {"name": NAME, "namespace": NAMESPACE}, "spec": self._spec({})}
            await self._client.create(LEASES, body, NAMESPACE)
            return True
        holder = str(meta.get(lease, "spec", "holderIdentity", default=""))
        if holder not in ("", self._identity) and not self._has_lapsed(lease):
            return False
        await self._client.update(LEASES, {**lease, "spec": self._spec(lease.get("spec") or {})})
        return True

    def _has_lapsed(self, lease: Object) -> bool:
        version, now = meta.version_of(lease), time.monotonic()
        if self._seen[0] != version:
            self._seen = (version, now)
        return now - self._seen[1] > float(meta.get(lease, "spec", "leaseDurationSeconds", default=DURATION_S))

    def _spec(self, old: Object) -> Object:
        now, mine = meta.now(micro=True), old.get("holderIdentity") == self._identity
        return {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": max(1, int(DURATION_S)),
            "renewTime": now,
            "acquireTime": old.get("acquireTime", now) if mine else now,
            "leaseTransitions": int(old.get("leaseTransitions") or 0) + (0 if mine or not old else 1),
        }

    async def _let_go(self) -> None:
        try:
            async with asyncio.timeout(RENEW_S):
                lease = await self._client.get(LEASES, NAME, NAMESPACE)
                if meta.get(lease, "spec", "holderIdentity") == self._identity:
                    spec = {**lease["spec"], "holderIdentity": "", "leaseDurationSeconds": 1}
                    await self._client.update(LEASES, {**lease, "spec": spec})
        except (HvError, TimeoutError):
            return  # it lapses by itself
