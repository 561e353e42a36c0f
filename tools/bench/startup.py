"""How long a container takes from the command to its exit, cloned and cold, and an exec in a running pod."""

from __future__ import annotations

import asyncio
import json
import time
from concurrent.futures import ThreadPoolExecutor

from aiohttp import ClientSession
from host import Host, fresh_host
from measure import Figure, interleaved

TRUE = ("busybox", "--", "true")
AT_ONCE = (10, 30)
WARM = 2
WARM_PHASES = ("vm", "boot", "setup", "containers")
#: of the command's own timing: from the request at the daemon to the container's exit
_REQUEST_TO_EXIT = ("create", "start", "run")


def run(rounds: int) -> list[Figure]:
    """Start by template and cold, each phase of both; warm exec through the command line and without it."""
    with fresh_host("busybox") as host:
        made = host.seconds("run", "--rm", *TRUE)
        host.run("run", "-d", "--name", "warm", "busybox", "--", "sleep", "100000")
        host.run("exec", "warm", "--", "true")
        host.run("run", "--rm", *TRUE)  # the first clone has recorded the working set of those after it
        phases: dict[str, list[dict[str, float]]] = {"clone": [], "cold": []}
        samples = interleaved(
            rounds,
            clone=lambda: _timed_run(host, phases["clone"]),
            cold=lambda: _timed_run(host, phases["cold"], "--cold"),
            exec_cli=lambda: host.seconds("exec", "warm", "--", "true") * 1e3,
            exec_daemon=lambda: asyncio.run(_exec_seconds(host)) * 1e3,
            version=lambda: host.seconds("version") * 1e3,
        )
        crowds = {count: _at_once(host, count) for count in AT_ONCE}
    figures = [
        Figure("cold `hv run --rm --cold busybox -- true`, whole process", "s", samples["cold"], bar=8.0),
        Figure("`hv run --rm busybox -- true` from a template, whole process", "s", samples["clone"]),
        Figure("the same when the template has to be made", "s", (made,)),
        Figure("warm exec of `true`, WebSocket request to status", "ms", samples["exec_daemon"], bar=40.0),
        Figure("warm `hv exec POD -- true`, whole process", "ms", samples["exec_cli"], bar=150.0),
        Figure("beside it: `hv version`, whole process", "ms", samples["version"]),
    ]
    figures += _start_figures(phases["clone"])
    figures += _warm_figures(rounds)
    figures += [_at_once_figure(count, exits) for count, exits in crowds.items()]
    for kind, rows in phases.items():
        for name in rows[0]:
            figures.append(Figure(f"{kind}: phase {name}", "s", tuple(row[name] for row in rows if name in row)))
    return figures


def _start_figures(rows: list[dict[str, float]]) -> list[Figure]:
    exits = tuple(row["request to exit"] for row in rows)
    first = tuple(row["vm"] + row["boot"] + row["setup"] for row in rows)
    return [
        Figure("from a template: request at the daemon to the container's exit, p50", "s", exits, bar=0.60),
        Figure("the same, the slowest of these", "s", (max(exits),), bar=1.2),
        # The first answer is that to setup, which is at its end; some 30 ms of this are before QEMU's start.
        Figure("clone: QEMU's start to the agent's first answer, at most", "s", first, bar=0.35),
    ]


def _warm_figures(rounds: int) -> list[Figure]:
    """Starts out of the warm pool, each when the pool is full again."""
    rows: list[dict[str, float]] = []
    with fresh_host("busybox") as host:
        host.run("run", "--rm", *TRUE)
        host.run("run", "--rm", *TRUE)
        host.run("host", "stop")
        host.run("host", "start", "--warm", str(WARM))
        for _ in range(rounds):
            while json.loads(host.run("top", "-o", "json").stdout)["host"]["pool"]["ready"] < WARM:
                time.sleep(0.1)
            time.sleep(0.3)
            _timed_run(host, rows)
    exits = tuple(row["request to exit"] for row in rows)
    phases = [Figure(f"warm: phase {name}", "s", tuple(row[name] for row in rows)) for name in WARM_PHASES]
    what = "out of the warm pool: request at the daemon to the container's exit, p50"
    return [Figure(what, "s", exits, bar=0.35), *phases]


def _at_once(host: Host, count: int) -> tuple[float, ...]:
    """Seconds from request to exit of each of `count` runs that begin together."""
    rows: list[dict[str, float]] = []
    with ThreadPoolExecutor(count) as pool:
        for done in [pool.submit(_timed_run, host, rows) for _ in range(count)]:
            done.result()
    return tuple(row["request to exit"] for row in rows)


def _at_once_figure(count: int, exits: tuple[float, ...]) -> Figure:
    return Figure(f"the same, {count} at once, each", "s", exits)


def _timed_run(host: Host, phases: list[dict[str, float]], *options: str) -> float:
    start = time.perf_counter()
    done = host.run("run", "--rm", "--timing", *options, *TRUE)
    seconds = time.perf_counter() - start
    timing = json.loads(done.stderr.decode().splitlines()[-1])
    phases.append(timing["host"] | {"request to exit": sum(timing["hv"][name] for name in _REQUEST_TO_EXIT)})
    return seconds


async def _exec_seconds(host: Host) -> float:
    """From the request to the status, on the kubelet's route; the client's own start is not counted."""
    address = json.loads((host.state / "host.json").read_text())
    url = f"http://{address['address']}:{address['port']}/exec/default/warm/warm?command=true&stdout=1&stderr=1"
    headers = {"Authorization": f"Bearer {(host.state / 'token').read_text().strip()}"}
    async with ClientSession(headers=headers) as session:
        start = time.perf_counter()
        async with session.ws_connect(url, protocols=["v5.channel.k8s.io"]) as socket:
            async for message in socket:
                if message.data[:1] == b"\x03":
                    assert json.loads(message.data[1:])["status"] == "Success"
                    return time.perf_counter() - start
    raise RuntimeError("the session ended without a status")
