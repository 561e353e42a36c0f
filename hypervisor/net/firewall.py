"""Puts a packet filter's table into the kernel, and looks whether it is still there."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterable
from typing import Any

from hypervisor.errors import HostUnfit, Unavailable
from hypervisor.net.table import FAMILY, Command, Table, lacks

_PATIENCE_S = 60


async def _nft(*words: str, text: str | None = None) -> str:
    program = shutil.which("nft", path="/usr/sbin:/sbin:/usr/bin:/bin")
    if program is None:
        raise HostUnfit("the pod network needs nft: install nftables")
    process = await asyncio.create_subprocess_exec(
        program, *words, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(_PATIENCE_S):
            out, err = await process.communicate(None if text is None else text.encode())
    except BaseException:
        if process.returncode is None:
            process.kill()
            await process.wait()
        raise
    if process.returncode:
        raise Unavailable(f"nft refused the packet filter of this host: {err.decode(errors='replace').strip()[:500]}")
    return out.decode()


async def apply(commands: Iterable[Command]) -> None:
    """One transaction. Raises `Unavailable`: nothing was changed."""
    text = await asyncio.to_thread(json.dumps, {"nftables": list(commands)})
    await _nft("-j", "-f", "-", text=text)


async def tables() -> set[str]:
    """The names of all tables that the kernel has."""
    listed = json.loads(await _nft("-j", "list", "tables"))
    return {str(entry["table"]["name"]) for entry in listed.get("nftables", ()) if "table" in entry}


async def missing(table: Table) -> list[str]:
    """What the kernel's table lacks, or has too much of: somebody may have flushed it by hand. Empty: it is whole.

    :raises Unavailable: nft fails
    """
    if table.name not in await tables():
        return [table.name]
    text = await _nft("-j", "list", "table", FAMILY, table.name)
    return await asyncio.to_thread(lambda: lacks(_entries(text), table))


def _entries(text: str) -> list[dict[str, Any]]:
    return list(json.loads(text).get("nftables", ()))


async def remove(table: str) -> None:
    """Takes the table out; harmless when it is not there."""
    target = {"family": FAMILY, "name": table}
    await apply([{"add": {"table": target}}, {"delete": {"table": target}}])
