"""Containers' images out of the host's image store."""

from __future__ import annotations

from dataclasses import dataclass

from hypervisor.controller.spec import ContainerSpec
from hypervisor.errors import NotFound
from hypervisor.images.credentials import Credentials
from hypervisor.images.model import Image
from hypervisor.images.policy import PullPolicy
from hypervisor.images.reference import DEFAULT_TAG, LOCAL_REGISTRY, lookups
from hypervisor.images.store import ImageStore, Lease


@dataclass(frozen=True, slots=True)
class StoredImages:
    """An `ImageSource` over an `ImageStore`."""

    store: ImageStore

    async def resolve(self, container: ContainerSpec, image_id: str, credentials: Credentials | None = None) -> Image:
        """The container's image, by its id where that is given, else by its pull policy.

        A manifest without a policy means ``Always`` for the tag ``latest``, as in Kubernetes, except for an image that
        was imported here: there is no registry to ask for that one.

        :raises HvError: it cannot be had
        """
        if image_id:
            return self.store.get(image_id)
        return await self.store.pull(container.image, policy=self._policy(container), credentials=credentials)

    def asks_registry(self, container: ContainerSpec) -> bool:
        """By its pull policy, and by what is stored."""
        policy = self._policy(container)
        if policy is not PullPolicy.MISSING:
            return policy is PullPolicy.ALWAYS
        try:
            self.store.get(container.image)
        except NotFound:
            return True
        return False

    def lease(self, image: Image) -> Lease:
        """While it is open the image is not removed."""
        return self.store.lease(image)

    def _policy(self, container: ContainerSpec) -> PullPolicy:
        if container.pull is not None:
            return PullPolicy.parse(container.pull)
        wanted = lookups(container.image)[-1]
        if wanted.digest or wanted.tag != DEFAULT_TAG or self._imported(container.image):
            return PullPolicy.MISSING
        return PullPolicy.ALWAYS

    def _imported(self, reference: str) -> bool:
        try:
            names = self.store.get(reference).names
        except NotFound:
            return False
        return any(name.startswith(f"{LOCAL_REGISTRY}/") for name in names)
