"""Images from a real registry (``docker-registry`` on loopback, with passwords), and the sample images."""

# ruff: noqa: ASYNC221, ASYNC240 -- a test's own loop may wait for a file or a short program

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from hypervisor.errors import InvalidInput, NotFound, Unavailable
from hypervisor.images import Credentials, Image, ImageStore, ProgressEvent, login, logout

SAMPLES = Path(__file__).parents[2] / "guest-images/out/samples"
USER = Credentials("user", "pass word")

pytestmark = pytest.mark.registry


@dataclass(frozen=True)
class Registry:
    """A running registry that wants a password."""

    address: str
    data: Path

    def push(self, source: str, name: str) -> str:
        """Push with skopeo; the manifest's digest."""
        digest = self.data / "digest"
        options = ["--quiet", "--dest-creds", f"{USER.username}:{USER.password}", "--dest-tls-verify=false"]
        argv = ["skopeo", "copy", *options, "--digestfile", digest, source, f"docker://{self.address}/{name}"]
        subprocess.run(argv, check=True)
        return digest.read_text().strip()


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    folder = tmp_path_factory.mktemp("registry")
    (folder / "htpasswd").write_text(f"{USER.username}:{bcrypt(USER.password)}\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    config = {
        "version": "0.1",
        "log": {"level": "error"},
        "storage": {"filesystem": {"rootdirectory": str(folder / "data")}},
        "http": {"addr": address},
        "auth": {"htpasswd": {"realm": "test", "path": str(folder / "htpasswd")}},
    }
    (folder / "config.yml").write_text(json.dumps(config))
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen(["docker-registry", "serve", folder / "config.yml"], stdout=log, stderr=log) as process,
    ):
        try:
            wait_for_port(address, process)
            yield Registry(address, folder)
        finally:
            process.terminate()


def bcrypt(password: str) -> str:
    """The only kind of hash that docker-registry takes; perl, which every Debian has, knows the system's crypt."""
    salt = "$2y$05$" + secrets.token_hex(11)
    argv = ["perl", "-e", "print crypt($ARGV[0], $ARGV[1])", password, salt]
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


def wait_for_port(address: str, process: subprocess.Popen[bytes]) -> None:
    host, _, port = address.partition(":")
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection((host, int(port)), timeout=1):
            return
    raise AssertionError(f"docker-registry does not listen (exit status {process.poll()})")


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "store")


@pytest.fixture(autouse=True)
def no_kept_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "auth/auth.json"))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    return tmp_path / "auth/auth.json"


@pytest.fixture(scope="module")
def busybox(registry: Registry) -> str:
    """The sample's name in the registry."""
    if not (SAMPLES / "busybox.tar").exists():
        pytest.skip("needs the sample images: make samples")
    registry.push(f"oci-archive:{SAMPLES}/busybox.tar", "demo/busybox:1.0")
    return f"{registry.address}/demo/busybox:1.0"


def left(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.name != "lock")


NOTHING = ["building", "disks", "staging"]


async def test_pull(store: ImageStore, busybox: str, tmp_path: Path) -> None:
    events: list[ProgressEvent] = []
    image = await store.pull(busybox, credentials=USER, progress=events.append)
    assert image.names == (busybox,)
    assert image.config.cmd == ("sh",)
    assert list(dict.fromkeys(event.phase for event in events)) == ["resolve", "download", "unpack", "write", "done"]
    downloads = [event for event in events if event.phase == "download"]
    assert downloads[-1].done == downloads[-1].total
    [imported] = await store.import_archive(SAMPLES / "busybox.tar")
    assert imported.id == image.id, "the registry's way must keep the image's id"
    assert left(tmp_path / "store/staging") == []


async def test_pull_by_digest_and_find_it_again(store: ImageStore, registry: Registry, busybox: str) -> None:
    digest = registry.push(f"oci-archive:{SAMPLES}/busybox.tar", "demo/busybox:1.0")
    pinned = f"{registry.address}/demo/busybox@{digest}"
    image = await store.pull(pinned, credentials=USER)
    assert image.digest == digest
    assert store.get(pinned) == image
    wrong = f"{registry.address}/demo/busybox@sha256:{'1' * 64}"
    with pytest.raises(NotFound, match="the registry has no such image"):
        await store.pull(wrong, credentials=USER)


