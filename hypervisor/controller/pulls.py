"""A pod's images, fetched before its VM is started; a failure is shown as Kubernetes shows it and tried again."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable

from hypervisor.controller.backoff import BackoffPolicy
from hypervisor.controller.journal import Journal
from hypervisor.controller.podobjects import Lookup
from hypervisor.controller.pull_secrets import pull_credentials
from hypervisor.controller.record import Terminated, Waiting
from hypervisor.controller.services import ImageSource
from hypervisor.controller.spec import ContainerSpec, PodSpec
from hypervisor.errors import HvError, InvalidInput, NotFound
from hypervisor.images.credentials import Credentials
from hypervisor.images.model import Image


async def pull_all(
    pod: PodSpec,
    source: ImageSource,
    journal: Journal,
    backoff: BackoffPolicy,
    *,
    running: bool,
    secrets: Lookup | None = None,
) -> dict[str, Image]:
    """The image of each container, by its name. Tries for ever; cancel it to give up.

    :param secrets: where the pod's imagePullSecrets are
    :param running: a VM with these images runs already: exactly those are wanted, no newer ones
    """
    images: dict[str, Image] = {}
    for container in (*pod.init_containers, *pod.containers):
        image_id = journal.record.container(container.name).image_id if running else ""
        wanted = functools.partial(_resolve, container, image_id, source, secrets, pod, journal)
        if image_id:
            images[container.name] = await _pull(container, wanted, journal, backoff)
        else:
            told = functools.partial(_told, container, wanted, source, journal)
            images[container.name] = await _pull(container, told, journal, backoff)
    return images


async def _told(
    container: ContainerSpec, wanted: Callable[[], Awaitable[Image]], source: ImageSource, journal: Journal
) -> Image:
    """As `wanted`, with the Events that Kubernetes has for it."""
    name = container.image
    if not source.asks_registry(container):
        image = await wanted()
        journal.note("Normal", "Pulled", f'Container image "{name}" already present on machine', container.name)
        return image
    journal.note("Normal", "Pulling", f'Pulling image "{name}"', container.name)
    began = time.monotonic()
    image = await wanted()
    took = f"{time.monotonic() - began:.3f}s"
    said = f'Successfully pulled image "{name}" in {took} ({took} including waiting). '
    journal.note("Normal", "Pulled", f"{said}Image size: {image.size_bytes} bytes.", container.name)
    return image


async def _resolve(
    container: ContainerSpec, image_id: str, source: ImageSource, secrets: Lookup | None, pod: PodSpec, journal: Journal
) -> Image:
    """With each of the credentials that the pod's secrets have for its registry, then with the host's own."""
    keys: list[Credentials | None] = []
    if secrets is not None and pod.pull_secrets and not image_id:
        keys += await pull_credentials(secrets, pod, container.image, journal)
    for key in keys:
        try:
            return await source.resolve(container, image_id, key)
        except (InvalidInput, NotFound):  # registries say both of what one may not see
            continue
    return await source.resolve(container, image_id, None)


async def _pull(
    container: ContainerSpec, wanted: Callable[[], Awaitable[Image]], journal: Journal, backoff: BackoffPolicy
) -> Image:
    delay: float = 0.0
    while True:
        try:
            image = await wanted()
        except HvError as e:
            delay = backoff.next(delay, 0.0)
            _show_failure(container, journal, e, delay)
            await asyncio.sleep(delay)
        else:
            state = journal.record.container(container.name).state
            waiting = Waiting() if isinstance(state, Waiting) else state
            journal.container(container.name, image_id=image.id, state=waiting)
            return image


def _show_failure(container: ContainerSpec, journal: Journal, error: HvError, delay: float) -> None:
    """A container that has completed keeps its state: its image is only wanted for the record."""
    if isinstance(journal.record.container(container.name).state, Terminated):
        return
    reason = "InvalidImageName" if isinstance(error, InvalidInput) else "ErrImagePull"
    if container.pull == "Never":
        reason = "ErrImageNeverPull"
    journal.container(container.name, state=Waiting(reason, str(error)))
    if reason == "ErrImagePull":
        message = f"trying again in {delay:g}s to pull image {container.image}: {error}"
        journal.container(container.name, state=Waiting("ImagePullBackOff", message))
