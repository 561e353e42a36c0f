"""The Service ``default/kubernetes``: how pods reach the API server by an address that stays.

Source: Kubernetes, "Accessing the Kubernetes API from a Pod".
"""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import structlog

from hypervisor.kube import meta
from hypervisor.kube.client import ApiClient, Object
from hypervisor.kube.errors import ApiError
from hypervisor.kube.resources import ENDPOINT_SLICES, SERVICES
from hypervisor.master.network.ranges import Ranges, first_address

NAMESPACE, NAME = "default", "kubernetes"
_LABELS = {"component": "apiserver", "provider": "kubernetes"}
_PORT = {"name": "https", "protocol": "TCP"}


async def ensure(client: ApiClient, ranges: Ranges, address: str, port: int) -> None:
    """Makes the Service and its EndpointSlice where they are missing, and brings them up to date.

    :param address: where the server listens; one that stands for all gets no slice
    """
    await _service(client, first_address(ranges.services[0]), port)
    if not ip_address(address).is_unspecified:
        await _slice(client, address, port)


async def _service(client: ApiClient, address: str, port: int) -> None:
    spec = {"clusterIP": address, "ports": [_PORT | {"port": 443, "targetPort": port}]}
    wanted = {"metadata": {"name": NAME, "namespace": NAMESPACE, "labels": _LABELS}, "spec": spec}
    try:
        found = await client.get(SERVICES, NAME, NAMESPACE)
        if meta.get(found, "spec", "clusterIP") == address:
            await client.patch(SERVICES, NAME, NAMESPACE, {"spec": {"ports": spec["ports"]}})
            return
        await client.delete(SERVICES, NAME, NAMESPACE)  # from before the range was changed
    except ApiError as error:
        if error.reason != "NotFound":
            raise
    try:
        await client.create(SERVICES, wanted)
    except ApiError as error:
        # Another Service has that address: clients in pods go without until it is gone.
        structlog.get_logger().error("the Service default/kubernetes cannot be made", error=str(error))


async def _slice(client: ApiClient, address: str, port: int) -> None:
    labels = {"kubernetes.io/service-name": NAME}
    family = f"IPv{ip_address(address).version}"
    wanted: Object = {
        "metadata": {"name": NAME, "namespace": NAMESPACE, "labels": labels},
        "addressType": family,
        "endpoints": [{"addresses": [address], "conditions": {"ready": True}}],
        "ports": [_PORT | {"port": port}],
    }
    try:
        found: dict[str, Any] = await client.get(ENDPOINT_SLICES, NAME, NAMESPACE)
        if found.get("addressType") == family:
            await client.patch(ENDPOINT_SLICES, NAME, NAMESPACE, {k: wanted[k] for k in ("endpoints", "ports")})
            return
        await client.delete(ENDPOINT_SLICES, NAME, NAMESPACE)
    except ApiError as error:
        if error.reason != "NotFound":
            raise
    await client.create(ENDPOINT_SLICES, wanted)
