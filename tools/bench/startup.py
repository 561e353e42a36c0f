"""How long a container takes from the command to its exit: out of the warm pool, cloned, cold; and an exec in a pod."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from aiohttp import ClientSession
from host import Host, fresh_host
from measure import Figure

TRUE = ("busybox", "--", "true")
AT_ONCE = (10, 30)
WARM = 2
COLD_EVERY = 5
"""A cold start is made in one of so many rounds: it takes as long as six clones, and its figure has a wide bar."""
PHASES = ("queue", "pull", "vm", "boot", "setup", "containers")
REST = "the container itself, and its end"
#: of the command's own timing: from the request at the daemon to the container's exit
_REQUEST_TO_EXIT = ("create", "start", "run")
CHART = Path(__file__).parents[2] / "docs" / "performance" / "start_phases.png"


@dataclass
class Runs:
    """What `hv run --timing` said of starts of one kind, and what they took with the command itself, in seconds."""

    whole: list[float] = field(default_factory=list)
    exits: list[float] = field(default_factory=list)
    phases: list[Mapping[str, float]] = field(default_factory=list)

    def take(self, host: Host, *options: str) -> None:
        """One more."""
        start = time.perf_counter()
        done = host.run("run", "--rm", "--timing", *options, *TRUE)
        self.whole.append(time.perf_counter() - start)
        timing = json.loads(done.stderr.decode().splitlines()[-1])
        self.phases.append(timing["host"])
        self.exits.append(sum(timing["hv"][name] for name in _REQUEST_TO_EXIT))

    def medians(self) -> dict[str, float]:
        """Of each phase, and what is left of the whole."""
        known = {name: statistics.median(row.get(name, 0.0) for row in self.phases) for name in PHASES}
        return known | {REST: max(0.0, statistics.median(self.exits) - sum(known.values()))}

    def figures(self, kind: str) -> list[Figure]:
        """Its phases."""
        samples = {name: tuple(row[name] for row in self.phases if name in row) for name in PHASES}
        return [Figure(f"{kind}: phase {name}", "s", values) for name, values in samples.items() if values]


def run(rounds: int) -> list[Figure]:
    """Starts of all three kinds with their phases; 10 and 30 at once; warm exec with the command line and without."""
    clone, cold, warm = Runs(), Runs(), Runs()
    with fresh_host("busybox") as host:
        made = host.seconds("run", "--rm", *TRUE)
        host.run("run", "-d", "--name", "warm", "busybox", "--", "sleep", "100000")
        host.run("exec", "warm", "--", "true")
        host.run("run", "--rm", *TRUE)  # the first clone has recorded the working set of those after it
        execs = [_round(host, number, clone, cold) for number in range(rounds)]
        crowds = {count: _at_once(host, count) for count in AT_ONCE}
    _warm_rounds(rounds, warm)
    figures = _start_figures("from a template", clone, 0.60, 1.2, made)
    figures += _start_figures("out of the warm pool", warm, 0.35, None)
    figures += _start_figures("cold (`--cold`)", cold, 8.0, None)
    for count, runs in crowds.items():
        figures += _start_figures(f"from a template, {count} at once", runs, None, None)
    figures += _exec_figures(execs)
    figures += [*clone.figures("template"), *warm.figures("warm"), *cold.figures("cold")]
    draw({"cold": cold.medians(), "template": clone.medians(), "warm": warm.medians()}, CHART)
    return figures


def _round(host: Host, number: int, clone: Runs, cold: Runs) -> tuple[float, float, float]:
    """One of each, in turn; milliseconds of an exec by itself, with the command, and of a command that does nothing."""
    clone.take(host)
    if number % COLD_EVERY == 0:
        cold.take(host, "--cold")
    exec_daemon = asyncio.run(_exec_seconds(host))
    return exec_daemon * 1e3, host.seconds("exec", "warm", "--", "true") * 1e3, host.seconds("version") * 1e3


def _start_figures(kind: str, runs: Runs, bar: float | None, bar99: float | None, made: float = 0) -> list[Figure]:
    exits = tuple(runs.exits)
    figures = [
        Figure(f"{kind}: request at the daemon to the container's exit, p50", "s", exits, bar=bar),
        Figure(f"{kind}: the same, p99 of these {len(exits)}", "s", (percentile(exits, 99),), bar=bar99),
        Figure(f"{kind}: with the command's own start, whole process", "s", tuple(runs.whole)),
    ]
    if made:
        # The first answer is that to setup, which is at its end; some 30 ms of this are before QEMU's start.
        first = tuple(row["vm"] + row["boot"] + row["setup"] for row in runs.phases)
        figures.append(Figure("clone: QEMU's start to the agent's first answer, at most", "s", first, bar=0.35))
        figures.append(Figure("whole process when the template has to be made", "s", (made,)))
    return figures


def percentile(samples: Sequence[float], percent: int) -> float:
    """Interpolated between samples; the greatest and least are the ends."""
    if len(samples) < 2:
        return samples[0]
    return statistics.quantiles(samples, n=100, method="inclusive")[percent - 1]


def _warm_rounds(rounds: int, warm: Runs) -> None:
    """Starts out of the warm pool, each when the pool is full again."""
    with fresh_host("busybox") as host:
        host.run("run", "--rm", *TRUE)
        host.run("run", "--rm", *TRUE)
        host.run("host", "stop")
        host.run("host", "start", "--warm", str(WARM))
        for _ in range(rounds):
            while json.loads(host.run("top", "-o", "json").stdout)["host"]["pool"]["ready"] < WARM:
                time.sleep(0.1)
            time.sleep(0.3)
            warm.take(host)


def _at_once(host: Host, count: int) -> Runs:
    """`count` runs that begin together."""
    runs = Runs()
    with ThreadPoolExecutor(count) as pool:
        for done in [pool.submit(runs.take, host) for _ in range(count)]:
            done.result()
    return runs


def _exec_figures(rows: list[tuple[float, float, float]]) -> list[Figure]:
    daemon, command, nothing = zip(*rows, strict=True)
    return [
        Figure("warm exec of `true`, WebSocket request to status", "ms", daemon, bar=40.0),
        Figure("warm `hv exec POD -- true`, whole process", "ms", command, bar=150.0),
        Figure("beside it: `hv version`, whole process", "ms", nothing),
    ]


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


def draw(kinds: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Start time by phase, a bar a kind: all of them above, those from a template again below, on their own scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    chart, axes = pyplot.subplots(2, 1, figsize=(9, 4.5))
    for axis, names in zip(axes, (list(kinds), [name for name in kinds if name != "cold"]), strict=True):
        left = [0.0] * len(names)
        for color, phase in enumerate((*PHASES, REST)):
            widths = [kinds[name][phase] for name in names]
            axis.barh(names, widths, left=left, label=phase, color=f"C{color}")
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axis.invert_yaxis()
        axis.set_xlabel("s from the request at the daemon to the container's exit, medians")
    axes[0].set_title("start time by phase: cold, template, warm")
    axes[0].legend(fontsize=7, loc="lower right")
    chart.tight_layout()
    chart.savefig(path, dpi=100)
    pyplot.close(chart)
