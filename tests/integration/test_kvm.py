"""Pod VMs under real KVM with the kernel's vhost-vsock: cold ones, and clones whose RAM is filled as it is touched.

`make test-kvm` runs these on any machine (docs/testing.md). Guests are few and shared: nested starts are slow.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import HV, PATIENCE, Host, wait_for

from hypervisor.agent.wire import AGENT_PORT
from hypervisor.errors import Unavailable
from hypervisor.introspect.agent import AgentClient
from hypervisor.vmm.capabilities import HostCapabilities, probe
from hypervisor.vmm.guest import GuestImage
from hypervisor.vsock.address import KernelVsock
from hypervisor.vsock.connect import connect_blocking

pytestmark = [pytest.mark.root, pytest.mark.qemu, pytest.mark.kvm, pytest.mark.vhost_vsock, pytest.mark.uffd]

KINDS = ("cold", "clone")
PATIENCE_S = 20.0 * PATIENCE
CLOCK_SLACK_NS = 500_000_000
TELL = "cat /proc/sys/kernel/random/boot_id /proc/sys/kernel/random/uuid; head -c 32 /dev/urandom | sha256sum; hostname"


@dataclass(frozen=True)
class Pod:
    """A running pod and its folder on the host."""

    host: Host
    name: str
    folder: Path

    @property
    def plan(self) -> Any:
        return json.loads((self.folder / "vm/config.json").read_text())

    @property
    def address(self) -> KernelVsock:
        return KernelVsock(self.plan["identity"]["cid"])

    @property
    def qemu(self) -> Path:
        return Path("/proc", str(json.loads((self.folder / "vm/processes.json").read_text())["qemu"]["pid"]))

    def sh(self, script: str, stdin: bytes = b"", options: tuple[str, ...] = ()) -> bytes:
        return self.host.hv("exec", *options, self.name, "--", "sh", "-c", script, stdin=stdin).stdout

    def ram(self) -> Any:
        (pod,) = (p for p in self.host.json("top")["pods"] if p["name"] == self.name)
        return pod["vm"]["vmx"]["ram"]


def start(host: Host, name: str, *options: str) -> Pod:
    script = f"echo {name} says hello; echo {name} complains >&2; exec sleep 1000000"
    host.hv("run", "-d", "--name", name, *options, "busybox", "--", "sh", "-c", script, timeout=240)
    (folder,) = (p for p in (host.state / "pods").iterdir() if name_of(p) == name)
    return Pod(host, name, folder)


def name_of(folder: Path) -> str:
    """Empty for a pod that is just being made."""
    try:
        return str(json.loads((folder / "pod.json").read_text())["manifest"]["metadata"]["name"])
    except FileNotFoundError:
        return ""


@pytest.fixture(scope="module")
def pods(host: Host) -> Iterator[dict[str, Pod]]:
    """One that starts cold, and two clones of one template, which boots meanwhile."""
    with ThreadPoolExecutor(2) as pool:
        cold, clone = pool.submit(start, host, "cold", "--cold"), pool.submit(start, host, "clone")
        made = {"cold": cold.result(), "clone": clone.result()}
    made["sibling"] = start(host, "sibling")
    yield made
    for name in made:
        host.hv("rm", "-f", name, check=False)


@pytest.fixture(params=KINDS)
def pod(request: pytest.FixtureRequest, pods: dict[str, Pod]) -> Pod:
    return pods[request.param]


@pytest.fixture(scope="module")
def capabilities(tmp_path_factory: pytest.TempPathFactory) -> HostCapabilities:
    """Of this machine, probed without what an earlier probe left."""
    guest = GuestImage.load()
    return asyncio.run(probe(tmp_path_factory.mktemp("probe"), guest_kernel=guest.kernel))


def test_the_probe_has_run_a_guest(capabilities: HostCapabilities) -> None:
    assert capabilities.kvm_unusable is None
    assert capabilities.choose_accelerator("auto") == "kvm"


def test_the_kernels_vsock_is_taken(capabilities: HostCapabilities) -> None:
    assert capabilities.vsock == "kernel"


def test_doctor_says_both(host: Host) -> None:
    said = {finding["name"]: finding for finding in host.json("doctor")["findings"]}
    assert (said["KVM"]["status"], said["vsock"]["status"]) == ("ok", "ok")
    assert "vhost-vsock" in said["vsock"]["found"]


def test_it_runs_under_kvm(pod: Pod) -> None:
    """QEMU has a virtual CPU of KVM's, and the guest has found KVM's clock."""
    assert pod.plan["accelerator"] == "kvm"
    assert any("kvm-vcpu" in str(fd.readlink()) for fd in (pod.qemu / "fd").iterdir())
    assert b"kvm-clock" in pod.sh("cat /sys/devices/system/clocksource/clocksource0/available_clocksource")


def test_it_is_what_it_should_be(pods: dict[str, Pod]) -> None:
    assert [pods[name].plan["origin"] for name in ("cold", "clone", "sibling")] == ["boot", "clone", "clone"]
    assert pods["clone"].plan["clone"]["template"] == pods["sibling"].plan["clone"]["template"]


def test_its_vsock_device_is_the_kernels(pod: Pod) -> None:
    argv = (pod.qemu / "cmdline").read_text()
    assert f"vhost-vsock-pci,id=vsock,guest-cid={pod.address.cid},vhostfd=12" in argv
    assert not (pod.folder / "vm/vmx/vsock.sock").exists()


def test_its_agent_is_reached_over_af_vsock(pod: Pod) -> None:
    with connect_blocking(pod.address, AGENT_PORT, PATIENCE_S) as sock:
        assert sock.getpeername() == (pod.address.cid, AGENT_PORT)


def test_a_port_that_nobody_listens_on_is_refused(pod: Pod) -> None:
    with pytest.raises(Unavailable):
        connect_blocking(pod.address, 4242, PATIENCE_S)


def test_exec_keeps_streams_and_the_exit_code_apart(pod: Pod) -> None:
    done = pod.host.hv("exec", pod.name, "--", "sh", "-c", "echo out; echo err >&2; exit 7", check=False)
    assert (done.stdout, done.stderr, done.returncode) == (b"out\n", b"err\n", 7)


def test_exec_takes_and_gives_a_megabyte(pod: Pod) -> None:
    data = os.urandom(1 << 20)
    assert pod.host.hv("exec", "-i", pod.name, "--", "cat", stdin=data).stdout == data


def test_logs(pod: Pod) -> None:
    said = pod.host.hv("logs", pod.name).stdout
    assert sorted(said.decode().splitlines()) == [f"{pod.name} complains", f"{pod.name} says hello"]


def test_logs_by_size(pod: Pod) -> None:
    assert len(pod.host.hv("logs", "--tail", "1", pod.name).stdout.splitlines()) == 1


def test_copies_come_back_the_same(pod: Pod, tmp_path: Path) -> None:
    data = os.urandom(4 << 20)
    (tmp_path / "there").write_bytes(data)
    pod.host.hv("cp", str(tmp_path / "there"), f"{pod.name}:/tmp/copied")
    assert pod.sh("sha256sum /tmp/copied").split()[0].decode() == hashlib.sha256(data).hexdigest()
    pod.host.hv("cp", f"{pod.name}:/tmp/copied", str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == data


def test_many_sessions_at_once(pod: Pod) -> None:
    with ThreadPoolExecutor(4) as pool:
        said = list(pool.map(lambda i: pod.sh(f"echo {i}"), range(8)))
    assert said == [f"{i}\n".encode() for i in range(8)]


def test_its_clock_is_the_hosts(pod: Pod, record_property: Callable[[str, object], None]) -> None:
    """Within what an exchange took when it was set: milliseconds, but for the slowness of nested guests."""
    sent = time.time_ns()
    told = int(asyncio.run(AgentClient(pod.address).hello())["clock_ns"])
    received = time.time_ns()
    record_property("wrong_ms", round((told - (sent + received) / 2) / 1e6, 2))
    assert sent - CLOCK_SLACK_NS <= told <= received + CLOCK_SLACK_NS


def test_port_forward(pod: Pod) -> None:
    """A server on the pod's loopback answers; that a port has none is told."""
    pod.sh("mkdir -p /tmp/www; echo served > /tmp/www/index.html; httpd -p 127.0.0.1:7777 -h /tmp/www")
    command = [str(HV), "port-forward", pod.name, ":7777", ":9"]
    with subprocess.Popen(command, stdout=-1, stderr=-1, env=pod.host.environment) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        ports = [int(process.stdout.readline().split()[2].rpartition(b":")[2]) for _ in range(2)]
        assert b"served" in ask(ports[0])
        with suppress(ConnectionError):
            assert ask(ports[1]) == b""
        given_up = threading.Timer(PATIENCE_S, process.kill)
        given_up.start()
        assert any(b"port 9 in the pod: Connection refused" in line for line in process.stderr)
        given_up.cancel()
        process.send_signal(signal.SIGINT)


