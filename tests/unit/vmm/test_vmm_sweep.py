"""`sweep` finds a VM's processes by each of their marks, and nobody else's."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hypervisor.vmm.capabilities import HostCapabilities
from hypervisor.vmm.cgroup import Cgroups, Layout, Limits, detect
from hypervisor.vmm.directory import Processes, VmDirectory, boot_id
from hypervisor.vmm.plan import cgroup_name
from hypervisor.vmm.sweep import find_processes, sweep
from hypervisor.vmx.process import ProcessId


@pytest.fixture
def files(short_path: Path) -> VmDirectory:
    made = VmDirectory(short_path / "vm")
    made.create(uid=None)
    return made


@pytest.fixture
def children() -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def sleeper(children: list[subprocess.Popen[bytes]], **how: object) -> int:
    children.append(subprocess.Popen(["sleep", "1000"], **how))  # type: ignore[call-overload]
    return children[-1].pid


def listed(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def without_cgroups(capabilities: HostCapabilities) -> HostCapabilities:
    return replace(capabilities, cgroup_layout=Layout("none"))


async def test_by_environment_directory_and_record(
    files: VmDirectory, children: list[subprocess.Popen[bytes]], capabilities: HostCapabilities
) -> None:
    ours = {
        sleeper(children, env={"PODVISOR_VM": str(files.path)}),
        sleeper(children, cwd=files.vmx),
        recorded := sleeper(children),
    }
    others = [
        sleeper(children, env={"PODVISOR_VM": f"{files.path}2"}),
        sleeper(children, cwd=files.path.parent),
        stale := sleeper(children),
    ]
    vmx = ProcessId(stale, ProcessId.of(stale).start_time + 1)
    files.write_processes(Processes(boot_id(), vmx=vmx, qemu=ProcessId.of(recorded)))
    assert set(await sweep(files.path, without_cgroups(capabilities))) == ours
    assert not files.path.exists()
    assert not any(listed(pid) for pid in ours)
    assert all(ProcessId.of(pid).alive() for pid in others)


async def test_nothing_there(short_path: Path, capabilities: HostCapabilities) -> None:
    assert await sweep(short_path / "never", without_cgroups(capabilities)) == []


def test_not_oneself(files: VmDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files.vmx)
    assert os.getpid() not in [p.pid for p in find_processes(files.path)]


@pytest.mark.root
async def test_by_cgroup(
    files: VmDirectory, children: list[subprocess.Popen[bytes]], capabilities: HostCapabilities
) -> None:
    host = replace(capabilities, cgroup_layout=await asyncio.to_thread(detect))
    if host.cgroup_layout.kind == "none":
        pytest.skip(f"no usable cgroups: {host.cgroup_layout.reason}")
    cgroups = Cgroups(host.cgroup_layout, host.cgroup_scope)
    paths = cgroups.create(cgroup_name(files.path), Limits(pids=10))
    pid = sleeper(children)
    for directory in paths.directories:
        (directory / "cgroup.procs").write_text(str(pid))
    assert await sweep(files.path, host) == [pid]
    assert not any(directory.exists() for directory in paths.directories)
