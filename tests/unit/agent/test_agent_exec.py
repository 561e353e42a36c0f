"""exec through the real hv-exec, into namespaces of the test's own on the host's root."""

from __future__ import annotations

import asyncio
import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
from agent_under_test import AgentUnderTest, Client, open_descriptors, until

from hypervisor.agent import wire
from hypervisor.agent.container import Container
from hypervisor.agent.wire import FrameType

pytestmark = pytest.mark.root


async def start(agent: AgentUnderTest, *argv: str, **args: Any) -> Client:
    client = await agent.connect()
    answer = await client.ask("exec", container="main", argv=list(argv), **args)
    assert answer["ok"], answer
    assert answer["result"]["pid"] > 1
    return client


async def run(agent: AgentUnderTest, *argv: str, **args: Any) -> tuple[bytes, bytes, dict[str, Any]]:
    async with asyncio.timeout(20):
        return await (await start(agent, *argv, **args)).finish()


def namespaces_of(pid: int) -> list[str]:
    return [str(Path(f"/proc/{pid}/ns/{name}").readlink()) for name in ("pid", "mnt")]


async def test_streams_apart_and_exit_code(agent: AgentUnderTest, standin: Container) -> None:
    out, err, body = await run(agent, "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (out, err) == (b"out\n", b"err\n")
    assert body == {"exit_code": 7, "signal": None, "error": None}


async def test_it_is_inside(agent: AgentUnderTest, standin: Container) -> None:
    out, _, _ = await run(
        agent, "sh", "-c", "readlink /proc/self/ns/pid /proc/self/ns/mnt; cat /proc/1/comm; ls /proc/self/fd"
    )
    namespaces = namespaces_of(standin.pid)
    lines = out.decode().split()
    assert lines[:3] == [*namespaces, "sleep"]
    assert lines[3:] == ["0", "1", "2", "3"], "nothing but the streams and ls's own directory is open"


async def test_killed_by_a_signal(agent: AgentUnderTest, standin: Container) -> None:
    client = await start(agent, "sleep", "100")
    await client.send(FrameType.SIGNAL, bytes([15]))
    _, _, body = await client.finish()
    assert body == {"exit_code": 143, "signal": 15, "error": None}


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["nosuch"], 127, '"nosuch": executable not found'),
        (["/no/such"], 127, '"/no/such": executable not found'),
        ([""], 127, '"": executable not found'),
        (["/etc/passwd"], 126, "Permission denied"),
        (["/etc"], 126, "Is a directory"),
    ],
)
async def test_programs_that_cannot_be_run(
    agent: AgentUnderTest, standin: Container, argv: list[str], code: int, message: str
) -> None:
    out, err, body = await run(agent, *argv)
    assert (out, err, body["exit_code"]) == (b"", b"", code)
    assert message in body["error"]["message"]
    assert body["error"]["reason"] == ("NotFound" if code == 127 else "Invalid")


async def test_a_working_directory_that_is_not_there(agent: AgentUnderTest, standin: Container) -> None:
    _, _, body = await run(agent, "true", cwd="/no/dir")
    assert body["exit_code"] == 126
    assert body["error"]["message"] == 'working directory "/no/dir": No such file or directory'


async def test_environment_user_and_directory(agent: AgentUnderTest, standin: Container) -> None:
    user = {"uid": 1234, "gid": 99, "groups": [7, 8]}
    out, err, _ = await run(
        agent, "sh", "-c", "id; pwd; echo $FROM $MORE $HOME", env={"MORE": "x y"}, cwd="/usr", user=user
    )
    assert err == b""
    assert b"uid=1234 gid=99" in out and b"7(lp),8(mail)" in out
    assert out.endswith(b"/usr\nimage x y /\n")


async def test_capabilities_are_the_containers(agent: AgentUnderTest, standin: Container) -> None:
    wanted = next(r for r in standin.exec_prefix.split(b"\0") if r.startswith(b"caps=")).decode()[5:].split(",")
    out, _, _ = await run(agent, "grep", "^Cap", "/proc/self/status")
    found = {line.split(":")[0]: int(line.split()[1], 16) for line in out.decode().splitlines()}
    assert found["CapBnd"] == found["CapPrm"] == found["CapEff"] == int(wanted[0], 16)
    assert found["CapInh"] == found["CapAmb"] == 0
    out, _, _ = await run(agent, "grep", "^CapEff", "/proc/self/status", user={"uid": 1, "gid": 1})
    assert int(out.split()[1], 16) == 0


async def test_no_new_privileges(agent: AgentUnderTest, standin: Container) -> None:
    standin.exec_prefix += b"nnp=1\0"
    out, _, _ = await run(agent, "grep", "NoNewPrivs", "/proc/self/status")
    assert out.split()[1] == b"1"


