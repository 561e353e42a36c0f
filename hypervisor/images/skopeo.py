"""Runs skopeo, which speaks to registries, and turns its last words into this package's errors."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Sequence
from pathlib import Path

from hypervisor.errors import HostUnfit, HvError, InvalidInput, NotFound, ResourceExhausted, Timeout, Unavailable
from hypervisor.images.work import child

# util-linux's setpriv: skopeo dies with whoever started it, also when that was killed.
_PREFIX = ("setpriv", "--pdeathsig", "KILL", "skopeo")
_POLICY_FILES = (Path("/etc/containers/policy.json"), Path("~/.config/containers/policy.json"))
_MESSAGE_LIMIT = 300

_MEANINGS: tuple[tuple[str, type[HvError], str], ...] = (
    (r"manifest unknown|name unknown|repository name not known|NAME_UNKNOWN|404 \(?Not Found", NotFound,
     "the registry has no such image; check its name and tag"),
    (r"not logged into", NotFound, "no credentials are kept for it"),
    (r"invalid username/password", InvalidInput, "the registry refuses this user name and password"),
    (r"unauthorized|authentication required|access to the resource is denied|403 Forbidden", InvalidInput,
     "the registry refuses access: no such image, or it needs (other) credentials: hv image login"),
    (r"no space left on device|disk quota exceeded|file too large", ResourceExhausted,
     "no room for the download: free some space, or remove images that no pod uses (hv image prune)"),
    (r"x509|certificate", Unavailable,
     "the registry's TLS certificate is not trusted: install its CA's certificate in /etc/containers/certs.d/HOST"),
    (r"server gave HTTP response to HTTPS client", Unavailable,
     "the registry speaks plain HTTP, which is accepted from this machine's loopback addresses only"),
    (r"no such host|connection refused|connection reset|i/o timeout|timeout|network is unreachable|TLS handshake|EOF",
     Unavailable, "the registry cannot be reached; check its name and the network"),
)  # fmt: skip
_NOISE = re.compile(r'^Error parsing image name "[^"]*": ')


async def run(arguments: Sequence[str], *, what: str, timeout: float | None = None, stdin: bytes = b"") -> bytes:
    """Run skopeo to its end; what it printed. Cancelling kills it.

    :param what: what this is about, for errors: ``image busybox``
    :param timeout: seconds, or None
    :raises NotFound, InvalidInput, Unavailable, ResourceExhausted: as its message says
    :raises Timeout: it took too long
    :raises HostUnfit: it is not installed
    """
    argv = (*_PREFIX, *_policy_options(), *arguments)
    try:
        async with asyncio.timeout(timeout), child(*argv, env={**os.environ, "LC_ALL": "C"}) as process:
            output, complaint = await process.communicate(stdin)
    except TimeoutError as error:
        raise Timeout(f"{what}: the registry did not answer within {timeout:.0f} s") from error
    except FileNotFoundError as error:
        raise HostUnfit("setpriv is not installed: install the Debian package util-linux") from error
    if process.returncode == 0:
        return output
    raise explain(complaint.decode(errors="replace"), what=what, status=process.returncode)


def explain(complaint: str, *, what: str, status: int | None) -> HvError:
    """The error that skopeo's last line on stderr means."""
    lines = [line for line in complaint.splitlines() if line.strip()]
    last = lines[-1] if lines else f"exit status {status}"
    if status == 127 and "skopeo" in last:
        return HostUnfit("skopeo is not installed: install the Debian package skopeo")
    message = re.search(r'msg="((?:[^"\\]|\\.)*)"', last)
    text = message[1].replace('\\"', '"').replace("\\\\", "\\") if message else last
    text = _NOISE.sub("", text)
    for pattern, kind, meaning in _MEANINGS:
        if re.search(pattern, text, re.IGNORECASE):
            return kind(f"{what}: {meaning} ({_shortened(text)})")
    return Unavailable(f"{what}: skopeo failed: {_shortened(text)}")


def _policy_options() -> tuple[str, ...]:
    """Whoever wrote a signature policy has it obeyed; without any, skopeo would refuse to start."""
    return () if any(path.expanduser().exists() for path in _POLICY_FILES) else ("--insecure-policy",)


def _shortened(text: str) -> str:
    return text if len(text) <= _MESSAGE_LIMIT else f"{text[:100]} ... {text[-(_MESSAGE_LIMIT - 105) :]}"