async def test_docker_manifests_keep_the_images_id(store: ImageStore, registry: Registry, busybox: str) -> None:
    argv = ["skopeo", "copy", "-q", "--format", "v2s2", "--src-tls-verify=false", "--dest-tls-verify=false"]
    creds = ["--src-creds", "user:pass word", "--dest-creds", "user:pass word"]
    target = f"{registry.address}/demo/docker:1"
    subprocess.run([*argv, *creds, f"docker://{busybox}", f"docker://{target}"], check=True)
    image = await store.pull(target, credentials=USER)
    show = ["skopeo", "inspect", "--raw", "--tls-verify=false", "--creds", "user:pass word", f"docker://{target}"]
    manifest = json.loads(subprocess.run(show, check=True, capture_output=True).stdout)
    assert manifest["mediaType"] == "application/vnd.docker.distribution.manifest.v2+json"
    assert manifest["config"]["digest"] == f"sha256:{image.id}"


async def test_the_policies(store: ImageStore, registry: Registry, busybox: str) -> None:
    with pytest.raises(NotFound, match="never"):
        await store.pull(busybox, policy="never", credentials=USER)
    name = f"{registry.address}/demo/moving:latest"
    registry.push(f"oci-archive:{SAMPLES}/busybox.tar", "demo/moving:latest")
    first = await store.pull(name, credentials=USER)
    registry.push(f"oci-archive:{SAMPLES}/web.tar", "demo/moving:latest")
    assert await store.pull(name, policy="missing", credentials=USER) == first
    second = await store.pull(name, policy="always", credentials=USER)
    assert second.id != first.id
    assert store.get(name).id == second.id
    assert store.get(first.id).names == ()


async def test_always_downloads_nothing_that_is_here(store: ImageStore, busybox: str) -> None:
    await store.pull(busybox, credentials=USER)
    events: list[ProgressEvent] = []
    await store.pull(busybox, policy="always", credentials=USER, progress=events.append)
    assert [event.phase for event in events] == ["resolve", "done"]


async def test_two_pulls_at_once_download_once(store: ImageStore, busybox: str) -> None:
    events: list[ProgressEvent] = []
    pulls = [store.pull(busybox, credentials=USER, progress=events.append) for _ in range(3)]
    images = await asyncio.gather(*pulls)
    assert len({image.id for image in images}) == 1
    assert sum(event.phase == "write" for event in events) == 1


@pytest.mark.parametrize(
    ("name", "credentials", "kind", "message"),
    [
        ("demo/busybox:1.0", Credentials("user", "wrong"), InvalidInput, "the registry refuses access.*hv image login"),
        ("demo/busybox:1.0", None, InvalidInput, "the registry refuses access.*hv image login"),
        (
            "demo/busybox:2.0",
            USER,
            NotFound,
            "demo/busybox:2.0: the registry has no such image; check its name and tag",
        ),
        ("demo/nothing", USER, NotFound, "demo/nothing:latest: the registry has no such image"),
    ],
)
async def test_what_cannot_be_pulled(
    store: ImageStore,
    registry: Registry,
    busybox: str,
    tmp_path: Path,
    name: str,
    credentials: Credentials | None,
    kind: type[Exception],
    message: str,
) -> None:
    with pytest.raises(kind, match=message) as caught:
        await store.pull(f"{registry.address}/{name}", credentials=credentials)
    assert "wrong" not in str(caught.value)
    assert left(tmp_path / "store") == NOTHING


