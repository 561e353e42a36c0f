"""Which template a pod VM is cloned from: found, or made now; or none, and the VM starts cold."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from hypervisor.controller.zygotes import KeptZygote
from hypervisor.errors import Conflict, HvError
from hypervisor.vmm.capabilities import HostCapabilities
from hypervisor.vmm.config import MIB, VmConfig
from hypervisor.vmm.identity import IdentityPool
from hypervisor.vmm.plan import ClonePlan, plan_template
from hypervisor.vmm.sweep import sweep
from hypervisor.vmm.templates.build import build_template, template_key
from hypervisor.vmm.templates.frames import HostFrames
from hypervisor.vmm.templates.store import TemplateStore
from hypervisor.vmm.templates.template import Template, TemplateKey
from hypervisor.vmm.vm import RunningVm

REFINED_BY = 4
"""Clones whose own faults are added to their template's working set: what its first pod did not touch, others may."""
REFINED_PAGES = 128
"""That each may add."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Templates:
    """The host's templates as its pods use them. Safe for several tasks of one loop."""

    directory: Path
    store: TemplateStore
    frames: HostFrames
    capabilities: HostCapabilities
    identities: IdentityPool
    zygote: KeptZygote
    alone: bool = True
    """No other daemon uses the folder."""
    recording: dict[Path, Template] = field(default_factory=dict)
    """Templates whose working set a clone is recording: one at a time, for it starts slower than others."""
    refined: Counter[Path] = field(default_factory=Counter)
    """Clones that have added to a template's working set since the daemon's start."""

    async def sweep(self, guest_digest: str) -> None:
        """Ends what a daemon that was killed amid making a template has left, and removes the templates of other guest
        images and other QEMUs. Before the first `clone_plan` only. Where another daemon uses the folder, which may be
        making one right now, nothing is done: the last one that is left will find it.
        """
        if not self.alone:
            return
        for path in await asyncio.to_thread(lambda: sorted(self.directory.glob("vm-*"))):
            log.info("half-made template swept", vm=path.name)
            try:
                await sweep(path, self.capabilities)
            except HvError as e:
                log.warning("half-made template cannot be swept", vm=path.name, reason=str(e))
        await self.store.sweep()
        version = ".".join(map(str, self.capabilities.qemu_version))
        for name in await self.store.prune(lambda k: (k.guest, k.qemu_version) == (guest_digest, version)):
            log.info("template removed: it fits no more", template=name)

    async def clone_plan(self, config: VmConfig) -> ClonePlan | None:
        """What a VM like `config` (its memory a size class) starts from; None: cold.

        A template that cannot be made is logged and does without: it is a way to be fast, never a condition.
        """
        identity = await asyncio.to_thread(self.identities.take)
        try:
            plan = plan_template(config, self.capabilities, self.directory / "vm", identity)
            if plan is None:
                return None
            key = template_key(plan, self.capabilities.qemu_version, config.guest.digest)
            vm_directory = self.directory / f"vm-{key.digest[:8]}"
            plan = plan_template(config, self.capabilities, vm_directory, identity)
            assert plan is not None

            async def build(folder: Path) -> None:
                await sweep(vm_directory, self.capabilities)
                await build_template(plan, self.zygote, folder)

            return await self._with_working_set(await self.store.get(key, build))
        except HvError as e:
            log.warning("no template; the VM starts cold", reason=str(e))
            return None
        finally:
            self.identities.release(identity)

    async def key(self, config: VmConfig) -> TemplateKey:
        """What a template must be of that VMs like `config` are cloned from.

        :raises Conflict: such VMs start cold
        """
        identity = await asyncio.to_thread(self.identities.take)
        try:
            plan = plan_template(config, self.capabilities, self.directory / "vm", identity)
        finally:
            self.identities.release(identity)
        if plan is None:
            raise Conflict(f"VMs like {config.name} start cold on this host: {self.capabilities.lazy_ram_unusable}")
        return template_key(plan, self.capabilities.qemu_version, config.guest.digest)

    async def _with_working_set(self, template: Template) -> ClonePlan:
        plan = self.frames.clone_plan(template)
        if await asyncio.to_thread(template.working_set):
            return dataclasses.replace(plan, working_set=True)
        if template.path in self.recording:
            return plan
        self.recording[template.path] = template
        return dataclasses.replace(plan, recording=True)

    async def keep_working_set(self, vm: RunningVm) -> None:
        """What a recording clone has touched becomes its template's working set; what the next ones touch beyond it is
        added. Never raises: another one may do.
        """
        clone = vm.plan.clone
        if clone is not None and clone.snapshot is not None:
            return  # what it touches is its own
        if clone is not None and clone.working_set:
            await self._refine(vm, clone)
        if clone is None or not clone.recording:
            return
        try:
            pages = await vm.working_set()
            template = self.recording.get(clone.template)
            if template is None:
                return  # another daemon's; but its vmx knows now that nothing is recorded any more
            await asyncio.to_thread(template.keep_working_set, pages)
            log.info("working set recorded", template=template.path.name, touched=len(pages))
        except (HvError, OSError) as e:
            log.warning("working set not recorded", template=clone.template.name, reason=str(e))
        finally:
            self.recorded(clone)

    async def _refine(self, vm: RunningVm, clone: ClonePlan) -> None:
        if self.refined[clone.template] >= REFINED_BY:
            return
        self.refined[clone.template] += 1
        try:
            pages = await vm.working_set()
            template = await asyncio.to_thread(Template.linked, vm.plan.files.template)
            template = dataclasses.replace(template, path=clone.template)
            size = await asyncio.to_thread(template.extend_working_set, pages, REFINED_PAGES)
            log.info("working set refined", template=clone.template.name, touched=len(pages), pages=size)
        except (HvError, OSError) as e:
            log.warning("working set not refined", template=clone.template.name, reason=str(e))

    def recorded(self, clone: ClonePlan | None) -> None:
        """A clone records no more, or has never run; harmless when it had not recorded."""
        if clone is not None and clone.recording:
            self.recording.pop(clone.template, None)


def size_class(config: VmConfig) -> VmConfig:
    """`config` with its memory rounded up to a size that many VMs share: each size needs a template of its own.

    Steps of an eighth of the next power of two (64 MiB at least): at most an eighth more than was asked for, and what a
    guest does not touch costs nothing.
    """
    step = max(64 * MIB, 1 << max(0, (config.memory_bytes - 1).bit_length() - 3))
    return dataclasses.replace(config, memory_bytes=-(-config.memory_bytes // step) * step)


@contextlib.contextmanager
def open_templates(
    directory: Path, capabilities: HostCapabilities, identities: IdentityPool, zygote: KeptZygote
) -> Iterator[Templates]:
    """The templates below `directory`; the page-frame database ends with the context, the VMs on it do not."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with HostFrames() as frames, _user_of(directory) as alone:
        yield Templates(directory, TemplateStore(directory), frames, capabilities, identities, zygote, alone)


@contextlib.contextmanager
def _user_of(directory: Path) -> Iterator[bool]:
    """While it is open, other daemons see that this one uses the folder. Gives whether it was the only one."""
    fd = os.open(directory / ".users", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = True
        except BlockingIOError:
            alone = False
        fcntl.flock(fd, fcntl.LOCK_SH)
        yield alone
    finally:
        os.close(fd)
