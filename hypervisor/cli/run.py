"""``hv run``: a container from an image, in a pod VM of its own."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from hypervisor.cli import complete, follow, pods, podspec, progress, route, session
from hypervisor.cli.app import CommandTail, Settings, pass_settings
from hypervisor.cli.execute import usable_tty
from hypervisor.cli.output import note
from hypervisor.cli.rest import Connection, target
from hypervisor.cli.signals import Interrupted
from hypervisor.errors import Conflict, HvError, InvalidInput, NotFound, Unavailable, VmFailed

TIMING_ANNOTATION = "podvisor.dev/timing"
NAME_ATTEMPTS = 5
NEVER_RAN = (126, 127, 128)  # exit codes of what could not be executed, not found, not started; programs use them too

_OPTIONS = (
    click.option("--name", help="Name of the pod. Default: one is made up."),
    click.option("--rm", "remove", is_flag=True, help="Remove the pod when its container ends, or on Ctrl-C."),
    click.option(
        "-d", "--detach", is_flag=True, help="Leave it in the background; prints the pod's name once it runs."
    ),
    click.option("-i", "--interactive", "stdin", is_flag=True, help="Send standard input to the container."),
    click.option("-t", "--tty", is_flag=True, help="Give the container a terminal; ctrl-p ctrl-q leaves it."),
    click.option("--memory", metavar="SIZE", help="Memory limit, as 128Mi."),
    click.option("--cpus", metavar="N", help="CPU limit, as 2, 0.5 or 500m."),
    click.option("-e", "--env", multiple=True, metavar="K=V", help="Set a variable; K alone takes hv's own."),
    click.option("--env-file", "env_files", multiple=True, metavar="FILE", help="Set variables, one K=V a line."),
    click.option(
        "--net",
        type=click.Choice(["user", "none"]),
        default="user",
        show_default=True,
        help="user: reaches outside; none: loopback only.",
    ),
    click.option("--disk-size", metavar="SIZE", help="Size of the pod's writable disk, as 1Gi."),
    click.option(
        "--pull",
        type=click.Choice(list(podspec.PULL_POLICIES)),
        default="missing",
        show_default=True,
        help="When to ask the registry for the image.",
    ),
    click.option(
        "-v",
        "--volume",
        "volumes",
        multiple=True,
        metavar="NAME:/PATH",
        help="Mount a volume of the pod; :ro for read-only, :memory for one in memory.",
    ),
    click.option("--entrypoint", metavar="CMD", help="Instead of the image's entrypoint."),
    click.option("-w", "--workdir", metavar="DIR", help="Working directory."),
    click.option("-u", "--user", metavar="UID[:GID]", help="User and group, as numbers."),
    click.option("--hostname", metavar="NAME", help="Host name. Default: the pod's name."),
    click.option("--read-only", is_flag=True, help="Read-only root file system."),
    click.option(
        "--restart",
        type=click.Choice(list(podspec.RESTART_POLICIES)),
        default="no",
        show_default=True,
        help="When to start the container again after it ended.",
    ),
    click.option("-l", "--label", "labels", multiple=True, metavar="K=V", help="Label the pod."),
    click.option("--cold", is_flag=True, help="Boot the VM instead of cloning it from a template."),
    click.option("--timing", is_flag=True, help="Add one JSON object with the time of each phase to stderr."),
)


def import_hint(image: str) -> str:
    """How to get an image in without a registry: the sample of this name, where this is a built source tree."""
    samples = Path(__file__).resolve().parents[2] / "guest-images/out/samples"
    name = image.removesuffix(":latest")
    sample = samples / f"{name}.tar"
    if re.fullmatch("[a-z0-9-]+", name) and sample.is_file():
        with contextlib.suppress(ValueError):
            sample = sample.relative_to(Path.cwd())
        return f"to take the sample image: hv image import {sample}"
    return "to take it from a file: hv image import FILE"


def _with_options(command: Any) -> Any:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


class Clock:
    """Seconds of each phase, in the order in which they ended."""

    def __init__(self) -> None:
        self._start = self._last = time.monotonic()
        self.phases: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        """The phase ends now."""
        now = time.monotonic()
        self.phases[phase] = round(now - self._last, 4)
        self._last = now

    def total(self) -> dict[str, float]:
        """All phases, and their sum."""
        return self.phases | {"total": round(time.monotonic() - self._start, 4)}


@click.command("run", cls=CommandTail)
@click.argument("image", shell_complete=complete.image_names)
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="[--] [COMMAND...]")
@_with_options
@pass_settings
def run(
    settings: Settings,
    /,
    name: str | None,
    remove: bool,
    detach: bool,
    timing: bool,
    stdin: bool,
    tty: bool,
    **given: Any,
) -> int:
    """Run a container from an image in a pod VM of its own.

    The command replaces the image's default one; its entrypoint stays, as docker has it. Standard output and error
    are kept apart (with -t they are one terminal). Exit code: the container's; 125 when hv itself failed.

    Ctrl-C (without -t), SIGTERM and SIGHUP stop the pod: its processes get their stop signal and the grace period; a
    second one kills them. With -t, Ctrl-C is typed into the container, and ctrl-p ctrl-q leaves it running.

    \b
    hv run --rm busybox -- sh -c 'echo hello from $(uname -r)'
    hv run -it --rm python
    hv run -d --name web --memory 256Mi web
    """
    if detach and remove:
        raise click.UsageError("--detach and --rm exclude each other: nobody would be there to remove the pod")
    tty = tty if detach else usable_tty(tty, stdin)
    # As docker has it: only input that comes from here ends with it. Whoever detaches can come back to it.
    once = stdin and not tty and not detach
    options = podspec.RunOptions(name=name or "", stdin=stdin, stdin_once=once, tty=tty, **given)
    return _Run(settings, options, remove=remove, detach=detach, timing=timing).run()


class _Run:
    """One ``hv run``. From `_create` on the pod exists; what becomes of it when hv fails or is ended: `_on_failure`."""

    def __init__(
        self, settings: Settings, options: podspec.RunOptions, *, remove: bool, detach: bool, timing: bool
    ) -> None:
        self._settings = settings
        self._options = options
        self._remove = remove
        self._detach = detach
        self._timing = timing
        self._clock = Clock()
        self._signals = 0

    def run(self) -> int:
        try:
            podspec.check(self._options)  # a mistake shows before a daemon is started for it
        except InvalidInput as e:
            raise click.UsageError(str(e)) from e
        with self._settings.connect_any(None) as connection:
            self._clock.lap("connect")
            self._pull(connection)
            self._clock.lap("image")
            pod = self._create(connection)
            self._clock.lap("create")
        if self._detach:
            return self._background(pod)
        with self._on_failure(pod):
            return self._foreground(pod)

    def _background(self, pod: dict[str, Any]) -> int:
        """The name goes out only when the container runs, or has run: what comes next on a script may need that."""
        with follow.fresh(self._settings.state) as watch:
            pod = follow.wait_started(watch, *_key(pod), podspec.container_name(self._options.name))
        self._clock.lap("start")
        click.echo(pods.name_of(pod))
        self._report(pod)
        return 0

    def _pull(self, connection: Connection) -> None:
        image = self._options.image
        body = {"reference": image, "policy": self._options.pull}
        try:
            progress.follow(connection.post("hv", "v1", "images", "pull", value=body), image)
        except (NotFound, Unavailable) as e:
            if "hostd" in str(e):  # not the registry
                raise
            raise type(e)(f"{e}; {import_hint(image)}") from e

    def _create(self, connection: Connection) -> dict[str, Any]:
        """Creates the pod; a made-up name that is taken is made up again."""
        from dataclasses import replace

        for attempt in range(NAME_ATTEMPTS):
            options = self._options
            if not options.name:
                options = replace(options, name=podspec.generate_name())
            try:
                created = connection.post("hv", "v1", "pods", value=_placed(podspec.build_pod(options))).json()
            except Conflict:
                if self._options.name or attempt == NAME_ATTEMPTS - 1:
                    raise
                continue
            except InvalidInput as e:
                message = podspec.in_terms_of_flags(str(e))
                if message is None:
                    raise
                raise click.UsageError(message) from e
            self._options = options
            return dict(created)
        raise AssertionError("unreachable")

    # ---- in the foreground -------------------------------------------------------------------------------------------

    def _foreground(self, pod: dict[str, Any]) -> int:
        container = podspec.container_name(self._options.name)
        namespace, name = _key(pod)
        # The watch stays open until the streams are joined: hostd keeps the VM of a pod that is over for its readers.
        with follow.fresh(self._settings.state) as watch:
            pod = follow.wait_started(watch, namespace, name, container)
            self._clock.lap("start")
            outcome = self._join(pod, container, watch.close)
        self._clock.lap("run")
        if outcome.detached:
            note(f"left {name} running; hv attach {name} goes back to it")
            return 0
        code = outcome.exit_code
        if code is None:
            raise VmFailed(f"pod {name}: {outcome.message}")
        if self._timing or code in NEVER_RAN:
            pod = self._read(pod)
        self._explain_start_error(pod, container)
        if self._remove:
            self._delete(pod, grace=0)
            self._clock.lap("remove")
        self._report(pod)
        return code

    def _explain_start_error(self, pod: dict[str, Any], container: str) -> None:
        """A process that never ran could not say why its exit code is 127."""
        ended = pods.state(pods.container_status(pod, container), "terminated") or {}
        if ended.get("reason") == "StartError" and ended.get("message"):
            note(str(ended["message"]))

    def _join(self, pod: dict[str, Any], container: str, joined: Callable[[], None]) -> session.Outcome:
        options = self._options
        try:
            return follow.join(
                self._settings.state,
                pod,
                container,
                stdin=options.stdin,
                tty=options.tty,
                replay=True,
                on_signal=self._stop_on_signal,
                joined=joined,
            )
        except HvError as e:
            return self._after_the_end(pod, container, e)

    def _after_the_end(self, pod: dict[str, Any], container: str, error: HvError) -> session.Outcome:
        """The container's VM is off already, which hostd's patience makes rare: its log and status tell the rest."""
        code = follow.exit_code_of(self._read(pod), container)
        if code is None or not follow.is_over(error):
            raise error
        follow.print_log(self._settings.state, pod, container)
        return session.Outcome(code)

    def _read(self, pod: dict[str, Any]) -> dict[str, Any]:
        with follow.fresh(self._settings.state) as connection:
            return dict(connection.get("hv", "v1", "pods", *_key(pod)))

    # ---- the end -----------------------------------------------------------------------------------------------------

    def _stop_on_signal(self, signum: int) -> None:
        """The first signal stops the pod, the second kills it; the session goes on until the container has ended."""
        self._signals += 1
        if self._signals > 2 or signum == signal.SIGQUIT:
            raise Interrupted(signum)
        if self._signals == 1 and signum == signal.SIGINT:
            note("stopping the pod; Ctrl-C again kills it")
        grace = () if self._signals == 1 else (("gracePeriodSeconds", "0"),)
        # A thread, since output goes on meanwhile. A daemon one: hv must not wait for it once the container has ended.
        threading.Thread(target=self._stop, args=(grace,), daemon=True).start()

    def _stop(self, query: tuple[tuple[str, str], ...]) -> None:
        try:
            with follow.fresh(self._settings.state) as connection:
                connection.set_timeout(None)
                where = ("hv", "v1", "pods", route.namespace(), self._options.name, "stop")
                connection.post(*where, query=query).read()
        except HvError as e:
            note(f"cannot stop the pod: {e}")

    @contextmanager
    def _on_failure(self, pod: dict[str, Any]) -> Iterator[None]:
        """With ``--rm`` nothing is left whatever happens; else an interrupted pod is stopped and a failed one kept."""
        try:
            yield
        except BaseException as e:
            try:
                if self._remove:
                    self._delete(pod, grace=0)
                elif isinstance(e, (KeyboardInterrupt, Interrupted)):
                    self._stop((("gracePeriodSeconds", "0"),))
            except HvError as second:
                note(f"cannot remove the pod: {second}")
            raise

    def _delete(self, pod: dict[str, Any], *, grace: int) -> None:
        with follow.fresh(self._settings.state) as connection:
            connection.set_timeout(None)
            query = [("gracePeriodSeconds", str(grace)), ("wait", "1")]
            answer = connection.request("DELETE", target(("hv", "v1", "pods", *_key(pod)), query))
            answer.read()

    def _report(self, pod: dict[str, Any]) -> None:
        if not self._timing:
            return
        annotations = (pod.get("metadata") or {}).get("annotations") or {}
        try:
            host = json.loads(annotations.get(TIMING_ANNOTATION) or "{}")
        except ValueError:
            host = {}
        print(json.dumps({"pod": pods.name_of(pod), "hv": self._clock.total(), "host": host}), file=sys.stderr)  # noqa: T201


def _placed(manifest: dict[str, Any]) -> dict[str, Any]:
    """In the namespace that ``hv -n`` names."""
    where = route.namespace()
    if where == "default":
        return manifest
    return {**manifest, "metadata": {**manifest["metadata"], "namespace": where}}


def _key(pod: dict[str, Any]) -> tuple[str, str]:
    metadata = pod["metadata"]
    return metadata.get("namespace") or "default", metadata["name"]