async def test_half_close_and_much_data_both_ways(agent: AgentUnderTest, standin: Container) -> None:
    data = os.urandom(20 << 20)
    client = await start(agent, "cat", stdin=True)

    async def feed() -> None:
        for i in range(0, len(data), wire.MAX_DATA):
            await client.send(FrameType.STDIN, data[i : i + wire.MAX_DATA])
        await client.send(FrameType.STDIN)

    async with asyncio.timeout(60):
        (out, _, body), _ = await asyncio.gather(client.finish(), feed())
    assert hashlib.sha256(out).digest() == hashlib.sha256(data).digest()
    assert body["exit_code"] == 0


async def test_input_that_nobody_reads_is_dropped(agent: AgentUnderTest, standin: Container) -> None:
    client = await start(agent, "true", stdin=True)
    try:
        for _ in range(40):
            await client.send(FrameType.STDIN, bytes(wire.MAX_DATA))
    except ConnectionError:
        return  # END was sent and the connection closed meanwhile
    assert (await client.finish())[2]["exit_code"] == 0


async def test_a_background_process_does_not_hold_the_call(agent: AgentUnderTest, standin: Container) -> None:
    out, _, body = await run(agent, "sh", "-c", "sleep 60 & head -c 300000 /dev/zero; echo end")
    assert len(out) == 300004 and out.endswith(b"end\n")
    assert body["exit_code"] == 0


async def test_terminal(agent: AgentUnderTest, standin: Container) -> None:
    client = await start(
        agent, "sh", "-c", "tty; stty size; read x; stty size; exit 4", tty=True, stdin=True, columns=100, rows=30
    )
    await client.send(FrameType.RESIZE, wire.pack_resize(77, 22)[wire.HEADER.size :])
    await client.send(FrameType.STDIN, b"go\n")
    out, err, body = await client.finish()
    assert err == b"" and body["exit_code"] == 4
    assert b"/dev/pts/0\r\n" in out and out.endswith(b"22 77\r\n")


async def test_a_client_that_goes_hangs_the_terminal_up(agent: AgentUnderTest, standin: Container) -> None:
    client = await start(agent, "sleep", "1000", tty=True, stdin=True)
    await _gone_with(agent, client, b"sleep\x001000", 1)


async def test_a_client_that_goes_closes_the_pipes(agent: AgentUnderTest, standin: Container) -> None:
    client = await start(agent, "cat", stdin=True)
    await _gone_with(agent, client, b"cat\x00", 0)


async def _gone_with(agent: AgentUnderTest, client: Client, command: bytes, others: int) -> None:
    client.writer.close()
    script = "cat /proc/[0-9]*/cmdline | tr '\\0' '@' | grep -c " + command.replace(b"\0", b"@").decode()
    async with asyncio.timeout(10):
        while int((await run(agent, "sh", "-c", script))[0]) > 1 + others:  # this command line itself is one
            pass


async def test_no_descriptor_and_no_process_stays(agent: AgentUnderTest, standin: Container) -> None:
    await run(agent, "true")
    before = open_descriptors()
    for _ in range(30):
        await run(agent, "true")
        await run(agent, "nosuch", tty=True)
        await run(agent, "true", tty=True, stdin=True)
    await agent.close()
    await until(lambda: open_descriptors() <= before)


async def test_many_at_once(agent: AgentUnderTest, standin: Container) -> None:
    results = await asyncio.gather(*(run(agent, "sh", "-c", f"echo {i}; exit {i}") for i in range(40)))
    assert [(int(out), body["exit_code"]) for out, _, body in results] == [(i, i) for i in range(40)]


async def test_a_container_that_has_ended(agent: AgentUnderTest, standin: Container) -> None:
    os.kill(standin.pid, 9)
    answer = await (await agent.connect()).ask("exec", container="main", argv=["true"])
    while answer["ok"]:
        answer = await (await agent.connect()).ask("exec", container="main", argv=["true"])
    assert "it may just have ended" in answer["error"]["message"] or "start a process" in answer["error"]["message"]


@pytest.mark.parametrize(
    "request_text", [b"", b"arg=x", b"what=1\0arg=x\0", b"uid=x\0arg=x\0", b"noequals\0arg=x\0", b"cwd=/\0"]
)
async def test_malformed_requests_of_hv_exec(agent: AgentUnderTest, standin: Container, request_text: bytes) -> None:
    standin.exec_prefix = request_text + (b"\0" if request_text and not request_text.endswith(b"\0") else b"")
    answer = await (await agent.connect()).ask("exec", container="main", argv=["true"], cwd="/")
    if request_text in (b"", b"cwd=/\0"):
        assert "namespaces" in answer["error"]["message"], "no pidfd"
    elif request_text != b"arg=x":
        assert answer["error"]["message"] == "cannot read the request: Invalid argument"
