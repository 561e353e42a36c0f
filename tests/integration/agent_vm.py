"""A guest for tests of the agent alone: QEMU and the vsock back end, no daemon; and a plain client of the protocol."""

from __future__ import annotations

import base64
import os
import socket
import struct
import subprocess
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypervisor.agent import wire
from hypervisor.agent.wire import Frame, FrameType
from hypervisor.vsock.address import UnixVsock
from hypervisor.vsock.backend import VhostUserVsock, bind_listener
from hypervisor.vsock.connect import connect_blocking

ROOT = Path(__file__).parents[2]
# Python 3.11.4 and later want to be told that an archive of our own is trusted; earlier ones cannot be.
TRUSTED: dict[str, Any] = {"filter": "fully_trusted"} if hasattr(tarfile, "tar_filter") else {}
OUT = ROOT / "guest-images/out"
IMAGE_DISK = "img-0123456789ab"
CID = 42


class Refused(Exception):
    """The agent's error answer."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(f"{error['reason']}: {error['message']}")
        self.reason: str = error["reason"]
        self.message: str = error["message"]
        self.error = error


class Stream:
    """One connection to the agent."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def send(self, kind: FrameType, payload: bytes = b"") -> None:
        self.sock.sendall(wire.pack(kind, payload))

    def _exactly(self, count: int) -> bytes:
        pieces = []
        while count:
            piece = self.sock.recv(min(count, 1 << 20))
            if not piece:
                raise EOFError("the agent closed the connection")
            pieces.append(piece)
            count -= len(piece)
        return b"".join(pieces)

    def receive(self) -> Frame:
        kind, length = wire.parse_header(self._exactly(wire.HEADER.size))
        return Frame(kind, self._exactly(length))

    def request(self, call: str, **args: Any) -> dict[str, Any]:
        self.sock.sendall(wire.pack_json(FrameType.REQUEST, {"v": wire.VERSION, "call": call, "args": args}))
        frame = self.receive()
        assert frame.type is FrameType.RESPONSE, frame
        body = wire.parse_json(frame.payload)
        if not body["ok"]:
            raise Refused(body["error"])
        result: dict[str, Any] = body["result"]
        return result

    def finish(self) -> Ended:
        """Everything up to END."""
        ended = Ended()
        while (frame := self.receive()).type is not FrameType.END:
            if frame.type is FrameType.STDOUT:
                ended.out += frame.payload
            elif frame.type is FrameType.STDERR:
                ended.err += frame.payload
        ended.body = wire.parse_json(frame.payload)
        return ended

    def close(self) -> None:
        self.sock.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass
class Ended:
    """What a streaming call gave."""

    out: bytearray = field(default_factory=bytearray)
    err: bytearray = field(default_factory=bytearray)
    body: dict[str, Any] = field(default_factory=dict)

    @property
    def code(self) -> int:
        return int(self.body["exit_code"])


class AgentVm:
    """A running guest."""

    def __init__(self, directory: Path, process: subprocess.Popen[bytes]) -> None:
        self.directory = directory
        self.process = process
        self.address = UnixVsock(directory / "vsock.sock")
        self.timeout = 60.0

    def open(self) -> Stream:
        sock = connect_blocking(self.address, wire.AGENT_PORT, 20)
        sock.settimeout(self.timeout)
        return Stream(sock)

    def call(self, call: str, **args: Any) -> dict[str, Any]:
        with self.open() as stream:
            return stream.request(call, **args)

    def stream(self, call: str, **args: Any) -> Stream:
        stream = self.open()
        try:
            stream.request(call, **args)
        except BaseException:
            stream.close()
            raise
        return stream

    def wait_ready(self, seconds: float = 60) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while True:
            try:
                return self.call("hello")
            except Exception:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"no agent; console:\n{self.console()[-3000:]}") from None
                time.sleep(0.05)

    def console(self) -> str:
        return (self.directory / "console.log").read_text(errors="replace")

    def setup(self, **changes: Any) -> None:
        settings: dict[str, Any] = {
            "hostname": "pod-1",
            "clock_ns": time.time_ns(),
            "entropy": base64.b64encode(os.urandom(64)).decode(),
            "net": {
                "ifname": "eth0",
                "address": "10.0.2.15/24",
                "gateway": "10.0.2.2",
                "dns": ["10.0.2.3"],
                "search": [],
            },
            "data_disk": "hv-data",
            "hosts": [["10.9.9.9", "elsewhere"]],
            "volumes": [
                {"name": "disk", "medium": "disk", "size_bytes": None},
                {"name": "memory", "medium": "memory", "size_bytes": 1 << 20},
            ],
            "share_process_namespace": False,
        }
        self.call("setup", **(settings | changes))

    def start(self, name: str, *argv: str, **changes: Any) -> dict[str, Any]:
        return self.call("container.start", **(container(name, *argv) | changes))

    def run(self, name: str, *argv: str, stdin: bytes | None = None, **changes: Any) -> Ended:
        """exec in a running container, to its end."""
        args = {"container": name, "argv": list(argv), "stdin": stdin is not None} | changes
        with self.stream("exec", **args) as stream:
            for start in range(0, len(stdin or b""), wire.MAX_DATA):
                stream.send(FrameType.STDIN, (stdin or b"")[start : start + wire.MAX_DATA])
            if stdin is not None:
                stream.send(FrameType.STDIN)
            return stream.finish()

    def attach(self, name: str) -> Ended:
        """All output of the present instance, to its end."""
        with self.stream("attach", container=name, stdin=False, stdout=True, stderr=True, replay=True) as stream:
            return stream.finish()

    def logs(self, name: str, **changes: Any) -> bytes:
        with self.stream("logs", container=name, **changes) as stream:
            return bytes(stream.finish().out)

    def state(self, name: str) -> dict[str, Any]:
        found = [c for c in self.call("container.list")["containers"] if c["name"] == name]
        assert found, f"{name} is not listed"
        state: dict[str, Any] = found[0]
        return state

    def wait_exited(self, name: str, seconds: float = 30) -> dict[str, Any]:
        with self.stream("events") as stream:
            stream.sock.settimeout(seconds)
            while True:
                event = wire.parse_json(stream.receive().payload)
                for c in event.get("containers") or [event["container"]]:
                    if c["name"] == name and c["state"] == "exited":
                        gone: dict[str, Any] = c
                        return gone


