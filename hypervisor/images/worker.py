"""The process that does the heavy work of one job: ``python -m hypervisor.images.worker``.

It is a process of its own so that a hostile archive meets neither the daemon's memory nor its event loop, and so that
cancelling is killing. One JSON job on stdin; on stdout one JSON object a line: ``{"progress": ...}`` any number of
times, then ``{"done": true}`` or ``{"error": {"kind", "message"}}``.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import signal
import sys
from pathlib import Path
from typing import Any

from hypervisor.errors import HvError
from hypervisor.images.blobs import Blob
from hypervisor.images.build import BuildJob, ExpandJob, Layer, run
from hypervisor.images.model import Limits, ProgressEvent

_PR_SET_PDEATHSIG = 1


def encode(job: BuildJob | ExpandJob) -> bytes:
    """A job for the worker's stdin."""
    value = {"kind": type(job).__name__, **dataclasses.asdict(job)}
    return json.dumps(value, default=str).encode()


def decode(data: bytes) -> BuildJob | ExpandJob:
    """The job that :func:`encode` made."""
    value = json.loads(data)
    output, limits = Path(value["output"]), Limits(**value["limits"])
    if value["kind"] == ExpandJob.__name__:
        return ExpandJob(_blob(value["blob"]), output, limits)
    layers = tuple(Layer(_blob(layer["blob"]), layer["diff_id"]) for layer in value["layers"])
    return BuildJob(value["image_id"], layers, output, limits)


def _blob(value: dict[str, Any]) -> Blob:
    return Blob(Path(value["path"]), value["offset"], value["size"], value["digest"])


def _say(**message: Any) -> None:
    print(json.dumps(message), flush=True)  # noqa: T201


def _say_progress(event: ProgressEvent) -> None:
    _say(progress=dataclasses.asdict(event))


def _die_with_parent() -> None:
    """Whoever started this wants no result any more once it is dead; what lies half-built is swept by the next one."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> int:
    """Do the job on stdin."""
    _die_with_parent()
    try:
        run(decode(sys.stdin.buffer.read()), _say_progress)
        _say(done=True)
    except HvError as error:
        _say(error={"kind": type(error).__name__, "message": str(error)})
        return 1
    except MemoryError:
        _say(error={"kind": "ResourceExhausted", "message": "not enough memory to build the image"})
        return 1
    except Exception as error:  # a defect: tell it to the daemon's log instead of a lost stderr
        _say(error={"kind": "HvError", "message": f"building the image failed: {type(error).__name__}: {error}"})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
