"""What introspection must know of a pod: where its agent is, and where its logs lie once the VM is off."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from hypervisor.errors import InvalidInput, NotFound
from hypervisor.vsock.address import VsockAddress


@dataclass(frozen=True)
class PodTarget:
    """A pod as a destination of introspection commands.

    :ivar address: the VM's vsock address; None while the pod has no running VM
    :ivar containers: names, in the manifest's order; the first is the default
    :ivar archived_logs: folder with the log files that were taken out of the VM before it was stopped; None before that
    :ivar detail: why there is no address, in a user's words ("has succeeded", "is still pulling its image")
    """

    namespace: str
    name: str
    address: VsockAddress | None
    containers: tuple[str, ...]
    archived_logs: Path | None = None
    detail: str = "has no running VM"

    def container(self, name: str | None) -> str:
        """The container that `name` means; the pod's first when it is empty.

        :raises NotFound: the pod has no such container; the message lists those it has
        :raises InvalidInput: the pod has no containers at all
        """
        if not self.containers:
            raise InvalidInput(f"pod {self.name} has no containers")
        if not name:
            return self.containers[0]
        if name not in self.containers:
            raise NotFound(f"pod {self.name} has no container {name}; it has {', '.join(self.containers)}")
        return name


class PodLookup(Protocol):
    """Whoever owns the pods."""

    def find(self, namespace: str, name: str) -> PodTarget:
        """The pod as a target; never blocks.

        :raises NotFound: there is no such pod
        """
