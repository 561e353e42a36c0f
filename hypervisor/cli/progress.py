"""Progress of a pull or an import: bars where standard error is a terminal, a line a phase where it is not."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

from hypervisor.cli.output import note, size
from hypervisor.cli.rest import Response, error_from
from hypervisor.errors import ProtocolError

Event = dict[str, Any]


class Lines:
    """For logs and pipes: a line when a phase begins."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._seen: set[str] = set()

    def __enter__(self) -> Callable[[Event], None]:
        return self._show

    def __exit__(self, *_exc: object) -> None:
        pass

    def _show(self, event: Event) -> None:
        phase = str(event.get("phase") or "")
        if phase in self._seen or phase == "done":
            return
        self._seen.add(phase)
        total = event.get("total")
        amount = f" ({size(total)})" if total and event.get("unit") == "bytes" else ""
        note(f"{self._what}: {phase}{amount} {event.get('detail') or ''}".rstrip())


class Bars:
    """For a terminal: a bar a phase, gone when it is over. rich is imported when the first event comes."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._progress: Any = None
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Callable[[Event], None]:
        return self._show

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def _start(self) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TimeElapsedColumn(),
        )
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._progress.start()
        return self._progress

    def _show(self, event: Event) -> None:
        phase = str(event.get("phase") or "")
        if phase == "done":
            return
        progress = self._progress or self._start()
        if phase not in self._tasks:
            self._tasks[phase] = progress.add_task(f"{self._what}: {phase}", total=None)
        progress.update(self._tasks[phase], completed=event.get("done") or 0, total=event.get("total"))


def reporter(what: str) -> AbstractContextManager[Callable[[Event], None]]:
    """A context manager that gives a function to call with each event."""
    return Bars(what) if sys.stderr.isatty() else Lines(what)


def follow(response: Response, what: str) -> dict[str, Any]:
    """Shows the progress in a pull's or import's answer, and gives its result (the last object).

    :raises HvError: what the answer ends with
    """
    with reporter(what) as show:
        for event in response.objects():
            if "progress" in event:
                show(event["progress"])
            elif "error" in event:
                raise _refused(event["error"])
            else:
                return event
    raise ProtocolError(f"hostd ended {what} without a result; its log (hv host status) says more")


def _refused(status: Any) -> Exception:
    import json

    code = status.get("code") if isinstance(status, dict) else None
    return error_from(int(code or 500), json.dumps(status).encode())
