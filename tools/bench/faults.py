"""A page fault end to end: our server beside a bare handler that looks nothing up."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from measure import Figure

FOLDER = Path(__file__).parent
MEMORY = FOLDER.parents[1] / "csrc" / "memory"
PLACEMENTS = {"same": "the faulting CPU", "free": "the CPU that the kernel chose, or ours", "other": "another CPU"}
HANDLERS = {"bare": "a bare handler", "server": "our server"}


def run(rounds: int) -> list[Figure]:
    """Microseconds a touched page, and our server over the bare handler where it is placed well."""
    samples: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "faults"
        sources = (FOLDER / "faults.c", *sorted(set(MEMORY.glob("*.c")) - set(MEMORY.glob("preload*.c"))))
        flags = ("-O2", "-g", "-std=gnu11", "-D_GNU_SOURCE", "-fstack-protector-strong", f"-I{MEMORY.parent}")
        subprocess.run(["gcc", *flags, "-o", program, *sources, "-lpthread", "-lzstd"], check=True)
        for line in subprocess.run([program, str(rounds)], check=True, capture_output=True, text=True).stdout.split(
            "\n"
        ):
            if line:
                handler, placement, value = line.split()
                samples.setdefault((handler, placement), []).append(float(value))
    figures = [
        Figure(f"fault served by {HANDLERS[handler]} on {PLACEMENTS[placement]}", "us", tuple(values))
        for (handler, placement), values in samples.items()
    ]
    bare = samples["bare", "same"]
    return [
        *figures,
        Figure("our server, where it places itself, over a bare handler on the faulting CPU", "x",
               _over(samples["server", "free"], bare), 1.2),
        Figure("the same, both kept on the faulting CPU: what looking up costs", "x",
               _over(samples["server", "same"], bare), 1.2),
        Figure("a bare handler that the kernel places, over our server that places itself", "x",
               _over(samples["bare", "free"], samples["server", "free"])),
    ]  # fmt: skip


def _over(some: list[float], others: list[float]) -> tuple[float, ...]:
    return tuple(a / b for a, b in zip(some, others, strict=True))
