"""What a pod's VM is started with: images and disks, the agent's arguments for each container, volumes' contents."""

from __future__ import annotations

import asyncio
import time
from contextlib import ExitStack
from typing import Any

from hypervisor.controller.environment import fetch_external
from hypervisor.controller.journal import Journal
from hypervisor.controller.machine import Machine, VmRequest
from hypervisor.controller.paths import PodPaths
from hypervisor.controller.pulls import pull_all
from hypervisor.controller.record import Waiting
from hypervisor.controller.runtime_spec import container_arguments
from hypervisor.controller.services import Services
from hypervisor.controller.sizing import VmSize
from hypervisor.controller.spec import ContainerSpec, PodSpec
from hypervisor.controller.vm_session import Arguments, Completion, rounded
from hypervisor.controller.volumes import RETRY_S, Contents, ObjectVolumes
from hypervisor.errors import HvError, InvalidInput
from hypervisor.images.model import Image

MOUNT_FAILED = "FailedMount"


class Preparation:
    """Of one pod. It holds the leases of its images until `release`."""

    def __init__(self, services: Services, journal: Journal, paths: PodPaths, uid: str) -> None:
        self.images: dict[str, Image] = {}
        """By container; of the last `pull`."""
        self._services = services
        self._journal = journal
        self._paths = paths
        self._uid = uid
        self._leases = ExitStack()

    async def pull(self, pod: PodSpec, *, running: bool) -> dict[str, Image]:
        """Every container's image, leased until the pod has ended.

        :param running: the VM runs with them already; only their configs are wanted
        """
        began = time.monotonic()
        source = self._services.images
        objects, times = self._services.objects, self._services.times
        images = await pull_all(pod, source, self._journal, times.backoff, running=running, secrets=objects)
        self.images = images
        for image in {image.id: image for image in images.values()}.values():
            self._leases.enter_context(source.lease(image))
        if not running:
            self._journal.update(timing=rounded({"pull": time.monotonic() - began}))
        return images

    def release(self) -> None:
        """Lets go of the images; harmless when there are none."""
        self._leases.close()

    def request(self, pod: PodSpec, size: VmSize) -> VmRequest:
        """The VM as it is asked of the VM manager, a disk for each image of the last `pull`."""
        disks = {image.serial: image.disk for image in self.images.values()}
        label = f"{pod.name[:50].rstrip('-.')}-{self._uid[:8]}"
        return VmRequest(self._paths.vm, size, tuple(disks.items()), pod.network.mode, label, pod.cold, pod.disks)

    def arguments(self, pod: PodSpec, images: dict[str, Image]) -> Arguments | None:
        """What the agent is to be given for each container; None, and the pod has failed, when it makes no sense."""
        arguments: dict[str, dict[str, Any]] = {}
        for container in (*pod.init_containers, *pod.containers):
            image = images[container.name]
            try:
                arguments[container.name] = container_arguments(container, pod, self._uid, image)
            except InvalidInput as e:
                reason = "CreateContainerConfigError"
                self._journal.container(container.name, state=Waiting(reason, str(e)))
                self._journal.update(phase="Failed", reason=reason, message=str(e))
                return None
        return arguments

    def completion(self, pod: PodSpec) -> Completion:
        """Makes a container's arguments anew, with what config maps and secrets say then; its disk stays."""

        async def complete(container: ContainerSpec, given: dict[str, Any]) -> dict[str, Any]:
            external = await fetch_external(self._services.objects, pod, container)
            image = self.images[container.name]
            now = container_arguments(container, pod, self._uid, image, external)
            return now | {"image_disk": given["image_disk"]}

        return complete

    async def volume_contents(self, volumes: ObjectVolumes) -> Contents:
        """What volumes hold that are made of other objects; one that is missing is waited for."""
        delay = RETRY_S[0]
        while True:
            try:
                contents = await volumes.fetch()
            except HvError as e:
                self._journal.update(reason=MOUNT_FAILED, message=str(e))
                await asyncio.sleep(delay)
                delay = min(delay * 2, RETRY_S[1])
            else:
                if self._journal.record.reason == MOUNT_FAILED:
                    self._journal.update(reason="", message="")
                return contents


def placed(arguments: Arguments, machine: Machine, images: dict[str, Image]) -> Arguments:
    """The arguments with the serials that the images' disks have in this VM."""
    return {name: given | {"image_disk": machine.disk_serial(images[name].disk)} for name, given in arguments.items()}