def ask(port: int) -> bytes:
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as sock:
        with suppress(OSError):  # refused: it may be told before all is sent
            sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
            sock.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: sock.recv(65536), b""))


def test_clones_are_unlike(pods: dict[str, Pod]) -> None:
    told = [pods[name].sh(TELL).splitlines() for name in ("clone", "sibling", "cold")]
    for values in zip(*told, strict=True):
        assert len(set(values)) == 3, values
    assert len({pods[name].address.cid for name in pods}) == 3


def test_a_clones_ram_is_filled_as_it_is_touched(pods: dict[str, Pod]) -> None:
    """Pages that KVM, the kernel's vhost threads and QEMU touched, and no others."""
    ram = pods["clone"].ram()
    assert ram["faults"] > 0
    filled = (ram["pages_copied"] + ram["pages_zeroed"]) * 4096
    assert 0 < filled < pods["clone"].plan["clone"]["ram_bytes"] / 2


def test_a_second_clone_finds_the_firsts_working_set(pods: dict[str, Pod]) -> None:
    assert pods["clone"].plan["clone"]["recording"]
    assert pods["sibling"].plan["clone"]["working_set"]
    first, second = pods["clone"].ram(), pods["sibling"].ram()
    assert second["prefetched"] > 0
    assert second["faults"] < first["faults"]


