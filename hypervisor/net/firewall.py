"""Puts a packet filter's state into the kernel, and looks whether it is still there."""

from __future__ import annotations

import asyncio
import json
import shutil

from hypervisor.errors import HostUnfit, Unavailable
from hypervisor.net.ruleset import FAMILY, State, render

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


async def apply(state: State) -> None:
    """Replaces the table in one transaction. Raises `Unavailable`: the old one is in force."""
    await _nft("-j", "-f", "-", text=json.dumps(render(state)))


async def tables() -> set[str]:
    """The names of all tables that the kernel has."""
    listed = json.loads(await _nft("-j", "list", "tables"))
    return {str(entry["table"]["name"]) for entry in listed.get("nftables", ()) if "table" in entry}


async def is_there(table: str) -> bool:
    """Whether the kernel has the table: somebody may have flushed it by hand."""
    return table in await tables()


async def remove(table: str) -> None:
    """Takes the table out; harmless when it is not there."""
    target = {"family": FAMILY, "name": table}
    text = json.dumps({"nftables": [{"add": {"table": target}}, {"delete": {"table": target}}]})
    await _nft("-j", "-f", "-", text=text)
