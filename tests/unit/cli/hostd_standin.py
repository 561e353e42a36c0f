"""A stand-in for hostd that speaks its real HTTP and WebSocket contracts, with processes of this machine as containers.

For tests of the command line only: hostd itself has tests of its own, and tests/integration/test_cli.py runs hv against
the real one. It runs in a thread with an event loop of its own, so that hv can be a real process.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import io
import json
import os
import pty
import struct
import subprocess
import sys
import tarfile
import termios
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from aiohttp import WSMsgType, web
from this_machine import ThisMachine

from hypervisor.introspect.agent import AgentClient
from hypervisor.introspect.portforward import websocket as portforward

ROOT = Path(__file__).resolve().parents[3]
HV = [sys.executable, "-m", "hypervisor.cli.main"]
Hv = Callable[..., subprocess.CompletedProcess[Any]]  # the fixture hv

TOKEN = "secret-token"
V5, V4 = "v5.channel.k8s.io", "v4.channel.k8s.io"


class Container:
    """A process and everything that it wrote."""

    def __init__(self, argv: list[str]) -> None:
        self.argv = argv
        self.output: list[tuple[int, bytes]] = []
        self.changed = asyncio.Condition()
        self.process: asyncio.subprocess.Process | None = None
        self.exit_code: int | None = None
        self.task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        pipe = asyncio.subprocess.PIPE
        self.process = await asyncio.create_subprocess_exec(*self.argv, stdin=pipe, stdout=pipe, stderr=pipe)
        self.task = asyncio.create_task(self._run(self.process))

    async def _run(self, process: asyncio.subprocess.Process) -> None:
        await asyncio.gather(self._pump(1, process.stdout), self._pump(2, process.stderr))
        self.exit_code = await reap(process)
        async with self.changed:
            self.changed.notify_all()

    async def _pump(self, channel: int, stream: asyncio.StreamReader | None) -> None:
        assert stream is not None
        while data := await stream.read(65536):
            async with self.changed:
                self.output.append((channel, data))
                self.changed.notify_all()


def shell_code(code: int) -> int:
    return 128 - code if code < 0 else code


async def reap(process: asyncio.subprocess.Process) -> int:
    """Ends a process whose pipes have ended, if it has not by itself."""
    try:
        return shell_code(await asyncio.wait_for(process.wait(), 5))
    except (TimeoutError, asyncio.CancelledError):
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        return shell_code(await process.wait())


def status_of(code: int) -> dict[str, Any]:
    if code == 0:
        return {"kind": "Status", "status": "Success"}
    causes = [{"reason": "ExitCode", "message": str(code)}]
    return {"kind": "Status", "status": "Failure", "reason": "NonZeroExitCode", "details": {"causes": causes}}


def refusal(code: int, reason: str, message: str) -> web.Response:
    body = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "reason": reason}
    return web.json_response(body | {"code": code}, status=code)


class StandIn:
    """The server. `files` is the root of every container's file system."""

    def __init__(self, state: Path, files: Path) -> None:
        self.state, self.files = state, files
        self.pods: dict[str, dict[str, Any]] = {}
        self.containers: dict[str, Container] = {}
        self.images: list[dict[str, Any]] = []
        self.requests: list[tuple[str, str]] = []
        self.attach_refused = False
        self.console = "Linux booted {}\n"
        self.extra: dict[str, Any] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def __enter__(self) -> StandIn:
        self._thread.start()
        self.call(self._start())
        return self

    def __exit__(self, *_exc: object) -> None:
        self.call(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(60)

    async def _start(self) -> None:
        app = web.Application(middlewares=[self._check], client_max_size=1 << 30)
        api = "/hv/v1"
        app.add_routes(
            [
                web.get(f"{api}/version", self._version),
                web.get(f"{api}/pods", self._list),
                web.post(f"{api}/pods", self._create),
                web.get(api + "/pods/{ns}/{pod}", self._read),
                web.delete(api + "/pods/{ns}/{pod}", self._delete),
                web.post(api + "/pods/{ns}/{pod}/stop", self._stop_pod),
                web.get(api + "/pods/{ns}/{pod}/console", self._console),
                web.get(api + "/pods/{ns}/{pod}/archive", self._archive_get),
                web.put(api + "/pods/{ns}/{pod}/archive", self._archive_put),
                web.get(f"{api}/top", self._top),
                web.get(f"{api}/images", self._images),
                web.delete(f"{api}/images", self._remove_image),
                web.post(f"{api}/images/prune", self._prune),
                web.post(f"{api}/images/pull", self._pull),
                web.post(f"{api}/images/import", self._pull),
                web.get("/containerLogs/{ns}/{pod}/{container}", self._logs),
                web.get("/exec/{ns}/{pod}/{container}", self._exec),
                web.get("/attach/{ns}/{pod}/{container}", self._attach),
                web.get("/portForward/{ns}/{pod}", self._port_forward),
            ]
        )
        self._runner = web.AppRunner(app, max_line_size=4 << 20, shutdown_timeout=1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        port = self._runner.addresses[0][1]
        host = {"pid": os.getpid(), "start_time": 0, "address": "127.0.0.1", "port": port}
        self.state.mkdir(exist_ok=True)
        (self.state / "host.json").write_text(json.dumps(host))
        (self.state / "token").write_text(TOKEN)

    async def _stop(self) -> None:
        for container in self.containers.values():
            await self._end(container)
        await self._runner.cleanup()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        for _ in range(5):  # closed transports tell their protocols in the loop's next rounds
            await asyncio.sleep(0)

    async def _end(self, container: Container) -> None:
        if container.process is not None and container.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                container.process.terminate()
        if container.task is not None:
            await container.task

    @web.middleware
    async def _check(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.requests.append((request.method, request.path_qs))
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return refusal(401, "Unauthorized", "bad token")
        name = request.match_info.get("pod")
        if name is not None and name not in self.pods:
            return refusal(404, "NotFound", f"there is no pod {name}; hv ps lists them")
        return await handler(request)

    # ---- pods --------------------------------------------------------------------------------------------------------

    def add_pod(self, name: str, **status: Any) -> None:
        """A pod that is there from the start, without a process."""
        running = {"name": "main", "restartCount": 0, "state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}}}
        self.pods[name] = {
            "metadata": {"name": name, "namespace": "default", "creationTimestamp": "2026-01-01T00:00:00Z"},
            "spec": {"containers": [{"name": "main", "image": "busybox"}, {"name": "side", "image": "web"}]},
            "status": {"phase": "Running", "containerStatuses": [running]} | status,
        }

    def _seen(self, name: str) -> dict[str, Any]:
        pod, container = self.pods[name], self.containers.get(name)
        if container is not None:
            first = pod["spec"]["containers"][0]["name"]
            code = container.exit_code
            state = {"running": {}} if code is None else {"terminated": {"exitCode": code}}
            phase = "Running" if code is None else "Failed" if code else "Succeeded"
            pod["status"] = {"phase": phase, "containerStatuses": [{"name": first, "state": state}]}
        return pod

    async def _version(self, _request: web.Request) -> web.Response:
        return web.json_response({"version": "0.1.0", "pid": os.getpid()})

    async def _list(self, _request: web.Request) -> web.Response:
        items = [self._seen(name) for name in self.pods]
        return web.json_response({"kind": "PodList", "apiVersion": "v1", "items": items})

    async def _create(self, request: web.Request) -> web.Response:
        pod = await request.json()
        name = pod["metadata"]["name"]
        if name in self.pods:
            return refusal(409, "Conflict", f"pod {name} exists")
        container = pod["spec"]["containers"][0]
        if container["image"] == "refused":
            return refusal(422, "Invalid", "spec.containers[0].image: refused here")
        pod["metadata"].setdefault("namespace", "default")
        pod["metadata"].setdefault("annotations", {})["podvisor.dev/timing"] = '{"boot": 1.5}'
        self.pods[name] = pod
        if container["image"] == "broken":
            waiting = {"waiting": {"reason": "CreateContainerError", "message": "no such entrypoint"}}
            pod["status"] = {"phase": "Pending", "containerStatuses": [{"name": container["name"], "state": waiting}]}
        else:
            self.containers[name] = Container([*container.get("command", ()), *container.get("args", ())])
            await self.containers[name].start()
        return web.json_response(pod, status=201)

    async def _read(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["pod"]
        if not request.query.get("watch"):
            return web.json_response(self._seen(name))
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(json.dumps(self._seen(name)).encode() + b"\n")
        container = self.containers.get(name)
        if container is not None and container.task is not None:
            await container.task
            await response.write(json.dumps(self._seen(name)).encode() + b"\n")
        return response

    async def _delete(self, request: web.Request) -> web.Response:
        name = request.match_info["pod"]
        if name in self.containers:
            await self._end(self.containers.pop(name))
        return web.json_response(self.pods.pop(name))

    async def _stop_pod(self, request: web.Request) -> web.Response:
        name = request.match_info["pod"]
        if name in self.containers:
            await self._end(self.containers[name])
        return web.json_response(self._seen(name))

    async def _console(self, request: web.Request) -> web.Response:
        return web.Response(text=self.console.format(request.query_string))

    async def _top(self, _request: web.Request) -> web.Response:
        vm = {"cpu_ns": 1_500_000_000, "memory_bytes": 200 << 20}
        stats = {"cpu_ns": 20_000_000, "memory_bytes": 3 << 20, "memory_peak": 4 << 20, "pids": 2, "disk_bytes": 4096}
        pods = [{"namespace": "default", "name": n, "vm": vm, "containers": {"main": stats}} for n in self.pods]
        return web.json_response({"pods": pods})

    async def _logs(self, request: web.Request) -> web.Response:
        container = self.containers.get(request.match_info["pod"])
        if container is None:
            return web.Response(text=request.path_qs)
        return web.Response(body=b"".join(data for _, data in container.output))

    # ---- files -------------------------------------------------------------------------------------------------------

    async def _archive_get(self, request: web.Request) -> web.StreamResponse:
        path = request.query["path"]
        if path in self.extra:  # a tar of the test's own making
            return web.Response(body=self.extra[path])
        here = self.files / path.lstrip("/")
        if not here.is_symlink() and not here.exists():
            return refusal(404, "NotFound", f"{path}: no such file or directory")
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w") as archive:
            archive.add(here, here.name)
        response = web.StreamResponse()
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            view = data.getvalue()
            for start in range(0, len(view), 65536):
                await response.write(view[start : start + 65536])
        return response

    async def _archive_put(self, request: web.Request) -> web.Response:
        here = self.files / request.query["path"].lstrip("/")
        if not here.is_dir():
            return refusal(404, "NotFound", f"{request.query['path']}: no such directory")
        data = io.BytesIO(await request.read())
        with tarfile.open(fileobj=data) as archive:
            # Python 3.11.4 and later want to be told that the test's own archive is trusted; earlier ones cannot be.
            archive.extractall(here, **({"filter": "tar"} if hasattr(tarfile, "tar_filter") else {}))
        return web.Response(status=204)

    # ---- images ------------------------------------------------------------------------------------------------------

    async def _images(self, _request: web.Request) -> web.Response:
        return web.json_response({"images": self.images})

    async def _remove_image(self, request: web.Request) -> web.Response:
        if request.query["reference"] == "used":
            return refusal(409, "Conflict", "image used is in use by pod web")
        return web.json_response({})

    async def _prune(self, _request: web.Request) -> web.Response:
        return web.json_response({"removed": ["docker.io/library/old:latest"]})

    async def _pull(self, request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        response = web.StreamResponse()
        await response.prepare(request)
        reference = asked.get("reference") or asked["path"]
        lines: list[dict[str, Any]] = [{"progress": {"phase": "download", "done": 1, "total": 2048, "unit": "bytes"}}]
        if reference == "missing":
            lines.append({"error": {"kind": "Status", "code": 404, "message": "image missing: not found"}})
        else:
            lines.append({"image": {"id": "ab" * 32, "names": [f"docker.io/library/{Path(reference).name}:latest"]}})
        await response.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
        return response

    # ---- streams -----------------------------------------------------------------------------------------------------

    async def _exec(self, request: web.Request) -> web.StreamResponse:
        argv = request.query.getall("command")
        if argv[0] == "unavailable":
            return refusal(503, "ServiceUnavailable", "pod hello has no running VM")
        socket = web.WebSocketResponse(protocols=(V5, V4), max_msg_size=0)
        await socket.prepare(request)
        if argv[0] == "broken":
            await socket.send_bytes(b"\x01before")
            await socket.close(message=b"the VM died")
            return socket
        if request.query.get("tty"):
            code = await self._terminal(socket, argv)
        else:
            code = await self._pipes(socket, argv, bool(request.query.get("input")))
        with contextlib.suppress(ConnectionError):
            await socket.send_bytes(b"\x03" + json.dumps(status_of(code)).encode())
            await socket.close()
        return socket

    async def _pipes(self, socket: web.WebSocketResponse, argv: list[str], stdin: bool) -> int:
        pipe, null = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
        process = await asyncio.create_subprocess_exec(*argv, stdin=pipe if stdin else null, stdout=pipe, stderr=pipe)

        async def down(channel: int, stream: Any) -> None:
            while data := await stream.read(65536):
                await socket.send_bytes(bytes([channel]) + data)

        up = asyncio.create_task(self._up(socket, process))
        try:
            await asyncio.gather(down(1, process.stdout), down(2, process.stderr))
        except ConnectionError:
            pass
        finally:
            code = await reap(process)
            up.cancel()
        return code

    async def _up(self, socket: web.WebSocketResponse, process: asyncio.subprocess.Process) -> None:
        async for message in socket:
            if message.type is not WSMsgType.BINARY or process.stdin is None:
                continue
            if message.data[0] == 0:
                process.stdin.write(message.data[1:])
                with contextlib.suppress(ConnectionError):
                    await process.stdin.drain()
            elif message.data == b"\xff\x00":
                process.stdin.close()
        if process.returncode is None:
            process.kill()

    async def _terminal(self, socket: web.WebSocketResponse, argv: list[str]) -> int:
        leader, follower = pty.openpty()
        process = await asyncio.create_subprocess_exec(
            *argv, stdin=follower, stdout=follower, stderr=follower, start_new_session=True
        )

        async def up() -> None:
            async for message in socket:
                if message.type is WSMsgType.BINARY and message.data[0] == 0:
                    os.write(leader, message.data[1:])
                elif message.type is WSMsgType.BINARY and message.data[0] == 4:
                    size = json.loads(message.data[1:])
                    fcntl.ioctl(leader, termios.TIOCSWINSZ, struct.pack("HHHH", size["Height"], size["Width"], 0, 0))

        task = asyncio.create_task(up())
        os.set_blocking(leader, False)
        try:
            while process.returncode is None and not socket.closed:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(process.wait(), 0.02)
                with contextlib.suppress(BlockingIOError, OSError):
                    await socket.send_bytes(b"\x01" + os.read(leader, 65536))
        finally:
            if process.returncode is None:
                process.kill()
            code = await reap(process)
            task.cancel()
            os.close(leader)
            os.close(follower)
        return code

    async def _attach(self, request: web.Request) -> web.StreamResponse:
        if self.attach_refused:
            return refusal(503, "ServiceUnavailable", "pod has succeeded")
        container = self.containers[request.match_info["pod"]]
        assert container.process is not None
        socket = web.WebSocketResponse(protocols=(V5, V4))
        await socket.prepare(request)
        up = asyncio.create_task(self._attach_up(socket, container.process))
        at = 0 if request.query.get("replay") else len(container.output)
        while container.exit_code is None or at < len(container.output):
            async with container.changed:
                while at >= len(container.output) and container.exit_code is None:
                    await container.changed.wait()
            while at < len(container.output):
                channel, data = container.output[at]
                await socket.send_bytes(bytes([1 if request.query.get("tty") else channel]) + data)
                at += 1
        await socket.send_bytes(b"\x03" + json.dumps(status_of(container.exit_code)).encode())
        await socket.close()
        up.cancel()
        return socket

    async def _port_forward(self, request: web.Request) -> web.StreamResponse:
        return await portforward.serve(request, cast("AgentClient", ThisMachine()))

    async def _attach_up(self, socket: web.WebSocketResponse, process: asyncio.subprocess.Process) -> None:
        async for message in socket:
            if message.type is WSMsgType.BINARY and process.stdin is not None:
                if message.data[0] == 0:
                    process.stdin.write(message.data[1:])
                elif message.data == b"\xff\x00":
                    process.stdin.close()
