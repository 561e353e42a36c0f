"""The templates of a host: made on demand, kept on disk, one builder at a time.

Theory of operation
-------------------
``get`` finds a template or has it built::

    look -> fits ------------------------------------------------> Template
         -> absent or damaged -> lock -> look again -> build in a folder of its own -> rename -> Template

The lock is a file lock (other daemons on the same folder) inside an asyncio lock (other pods of this one): whoever
comes second finds the first one's work. A build that fails or is cancelled leaves nothing; one that was killed leaves a
folder ``.build-*``, which the next builder sweeps while it holds the lock, or the next daemon with `sweep`.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections import defaultdict
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import structlog

from hypervisor.vmm.directory import disk_error
from hypervisor.vmm.filelock import locked
from hypervisor.vmm.templates.template import Template, TemplateDamaged, TemplateKey, key_of, write_template

log = structlog.get_logger(__name__)

#: builds ``ram`` and ``state`` in the folder that it is given
Builder = Callable[[Path], Awaitable[None]]


class TemplateStore:
    """Templates below one folder. One a daemon; safe beside other daemons' on the same folder."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    def path(self, key: TemplateKey) -> Path:
        """Where the template of `key` is, if there is one."""
        return self._directory / key.digest

    async def get(self, key: TemplateKey, build: Builder, *, progress: Callable[[str], None] | None = None) -> Template:
        """The template of `key`, built now if there is none that fits.

        :param build: makes ``ram`` and ``state`` in a folder; awaited by one caller at a time
        :param progress: told in a few words why this takes seconds
        :raises HvError: as `build` raises; the next caller tries again
        """
        with contextlib.suppress(TemplateDamaged):  # said below, once
            found = await asyncio.to_thread(Template.load, self.path(key), key)
            if found is not None:
                return found
        async with self._locks[key.digest], self._file_lock(key):
            found = await self._look(key)
            if found is not None:
                return found
            if progress is not None:
                progress("making a template, once for this kind of VM")
            return await self._build(key, build)

    async def _look(self, key: TemplateKey) -> Template | None:
        try:
            return await asyncio.to_thread(Template.load, self.path(key), key)
        except TemplateDamaged as e:
            log.warning("template is built anew", reason=str(e))
            return None

    async def _build(self, key: TemplateKey, build: Builder) -> Template:
        folder = self._directory / f".build-{key.digest}"
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        try:
            folder.mkdir(mode=0o700)
            await build(folder)
            made = await asyncio.to_thread(write_template, folder, key)
            await asyncio.to_thread(_replace, folder, self.path(key))
        except OSError as e:
            raise disk_error(e, f"cannot make a template in {self._directory}") from e
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        return Template(self.path(key), made.manifest)

    def _file_lock(self, key: TemplateKey) -> AbstractAsyncContextManager[None]:
        return locked(self._directory / f".lock-{key.digest}", f"cannot make a template in {self._directory}")

    async def sweep(self) -> None:
        """Removes what builders that were killed left behind; only while nobody else builds."""

        def work() -> None:
            for folder in self._directory.glob(".build-*"):
                shutil.rmtree(folder, ignore_errors=True)

        await asyncio.to_thread(work)

    def sizes(self) -> list[int]:
        """Memory sizes, in bytes and ascending, of VMs for which there is a template. Looks at the disk."""
        return sorted({ram.stat().st_size for ram in self._directory.glob("[0-9a-f]*/ram")})

    async def prune(self, fits: Callable[[TemplateKey], bool]) -> list[str]:
        """Removes the templates whose key does not fit any more, and what is none; their names.

        Clones that run hold their template's RAM open and are not disturbed. Only while nobody else builds.
        """

        def work() -> list[str]:
            gone = []
            for folder in sorted(p for p in self._directory.glob("[0-9a-f]*") if p.is_dir()):
                key = key_of(folder)
                if key is None or not fits(key):
                    shutil.rmtree(folder, ignore_errors=True)
                    gone.append(folder.name)
            return gone

        return await asyncio.to_thread(work)


def _replace(new: Path, path: Path) -> None:
    """A damaged template moves out of the way first: a folder cannot be replaced by rename unless it is empty."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    new.rename(path)
