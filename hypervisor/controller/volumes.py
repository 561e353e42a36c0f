"""Volumes whose files are made of objects: fetched before the VM starts, written into it, kept up to date."""

from __future__ import annotations

import asyncio
import base64
import random
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import structlog

from hypervisor.controller.podobjects import PodObjects, VolumeFile
from hypervisor.controller.spec import PodSpec
from hypervisor.errors import HvError
from hypervisor.introspect.agent import AgentClient

REFRESH_S = 60.0
"""Between two looks at what the volumes are made of: a change reaches a running pod within about this time."""
RETRY_S = (1.0, 60.0)

Contents = Mapping[str, Sequence[VolumeFile]]
"""Files by volume."""


class ObjectVolumes:
    """Those of one pod."""

    def __init__(self, objects: PodObjects, pod: PodSpec, uid: str, *, refresh_s: float = REFRESH_S) -> None:
        self._objects = objects
        self._pod = pod
        self._uid = uid
        self._refresh_s = refresh_s
        self._volumes = [v for v in pod.volumes if v.source is not None]
        self._written: dict[str, Sequence[VolumeFile]] = {}

    async def fetch(self) -> Contents:
        """All files as of now.

        :raises HvError: an object is not there, or cannot be had
        """
        return {v.name: await self._objects.files(self._pod, self._uid, v) for v in self._volumes}

    async def fill(self, agent: AgentClient, contents: Contents) -> None:
        """As `write`, into a VM that has just been set up."""
        self._written.clear()
        await self.write(agent, contents)

    async def write(self, agent: AgentClient, contents: Contents) -> None:
        """Makes these the files of the volumes in the guest; one that has them already is left alone."""
        for name, files in contents.items():
            if self._written.get(name) != files:
                await agent.call("volume.write", {"name": name, "files": [_rendered(f) for f in files]})
                self._written[name] = files

    async def keep(self, agent: AgentClient) -> NoReturn:
        """Keeps them up to date, for ever; what fails is tried again at the next look."""
        while True:
            await asyncio.sleep(self._refresh_s * random.uniform(0.8, 1.2))
            if not self._volumes:
                continue
            try:
                await self.write(agent, await self.fetch())
            except HvError as e:
                structlog.get_logger().info("volumes not refreshed", pod=self._pod.name, error=str(e))


def _rendered(file: VolumeFile) -> dict[str, Any]:
    return {"path": file.path, "data": base64.b64encode(file.data).decode(), "mode": file.mode}
