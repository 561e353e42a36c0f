"""How long a container takes from the command to its exit, and an exec in a running pod."""

from __future__ import annotations

import json

from host import fresh_host
from measure import Figure, interleaved


def run(rounds: int) -> list[Figure]:
    """Cold start and warm exec, through the command line and as the daemon sees them."""
    with fresh_host("busybox") as host:
        host.run("run", "-d", "--name", "warm", "busybox", "--", "sleep", "100000")
        host.run("exec", "warm", "--", "true")
        phases: list[dict[str, float]] = []

        def cold() -> float:
            seconds = host.seconds("run", "--rm", "busybox", "--", "true")
            timing = host.run("run", "--rm", "--timing", "busybox", "--", "true").stderr.decode().splitlines()[-1]
            phases.append(json.loads(timing))
            return seconds

        samples = interleaved(
            rounds,
            cold=cold,
            exec_cli=lambda: host.seconds("exec", "warm", "--", "true") * 1e3,
            version=lambda: host.seconds("version") * 1e3,
        )
    figures = [
        Figure("cold `hv run --rm busybox -- true`", "s", samples["cold"], bar=8.0),
        Figure("warm `hv exec POD -- true`, whole process", "ms", samples["exec_cli"], bar=150.0),
        Figure("beside it: `hv version`, whole process", "ms", samples["version"]),
    ]
    for name in phases[0]:
        values = tuple(float(p[name]) for p in phases if isinstance(p.get(name), int | float))
        if values:
            figures.append(Figure(f"cold start, phase {name}", "s", values))
    return figures