def test_a_clone_reads_its_templates_data(pods: dict[str, Pod]) -> None:
    """What lay in the template's page cache is whole."""
    pods["clone"].sh(
        "busybox --list | wc -l; find /proc/self /bin -maxdepth 1 >/dev/null; cat /bin/busybox | sha256sum"
    )
    a, b = (pods[name].sh("sha256sum /bin/busybox") for name in ("clone", "cold"))
    assert a == b


def test_a_vmx_that_is_killed_is_replaced(pods: dict[str, Pod]) -> None:
    """The kernel serves its vsock, so connections need no new device; faults go on."""
    pod = pods["sibling"]
    vmx = json.loads((pod.folder / "vm/processes.json").read_text())["vmx"]["pid"]
    os.kill(vmx, 9)
    wait_for(lambda: _vmx_of(pod) not in (None, vmx), "vmx is replaced", 30)
    assert pod.sh("head -c 8000000 /dev/urandom | wc -c") == b"8000000\n"


def _vmx_of(pod: Pod) -> Any:
    return (json.loads((pod.folder / "vm/processes.json").read_text()).get("vmx") or {}).get("pid")


def test_a_daemon_that_is_killed_finds_its_pods_again(pods: dict[str, Pod]) -> None:
    host = pods["cold"].host
    os.kill(host.daemon_pid(), 9)
    host.hv("host", "start")
    for name in KINDS:
        assert pods[name].sh("echo there") == b"there\n"


@pytest.mark.parametrize("options", [(), ("--cold",)], ids=["clone", "cold"])
def test_a_pods_exit_code(host: Host, options: tuple[str, ...], record_property: Callable[[str, object], None]) -> None:
    """The phases of its start go to the results, as seconds."""
    done = host.hv("run", "--rm", "--timing", *options, "busybox", "--", "sh", "-c", "exit 9", check=False)
    assert done.returncode == 9, done.stderr
    record_property("phases", done.stderr.decode().splitlines()[-1])


def test_a_removed_pod_leaves_its_cid(host: Host, pods: dict[str, Pod]) -> None:
    gone = start(host, "gone")
    address = gone.address
    host.hv("rm", "-f", "gone")
    assert not gone.folder.exists()
    with pytest.raises(Unavailable):
        connect_blocking(address, AGENT_PORT, PATIENCE_S)
