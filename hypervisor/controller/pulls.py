"""A pod's images, fetched before its VM is started; a failure is shown as Kubernetes shows it and tried again."""

from __future__ import annotations

import asyncio

from hypervisor.controller.backoff import BackoffPolicy
from hypervisor.controller.journal import Journal
from hypervisor.controller.record import Terminated, Waiting
from hypervisor.controller.services import ImageSource
from hypervisor.controller.spec import ContainerSpec, PodSpec
from hypervisor.errors import HvError, InvalidInput
from hypervisor.images.model import Image


async def pull_all(
    pod: PodSpec, source: ImageSource, journal: Journal, backoff: BackoffPolicy, *, running: bool
) -> dict[str, Image]:
    """The image of each container, by its name. Tries for ever; cancel it to give up.

    :param running: a VM with these images runs already: exactly those are wanted, no newer ones
    """
    images: dict[str, Image] = {}
    for container in (*pod.init_containers, *pod.containers):
        image_id = journal.record.container(container.name).image_id if running else ""
        images[container.name] = await _pull(container, image_id, source, journal, backoff)
    return images


async def _pull(
    container: ContainerSpec, image_id: str, source: ImageSource, journal: Journal, backoff: BackoffPolicy
) -> Image:
    delay: float = 0.0
    while True:
        try:
            image = await source.resolve(container, image_id)
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
