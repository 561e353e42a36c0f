"""Debian packages by name: resolved and downloaded by apt, unpacked by dpkg-deb, never installed.

Works as root and as an ordinary user: `apt-get download` needs no privilege.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from builder.errors import BuildError
from builder.run import output_of, say

# apt would drop root for the `_apt` user, who may not write into the cache, and warn about it.
_APT = ("apt-get", "-q", "-o", "APT::Sandbox::User=root")
_APT_STATE = (Path("/var/lib/apt/lists"), Path("/etc/apt/sources.list"), Path("/etc/apt/sources.list.d"))
_URI_LINE = re.compile(r"^'(?P<uri>[^']+)' (?P<file>\S+) (?P<size>\d+) SHA256:(?P<sha256>[0-9a-f]{64})$")


@dataclass(frozen=True)
class Deb:
    """One package file as apt's index knows it."""

    name: str
    version: str
    file: str
    sha256: str


def resolve(
    names: Iterable[str],
    cache: Path,
    *,
    expand: Mapping[str, Callable[[str], str]] | None = None,
    options: Sequence[str] = (),
) -> dict[str, Deb]:
    """The version that apt would install now, for each name.

    :param expand: names of metapackages, each with a function that gives the name to take instead
    :param options: for apt-get: where sources and lists lie that are not this machine's

    Remembered in `cache` for as long as apt's lists and sources are untouched, because apt takes a second to answer.

    :raises BuildError: a name is unknown to apt, or apt's lists were never fetched
    """
    wanted = sorted(set(names))
    key = hashlib.sha256(json.dumps([wanted, _apt_state(), list(options)]).encode()).hexdigest()
    memory = cache / f"resolved-{hashlib.sha256(' '.join(wanted).encode()).hexdigest()[:12]}.json"
    try:
        stored = json.loads(memory.read_text())
        if stored["key"] == key:
            return {name: Deb(**row) for name, row in stored["debs"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no memory, or not one of ours: ask apt
    debs = _ask_apt([expand[name](name) if expand and name in expand else name for name in wanted], options)
    cache.mkdir(parents=True, exist_ok=True)
    memory.write_text(json.dumps({"key": key, "debs": {n: vars(d) for n, d in debs.items()}}, indent=1))
    return debs


def kernel_package(metapackage: str) -> str:
    """The kernel package that `metapackage` depends on.

    :raises BuildError: apt knows neither
    """
    text = output_of(["apt-cache", "depends", "--no-recommends", "--no-suggests", metapackage])
    for line in text.splitlines():
        if (match := re.match(r"\s*Depends: (linux-image-\S+)$", line)) is not None:
            return match.group(1)
    raise BuildError(f"apt knows no kernel behind {metapackage}; run `apt-get update` as root and try again")


def fetch(debs: Iterable[Deb], cache: Path, *, options: Sequence[str] = ()) -> None:
    """Makes sure that each package file lies in `cache` with its right digest.

    :param options: as `resolve`'s
    :raises BuildError: a package cannot be fetched; what was fetched before stays cached
    """
    cache.mkdir(parents=True, exist_ok=True)
    missing = [deb for deb in debs if not _is_cached(deb, cache)]
    if not missing:
        return
    say(f"downloading {len(missing)} Debian packages")
    for deb in missing:  # a wrong file under that name would make apt-get download keep it
        (cache / deb.file).unlink(missing_ok=True)
    try:
        output_of([*_APT, *options, "download", *(f"{deb.name}={deb.version}" for deb in missing)], cwd=cache)
    except BuildError as e:
        raise BuildError(f"{e}\nfix: check the network, run `apt-get update` as root, and try again") from e
    for deb in missing:
        if not _is_cached(deb, cache):
            raise BuildError(f"{deb.file}: apt fetched other bytes than its index names; run `apt-get update` as root")


def fetch_source(name: str, version: str, folder: Path) -> Path:
    """Downloads a package's source into `folder`; its description (``.dsc``).

    It comes from the mirror that has the binary package, by lists of our own: this machine's name no sources, mostly.

    :raises BuildError: the mirror does not have that version's
    """
    uris = output_of([*_APT, "--print-uris", "download", f"{name}={version}"])
    match = re.search(r"^'([^']+)/pool/", uris, re.MULTILINE)
    if match is None:
        raise BuildError(f"apt knows no address of {name} {version}; run `apt-get update` as root")
    suites = ("-security",) if "security" in match[1] else ("", "-updates")
    state = folder / "apt"
    for name_of_folder in ("lists/partial", "cache/archives/partial"):
        (state / name_of_folder).mkdir(parents=True)
    key = "[signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]"
    rows = [f"deb-src {key} {match[1]} bookworm{suite} main\n" for suite in suites]
    (state / "sources.list").write_text("".join(rows))
    own = {
        "Dir::Etc::sourcelist": state / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "Dir::State::lists": state / "lists",
        "Dir::Cache": state / "cache",
    }
    apt = [*_APT, *(word for option, value in own.items() for word in ("-o", f"{option}={value}"))]
    output_of([*apt, "update"])
    output_of([*apt, "source", "--download-only", f"{name}={version}"], cwd=folder)
    found = sorted(folder.glob("*.dsc"))
    if len(found) != 1:
        raise BuildError(f"apt has fetched no source of {name} {version}")
    return found[0]


def unpack(deb: Deb, cache: Path) -> Path:
    """The folder with the package's files, unpacked once and kept in `cache`. Read-only by agreement: copy from it.

    :raises BuildError: the package file is broken
    """
    folder = cache / "unpacked" / f"{deb.name}-{deb.sha256[:16]}"
    if folder.is_dir():
        return folder
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    output_of(["dpkg-deb", "-x", str(cache / deb.file), str(partial)])
    for old in folder.parent.glob(f"{deb.name}-????????????????"):
        shutil.rmtree(old, ignore_errors=True)
    partial.rename(folder)
    return folder


def _ask_apt(wanted: list[str], options: Sequence[str]) -> dict[str, Deb]:
    try:
        text = output_of([*_APT, *options, "--print-uris", "download", *wanted])
    except BuildError as e:
        raise BuildError(f"{e}\nfix: run `apt-get update` as root; the image is made of Debian 12 packages") from e
    debs: dict[str, Deb] = {}
    for line in text.splitlines():
        if (match := _URI_LINE.match(line)) is not None:
            name, version, _ = match["file"].rsplit("_", 2)
            debs[name] = Deb(name, unquote(version), match["file"], match["sha256"])
    if lost := sorted(set(wanted) - set(debs)):
        raise BuildError(f"apt has no SHA256-listed file for {', '.join(lost)}; run `apt-get update` as root")
    return debs


def _apt_state() -> list[list[object]]:
    """What changes when apt's answers may: the folders and files of its lists and sources."""
    paths = [p for top in _APT_STATE for p in (top, *sorted(top.glob("*"))) if p.is_file() or p.is_dir()]
    return [[str(p), p.stat().st_mtime_ns] for p in paths if p.name not in ("lock", "partial")]


def _is_cached(deb: Deb, cache: Path) -> bool:
    path = cache / deb.file
    return path.is_file() and sha256_of(path) == deb.sha256


def sha256_of(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