async def test_a_registry_that_is_not_there(store: ImageStore, tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(Unavailable, match="the registry cannot be reached"):
            await store.pull(f"127.0.0.1:{unused.getsockname()[1]}/x")
    assert left(tmp_path / "store") == NOTHING


async def test_login_verifies_keeps_and_forgets(
    store: ImageStore, registry: Registry, busybox: str, no_kept_credentials: Path
) -> None:
    with pytest.raises(InvalidInput, match="refuses this user name and password"):
        await login(registry.address, "user", "wrong")
    assert not no_kept_credentials.exists()
    assert await login(registry.address, USER.username, USER.password) == no_kept_credentials
    assert stat.S_IMODE(no_kept_credentials.stat().st_mode) == 0o600
    assert (await store.pull(busybox)).names == (busybox,)
    await logout(registry.address)
    with pytest.raises(InvalidInput, match="hv image login"):
        await store.pull(busybox, policy="always")
    with pytest.raises(NotFound, match="no credentials are kept"):
        await logout(registry.address)


class Valve:
    """A TCP proxy before the registry that lets only so many bytes of answers through: a download that never ends."""

    def __init__(self, upstream: str, allow: int) -> None:
        self._upstream = upstream.split(":")
        self._left = allow
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Valve:
        return self

    def __exit__(self, *_: object) -> None:
        for each in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection((self._upstream[0], int(self._upstream[1])))
                self._sockets += [client, server]
                threading.Thread(target=self._pass_on, args=(client, server, False), daemon=True).start()
                threading.Thread(target=self._pass_on, args=(server, client, True), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, counted: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(4096):
                target.sendall(data)
                self._left -= len(data) * counted
                if self._left <= 0:
                    return
            target.shutdown(socket.SHUT_WR)


@pytest.fixture
def stuck(registry: Registry, tmp_path: Path) -> Iterator[str]:
    """The name of an image whose download begins and never ends."""
    (tmp_path / "layer.bin").write_bytes(os.urandom(4 << 20))
    subprocess.run(["tar", "-C", tmp_path, "-cf", tmp_path / "big.tar", "layer.bin"], check=True)
    registry.push(f"tarball:{tmp_path}/big.tar", "demo/big:latest")
    with Valve(registry.address, allow=1 << 20) as valve:
        yield f"{valve.address}/demo/big"


async def test_cancelling_a_pull_stops_skopeo_and_leaves_nothing(stuck: str, store: ImageStore, tmp_path: Path) -> None:
    arriving = asyncio.Event()

    def progress(event: ProgressEvent) -> None:
        if event.phase == "download" and event.done > 0:
            arriving.set()

    pull = asyncio.create_task(store.pull(stuck, credentials=USER, progress=progress))
    await asyncio.wait_for(arriving.wait(), 60)
    assert skopeos() != []
    pull.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pull
    assert skopeos() == []
    assert left(tmp_path / "store") == NOTHING


def skopeos() -> list[int]:
    """The children of this process."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        for pid in (task / "children").read_text().split():
            with contextlib.suppress(OSError):
                if b"skopeo" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(int(pid))
    return found


async def test_skopeo_dies_with_a_daemon_that_is_killed(stuck: str, tmp_path: Path) -> None:
    skopeo = kill_a_pull(tmp_path / "store", stuck)
    deadline = time.monotonic() + 10
    while skopeo.exists():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    await ImageStore.open(tmp_path / "store")
    assert left(tmp_path / "store") == NOTHING


def kill_a_pull(folder: Path, name: str) -> Path:
    """Start a pull in a process of its own and SIGKILL that while it downloads; skopeo's folder in /proc."""
    program = (
        "import asyncio, sys; from pathlib import Path; from hypervisor.images import ImageStore, Credentials\n"
        "said = lambda event: event.phase == 'download' and event.done > 0 and print('arriving', flush=True)\n"
        "store, user = ImageStore(Path(sys.argv[1])), Credentials('user', 'pass word')\n"
        "asyncio.run(store.pull(sys.argv[2], credentials=user, progress=said))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    argv = [sys.executable, "-c", program, folder, name]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, env=environment, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "arriving\n"
            [pid] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        finally:
            process.kill()
    return Path("/proc") / pid


async def test_an_image_of_a_samples_archive_runs_under_its_short_name(store: ImageStore, busybox: str) -> None:
    found: list[Image] = []
    for sample in ("busybox", "python", "web"):
        found += await store.import_archive(SAMPLES / f"{sample}.tar")
        assert store.get(sample).names == (f"localhost/podvisor/{sample}:latest",)
    assert len({image.serial for image in found}) == 3
