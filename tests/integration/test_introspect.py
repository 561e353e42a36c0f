"""Real clients into containers in a VM, through master and node: kubectl over WebSocket and SPDY, the Python client."""

from __future__ import annotations

import hashlib
import http.client
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import wait_for
from local_cluster import KUBECTL, WEBSOCKETS

pytestmark = [pytest.mark.qemu, pytest.mark.root, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
BUSYBOX = ROOT / "guest-images/out/samples/busybox.tar"
POD = """
apiVersion: v1
kind: Pod
metadata: {name: box}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: c
    image: localhost/podvisor/busybox
    command:
    - sh
    - -c
    - |
      echo first; echo second >&2; echo third
      mkdir /www; echo served > /www/index.html; httpd -p 127.0.0.1:8080 -h /www
      exec sleep 100000
    resources: {limits: {memory: 256Mi}}
  - name: reader
    image: localhost/podvisor/busybox
    stdin: true
    command: [sh, -c, 'while read line; do echo "got $line"; done']
  - name: twice
    image: localhost/podvisor/busybox
    command:
    - sh
    - -c
    - echo this is $(cat /proc/uptime); [ -e /mem/again ] && exec sleep 10000; sleep 1; touch /mem/again; exit 3
    volumeMounts: [{name: mem, mountPath: /mem}]
  volumes: [{name: mem, emptyDir: {medium: Memory}}]
"""


class Cluster:
    """kubectl on a cluster of two hosts, one of which has the pod."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.config = state / "cluster/admin.kubeconfig"
        self.websockets = True

    def env(self) -> dict[str, str]:
        chosen = dict.fromkeys(WEBSOCKETS, str(self.websockets).lower())
        return {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "HOME": str(self.state),
            "KUBECONFIG": str(self.config),
            **chosen,
        }

    def hv(self, *args: str) -> str:
        command = [sys.executable, "-m", "hypervisor.cli.main", "--state-dir", str(self.state), *args]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=self.env(), cwd=self.state)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def run(self, *args: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [str(KUBECTL), *args], input=stdin, capture_output=True, timeout=300, check=False, env=self.env()
        )

    def kubectl(self, *args: str, stdin: bytes = b"", code: int = 0) -> bytes:
        done = self.run(*args, stdin=stdin)
        assert done.returncode == code, (args, done.returncode, done.stdout[-500:], done.stderr[-500:])
        return done.stdout

    def start(self, *args: str) -> subprocess.Popen[bytes]:
        pipe = subprocess.PIPE
        return subprocess.Popen([str(KUBECTL), *args], stdin=pipe, stdout=pipe, stderr=pipe, env=self.env())

    @contextmanager
    def running(self, *args: str) -> Iterator[subprocess.Popen[bytes]]:
        with self.start(*args) as process:
            try:
                yield process
            finally:
                process.kill()


@pytest.fixture(scope="module")
def started() -> Iterator[Cluster]:
    state = Path(tempfile.mkdtemp(prefix="hvi-"))
    state.chmod(0o711)
    made = Cluster(state)
    try:
        made.hv("image", "import", str(BUSYBOX))
        made.hv("host", "stop")
        made.hv("cluster", "up", "--hosts", "2")
        made.kubectl("apply", "-f", "-", stdin=POD.encode())
        made.kubectl("wait", "--for=condition=Ready", "pod/box", "--timeout=300s")
        yield made
    finally:
        made.hv("cluster", "down", "--delete")
        shutil.rmtree(state, ignore_errors=True)


@pytest.fixture(params=["websocket", "spdy"])
def cluster(request: pytest.FixtureRequest, started: Cluster) -> Cluster:
    started.websockets = request.param == "websocket"
    return started


def terminal(cluster: Cluster, *args: str, typed: bytes, until: bytes) -> tuple[bytes, int]:
    """kubectl on a terminal of its own: what it shows (up to its end), and its exit code."""
    pid, master = pty.fork()
    if pid == 0:
        os.execve(str(KUBECTL), [str(KUBECTL), *args], cluster.env())
    shown = b""
    end = time.monotonic() + 330
    try:
        while time.monotonic() < end:
            if not select.select([master], [], [], 1)[0]:
                continue
            try:
                data = os.read(master, 4096)
            except OSError:
                break
            if not data:
                break
            shown += data
            if typed and until in shown:
                os.write(master, typed)
                typed = b""
    finally:
        os.close(master)
        if time.monotonic() >= end:
            os.kill(pid, signal.SIGKILL)
    return shown, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# ---- exec ------------------------------------------------------------------------------------------------------------


def test_streams_are_apart_and_codes_exact(cluster: Cluster) -> None:
    done = cluster.run("exec", "box", "-c", "c", "--", "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.returncode, done.stdout) == (7, b"out\n")
    assert done.stderr.startswith(b"err\n")
    for code in (0, 1, 2, 125, 126, 127, 128, 200, 255):
        cluster.kubectl("exec", "box", "-c", "c", "--", "sh", "-c", f"exit {code}", code=code)
    for number in (2, 9, 15):
        cluster.kubectl("exec", "box", "-c", "c", "--", "sh", "-c", f"kill -{number} $$", code=128 + number)
    assert b"not found" in cluster.run("exec", "box", "-c", "c", "--", "nonesuch").stderr


def test_stdin_is_half_closed_and_bytes_are_exact(cluster: Cluster) -> None:
    data = os.urandom(3_000_000)
    assert cluster.kubectl("exec", "-i", "box", "-c", "c", "--", "cat", stdin=data) == data
    counted = cluster.kubectl("exec", "-i", "box", "-c", "c", "--", "sh", "-c", "wc -c; echo after", stdin=data)
    assert counted.split() == [b"3000000", b"after"]


def test_a_terminal(cluster: Cluster) -> None:
    args = ("exec", "-it", "box", "-c", "c", "--", "sh", "-c", "tty; read x; echo got $x; exit 9")
    shown, code = terminal(cluster, *args, typed=b"hello\r", until=b"pts")
    assert b"got hello" in shown
    assert code == 9


def test_a_client_that_goes_takes_its_process_along(cluster: Cluster) -> None:
    """SIGPIPE at its next write; end of file for one that reads."""
    mark = f"gone-{cluster.websockets}"
    with cluster.running(
        "exec", "box", "-c", "c", "--", "sh", "-c", f"while echo {mark}; do sleep 0.1; done"
    ) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
    with cluster.running(
        "exec", "-i", "box", "-c", "c", "--", "sh", "-c", f"echo {mark}; exec cat {os.devnull} -"
    ) as cat:
        assert cat.stdout is not None
        cat.stdout.readline()
    end = time.monotonic() + 10
    listing = b"x"
    while listing and time.monotonic() < end:
        found = cluster.run("exec", "box", "-c", "c", "--", "sh", "-c", "ps -o args")
        listing = b"\n".join(r for r in found.stdout.splitlines() if mark.encode() in r or b"cat /dev/null" in r)
    assert listing == b""


# ---- attach, run -----------------------------------------------------------------------------------------------------


def test_attach(cluster: Cluster) -> None:
    mark = f"line-{cluster.websockets}\n".encode()
    with cluster.running("attach", "-i", "box", "-c", "reader") as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(mark)
        process.stdin.flush()
        assert process.stdout.readline() == b"got " + mark


def test_run_it_rm(cluster: Cluster) -> None:
    image = ("--restart=Never", "--image=localhost/podvisor/busybox", "--pod-running-timeout=5m")
    args = ("run", "once", "-it", "--rm", *image, "--", "sh", "-c", "read x; echo got $x; exit 5")
    shown, code = terminal(cluster, *args, typed=b"hello\r", until=b"enter")
    assert b"got hello" in shown
    assert b"falling back" not in shown
    assert code == 5
    assert b"NotFound" in cluster.run("get", "pod", "once").stderr


# ---- cp and logs -----------------------------------------------------------------------------------------------------


def test_cp_both_ways(cluster: Cluster, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for index in range(20):
        (folder / f"f{index}").write_bytes(os.urandom(50_000 + index))
    cluster.kubectl("cp", str(folder), f"box:/tmp/in-{cluster.websockets}", "-c", "c")
    cluster.kubectl("cp", f"box:/tmp/in-{cluster.websockets}", str(tmp_path / "back"), "-c", "c")
    for path in folder.iterdir():
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()


def test_logs_in_all_forms(started: Cluster) -> None:
    logs = ("logs", "box", "-c", "c")
    assert sorted(started.kubectl(*logs).split()) == [b"first", b"second", b"third"]
    assert len(started.kubectl(*logs, "--tail=2").splitlines()) == 2
    assert len(started.kubectl(*logs, "--limit-bytes=3")) == 3
    stamped = started.kubectl(*logs, "--timestamps").splitlines()
    assert all(re.match(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z (first|second|third)$", line) for line in stamped)
    assert started.kubectl(*logs, "--since-time=2100-01-01T00:00:00Z") == b""
    assert len(started.kubectl(*logs, "--since=1h").splitlines()) == 3
    started.kubectl("logs", "box", "-c", "nonesuch", code=1)


def test_the_log_of_the_instance_before(started: Cluster) -> None:
    end = time.monotonic() + 30
    while not (before := started.run("logs", "box", "-c", "twice", "--previous").stdout) and time.monotonic() < end:
        time.sleep(0.2)
    assert before.startswith(b"this is ")
    assert started.kubectl("logs", "box", "-c", "twice") != before


def test_a_log_is_followed(started: Cluster) -> None:
    with started.running("logs", "-f", "--tail=0", "box", "-c", "reader") as follower:
        assert follower.stdout is not None
        typing = threading.Event()

        def type_lines() -> None:
            while not typing.wait(0.3):
                with started.running("attach", "-i", "box", "-c", "reader") as process:
                    assert process.stdin is not None and process.stdout is not None
                    process.stdin.write(b"followed\n")
                    process.stdin.flush()
                    process.stdout.readline()

        thread = threading.Thread(target=type_lines)
        thread.start()
        try:
            assert follower.stdout.readline() == b"got followed\n"
        finally:
            typing.set()
            thread.join(30)


# ---- port-forward ----------------------------------------------------------------------------------------------------


@contextmanager
def forwarded(cluster: Cluster, remote: int) -> Iterator[int]:
    with cluster.running("port-forward", "pod/box", f":{remote}", "--address=127.0.0.1") as process:
        assert process.stdout is not None
        line = process.stdout.readline().decode()
        found = re.search(r"127\.0\.0\.1:(\d+) ->", line)
        assert found, line
        threading.Thread(target=process.stdout.read, daemon=True).start()
        yield int(found[1])


def ask(port: int) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=90)
    try:
        connection.request("GET", "/")
        return connection.getresponse().read()
    finally:
        connection.close()


def test_a_server_on_loopback_is_reached_by_many_at_once(cluster: Cluster) -> None:
    with forwarded(cluster, 8080) as port, ThreadPoolExecutor(10) as pool:
        assert set(pool.map(ask, [port] * 100)) == {b"served\n"}


def test_a_refused_port_is_an_error_that_names_it(cluster: Cluster) -> None:
    """kubectl itself then gives up all of its connections: see docs/limits.md."""
    with cluster.running("port-forward", "pod/box", ":9", "--address=127.0.0.1") as process:
        assert process.stdout is not None and process.stderr is not None
        found = re.search(rb"127\.0\.0\.1:(\d+) ->", process.stdout.readline())
        assert found
        with pytest.raises(OSError):
            ask(int(found[1]))
        assert b"port 9 in the pod: Connection refused" in process.stderr.readline()


# ---- the official Python client --------------------------------------------------------------------------------------


def test_the_python_client(started: Cluster) -> None:
    kubernetes = pytest.importorskip("kubernetes")
    from kubernetes.stream import portforward, stream

    with kubernetes.config.new_client_from_config(str(started.config)) as made:
        api = kubernetes.client.CoreV1Api(made)
        where = {"name": "box", "namespace": "default"}
        command = ["sh", "-c", "read x; echo got $x; echo err >&2; exit 42"]
        session = stream(
            api.connect_get_namespaced_pod_exec, **where, container="c", command=command,
            stdin=True, stdout=True, stderr=True, tty=False, _preload_content=False,
        )  # fmt: skip
        session.write_stdin("hello\n")
        session.run_forever(timeout=90)
        assert (session.read_stdout(), session.read_stderr(), session.returncode) == ("got hello\n", "err\n", 42)
        forward = portforward(api.connect_get_namespaced_pod_portforward, **where, ports="8080,9")
        sock = forward.socket(8080)
        sock.setblocking(True)
        sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
        answer = b""
        while b"served" not in answer and (data := sock.recv(4096)):
            answer += data
        sock.close()
        assert b"served" in answer
        wait_for(lambda: forward.error(9) is not None, "the error of the port that nobody listens to comes", 30)
        assert "port 9 in the pod: Connection refused" in forward.error(9)


def test_top(started: Cluster) -> None:
    rows = started.kubectl("top", "pod", "--containers", "--no-headers").decode().split("\n")[:-1]
    assert sorted(row.split()[1] for row in rows) == ["c", "reader", "twice"]
    nodes = started.kubectl("top", "node", "--no-headers").splitlines()
    assert [row.split()[0] for row in nodes] == [b"host-1", b"host-2"]


# ---- who may, and what is left ---------------------------------------------------------------------------------------


def test_a_token_of_another_namespace(started: Cluster) -> None:
    started.kubectl("create", "namespace", "other")
    started.kubectl("create", "serviceaccount", "robot", "-n", "other")
    allowed = ("--role=guest", "--serviceaccount=other:robot", "-n", "other")
    rule = ("--verb=create,get", "--resource=pods,pods/exec,pods/log,pods/portforward", "-n", "other")
    started.kubectl("create", "role", "guest", *rule)
    started.kubectl("create", "rolebinding", "guest", *allowed)
    config = started.state / "robot.kubeconfig"
    shutil.copy(started.config, config)
    token = started.kubectl("create", "token", "robot", "-n", "other").decode().strip()
    as_robot = ("--kubeconfig", str(config), "--user=robot")
    started.kubectl("--kubeconfig", str(config), "config", "set-credentials", "robot", f"--token={token}")
    for command in (
        ("exec", "box", "-c", "c", "--", "true"),
        ("logs", "box", "-c", "c"),
        ("port-forward", "box", ":8080"),
    ):
        done = started.run(*as_robot, "-n", "default", *command)
        assert done.returncode != 0
        assert b"forbidden" in done.stderr.lower(), done.stderr
        assert b"robot" in done.stderr


def test_who_ran_what_is_on_record(started: Cluster) -> None:
    started.kubectl("exec", "box", "-c", "c", "--", "true", "on-record")
    audit = started.state / "cluster/master/audit.log"
    end = time.monotonic() + 5
    while b"on-record" not in audit.read_bytes() and time.monotonic() < end:
        time.sleep(0.05)
    line = next(r for r in audit.read_text().splitlines() if "on-record" in r)
    for part in (
        '"user":"kubernetes-admin"',
        '"subresource":"exec"',
        '"namespace":"default"',
        '"name":"box"',
        '"code":101',
    ):
        assert part in line


@pytest.mark.soak
def test_a_gibibyte_through_exec(cluster: Cluster) -> None:
    """Into a file in memory and out again, hashed at this end."""
    put = [str(KUBECTL), "exec", "-i", "box", "-c", "c", "--", "sh", "-c", "cat > /tmp/big"]
    sent, got = hashlib.sha256(), hashlib.sha256()
    block = os.urandom(1 << 20)
    with subprocess.Popen(put, stdin=subprocess.PIPE, env=cluster.env()) as process:
        assert process.stdin is not None
        for index in range(1024):
            piece = index.to_bytes(4, "big") + block[4:]
            sent.update(piece)
            process.stdin.write(piece)
    assert process.returncode == 0
    with cluster.running("exec", "box", "-c", "c", "--", "cat", "/tmp/big") as back:
        assert back.stdout is not None
        while data := back.stdout.read(1 << 20):
            got.update(data)
    assert got.digest() == sent.digest()