def container(name: str, *argv: str) -> dict[str, Any]:
    """A plain ContainerSpec."""
    return {
        "name": name,
        "image_disk": IMAGE_DISK,
        "argv": list(argv),
        "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
        "cwd": "/",
    }


def resize_payload(columns: int, rows: int) -> bytes:
    return struct.pack(">HH", columns, rows)


def make_image(target: Path) -> Path:
    """The sample busybox image as an EROFS disk."""
    import json

    target.parent.mkdir(parents=True, exist_ok=True)
    oci, tree = target.parent / "oci", target.parent / "tree"
    with tarfile.open(OUT / "samples/busybox.tar") as tar:
        tar.extractall(oci, **TRUSTED)

    def blob(digest: str) -> Path:
        return oci / "blobs/sha256" / digest.removeprefix("sha256:")

    index = json.loads((oci / "index.json").read_text())
    manifest = json.loads(blob(index["manifests"][0]["digest"]).read_text())
    for layer in manifest["layers"]:
        with tarfile.open(blob(layer["digest"])) as tar:
            tar.extractall(tree, **TRUSTED)
    subprocess.run(["mkfs.erofs", str(target), str(tree)], check=True, capture_output=True)
    return target


def make_data_disk(target: Path, size: str = "256M") -> Path:
    with target.open("wb") as f:
        f.truncate(int(size.removesuffix("M")) << 20)
    command = ["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-E", "lazy_itable_init=1", str(target)]
    subprocess.run(command, check=True, capture_output=True)
    return target


def _argv(directory: Path, image: Path, memory: int, kernel_args: str) -> list[str]:
    kernel = OUT / "vmlinux" if (OUT / "vmlinux").exists() else OUT / "vmlinuz"
    append = "console=ttyS0 quiet panic=-1 rcupdate.rcu_expedited=1 tsc=reliable no_timer_check random.trust_cpu=on"
    argv = ["qemu-system-x86_64", "-machine", "pc,memory-backend=ram", "-accel", "tcg", "-cpu", "max"]
    argv += ["-m", f"{memory}M"]
    argv += ["-object", f"memory-backend-memfd,id=ram,size={memory}M,share=on", "-smp", "1", "-display", "none"]
    argv += ["-nodefaults", "-no-user-config", "-no-reboot", "-kernel", str(kernel), "-initrd", str(OUT / "initrd.img")]
    argv += ["-append", f"{append} audit=0 {kernel_args}", "-serial", f"file:{directory / 'console.log'}"]
    disks = [("hv-root", OUT / "root.erofs", True), ("hv-data", directory / "data.img", False)]
    disks.append((IMAGE_DISK, image, True))
    for i, (serial, path, read_only) in enumerate(disks):
        argv += ["-drive", f"if=none,id=d{i},file={path},format=raw,readonly={'on' if read_only else 'off'}"]
        argv += ["-device", f"virtio-blk-pci,drive=d{i},serial={serial}"]
    argv += ["-netdev", "user,id=n", "-device", "virtio-net-pci,netdev=n,romfile="]
    argv += ["-chardev", f"socket,id=v,path={directory / 'vhost.sock'}", "-device", "vhost-user-vsock-pci,chardev=v"]
    return argv


@contextmanager
def boot(directory: Path, image: Path, *, memory: int = 256, kernel_args: str = "") -> Iterator[AgentVm]:
    """A guest whose agent answers; killed at the end."""
    make_data_disk(directory / "data.img")
    front, host = bind_listener(directory / "vhost.sock"), bind_listener(directory / "vsock.sock")
    device = VhostUserVsock(frontend=front, host=host, uds_path=str(directory / "vsock.sock"), guest_cid=CID)
    with device, (directory / "qemu.log").open("wb") as log:
        process = subprocess.Popen(_argv(directory, image, memory, kernel_args), stdin=subprocess.DEVNULL, stderr=log)
        try:
            vm = AgentVm(directory, process)
            vm.wait_ready()
            yield vm
        finally:
            process.kill()
            process.wait()
