"""Snapshots: how long the guest stands still, what is written, how soon a pod answers again; forks."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

from host import Host, fresh_host
from measure import Figure

SIZES = ("256Mi", "1Gi")
CHANGED_MIB = 10
CHILDREN = 10
FILL = f"head -c {CHANGED_MIB << 20} /dev/urandom > /dev/shm/changed"
_STOOD = re.compile(r"stood still for (\d+) ms; (\d+) pages")


def run(rounds: int) -> list[Figure]:
    """Sizes in turn, `rounds` times."""
    with fresh_host("busybox") as host:
        for size in SIZES:
            host.run("run", "--rm", "--memory", size, "busybox", "--", "true")  # makes the template
        figures = [figure for size in SIZES for figure in _sizes(host, size, rounds)]
        return [*figures, *_forks(host, rounds)]


def _start(host: Host, size: str) -> None:
    host.run("run", "-d", "--name", "one", "--memory", size, "busybox", "--", "sleep", "100000")


def _sizes(host: Host, size: str, rounds: int) -> list[Figure]:
    """Every resume of one pod is one from more layers than the one before."""
    suspend, resume, answer, pause, file = ([] for _ in range(5))  # type: list[float]
    _start(host, size)
    folder = _folder(host)
    for i in range(rounds):
        host.run("snapshot", "create", "one", f"before-{i}")
        host.run("exec", "one", "--", "sh", "-c", FILL)
        stood, pages = _create(host, f"changed-{i}")
        pause.append(stood)
        file.append(pages * 4096 / 2**20)
        suspend.append(host.seconds("suspend", "one") * 1000)
        _check(folder)
        resume.append(host.seconds("resume", "one") * 1000)
        answer.append(host.seconds("exec", "one", "--", "true") * 1000)
    host.run("rm", "-f", "one")
    bars: dict[str, float | None] = {"pause": 60.0, "file": 12.0} if size == SIZES[0] else {"pause": None, "file": None}
    what = f"{size}B pod, {CHANGED_MIB} MiB changed"
    return [
        Figure(f"incremental snapshot: pause, {what}", "ms", tuple(pause), bar=bars["pause"]),
        Figure(f"incremental snapshot: written, {what}", "MiB", tuple(file), bar=bars["file"]),
        Figure(f"hv suspend, {size}B", "ms", tuple(suspend)),
        Figure(f"hv resume, up to the agent's first answer, {size}B", "ms", tuple(resume), bar=500.0),
        Figure(f"a first exec after that, {size}B", "ms", tuple(answer)),
    ]


def _create(host: Host, name: str) -> tuple[float, int]:
    said = host.run("snapshot", "create", "one", name).stderr.decode()
    found = _STOOD.search(said)
    assert found is not None, said
    return float(found[1]), int(found[2])


def _folder(host: Host) -> Path:
    (folder,) = (host.state / "pods").iterdir()
    return folder


def _check(folder: Path) -> None:
    assert not (folder / "vm").exists(), "it is not suspended"


def _forks(host: Host, rounds: int) -> list[Figure]:
    pause, one, many = ([] for _ in range(3))  # type: list[float]
    _start(host, SIZES[0])
    busy = "while :; do :; done"
    host.run("exec", "one", "--", "sh", "-c", f"({busy}) >/dev/null 2>&1 &")
    for _ in range(rounds):
        for count, seconds in ((1, one), (CHILDREN, many)):
            before = host.seconds("version")  # what any command takes
            pause.append(_fork(host, count, seconds, before))
    host.run("rm", "-f", "one")
    return [
        Figure(f"hv fork of a busy {SIZES[0]}B pod: parent's pause", "ms", tuple(pause), bar=100.0),
        Figure("the same: until the child answers an exec", "s", tuple(one), bar=0.8),
        Figure(f"{CHILDREN} children: until all answer", "s", tuple(many), bar=3.0),
    ]


def _fork(host: Host, count: int, seconds: list[float], command: float) -> float:
    """The parent's pause in ms; `seconds` gets how long all children took, less what the commands themselves take."""
    began = time.perf_counter()
    made = json.loads(host.run("fork", "one", "--count", str(count), "-o", "json").stdout)
    for child in made["children"]:
        while host.run("exec", child, "--", "true", check=False).returncode:
            time.sleep(0.02)
    seconds.append(time.perf_counter() - began - command)
    for child in made["children"]:
        host.run("rm", "-f", child)
    return float(made["took"]["paused_s"]) * 1000
