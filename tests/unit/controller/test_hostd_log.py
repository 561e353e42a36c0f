"""The daemon's log, as strangers would like to write it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

SERVER = """
import asyncio, sys
from pathlib import Path
from aiohttp import web
from hypervisor.controller import logs

async def broken(request):
    raise ValueError("ours")

async def main():
    logs.set_up(Path(sys.argv[1]))
    app = web.Application()
    app.router.add_get("/broken", broken)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def _send(port: int, data: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    answer = await reader.readuntil(b"\r\n")
    writer.close()
    return answer


async def test_what_is_no_http_is_not_logged(tmp_path: Path) -> None:
    """What is our own fault is."""
    command = [sys.executable, "-c", SERVER, str(tmp_path / "hostd.log")]
    server = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    try:
        assert server.stdout is not None
        async with asyncio.timeout(60):
            port = int(await server.stdout.readline())
            for _ in range(5):
                assert b" 400 " in await _send(port, b"\xff\xfe noise\r\n\r\n")
            assert b" 500 " in await _send(port, b"GET /broken HTTP/1.1\r\nHost: x\r\n\r\n")
    finally:
        server.kill()
        await server.wait()
    text = (tmp_path / "hostd.log").read_text()
    assert "ours" in text and "noise" not in text and text.count("\n") == 1
