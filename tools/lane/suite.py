"""Debian suites that L1's packages are taken from: the machine's own, or with a newer QEMU from backports."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from builder.errors import BuildError
from builder.run import output_of

_RELEASE = "bookworm"
_KEY = "/usr/share/keyrings/debian-archive-keyring.gpg"
#: what is taken from backports; all else stays the stable release's
_NEWER = "src:qemu src:seabios src:ipxe"
#: what L1's QEMU may come from
QEMUS = ("stable", "backports")


@dataclass(frozen=True)
class Suite:
    """Where packages come from.

    :param name: of `QEMUS`
    :param options: for apt-get
    :param cache: package files
    """

    name: str
    options: tuple[str, ...]
    cache: Path


def suite(name: str, folder: Path) -> Suite:
    """The suite `name`; backports' lists are fetched now, into `folder`.

    :raises BuildError: its lists cannot be had
    """
    if name == "stable":
        return Suite(name, (), folder / "debs")
    state = folder / "apt-backports"
    for part in ("lists/partial", "cache/archives/partial", "none"):
        (state / part).mkdir(parents=True, exist_ok=True)
    sources = _sources()
    sources.append((next(uri for uri, release in sources if release == _RELEASE), f"{_RELEASE}-backports"))
    rows = [f"deb [signed-by={_KEY}] {uri} {release} main\n" for uri, release in sources]
    (state / "sources.list").write_text("".join(rows))
    (state / "preferences").write_text(f"Package: {_NEWER}\nPin: release n={_RELEASE}-backports\nPin-Priority: 900\n")
    own = {
        "Dir::Etc::sourcelist": state / "sources.list",
        "Dir::Etc::sourceparts": state / "none",
        "Dir::Etc::preferences": state / "preferences",
        "Dir::Etc::preferencesparts": state / "none",
        "Dir::State::lists": state / "lists",
        "Dir::State::status": "/dev/null",  # what this machine has installed plays no part
        "Dir::Cache": state / "cache",
        "APT::Sandbox::User": "root",
    }
    made = Suite(
        name, tuple(w for key, value in own.items() for w in ("-o", f"{key}={value}")), folder / "debs-backports"
    )
    output_of(["apt-get", "-q", *made.options, "update"])
    for remembered in made.cache.glob("resolved-*.json"):
        remembered.unlink()  # of older lists, perhaps
    return made


def _sources() -> list[tuple[str, str]]:
    """Where this machine gets the stable release, its updates and its security fixes from: addresses and suites."""
    argv = ["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE)", "Created-By: Packages"]
    rows = {(uri, release) for uri, _, release in (line.partition(" ") for line in output_of(argv).splitlines())}
    if not any(release == _RELEASE for _, release in rows):
        raise BuildError(f"apt has no lists of {_RELEASE}; run `apt-get update` as root")
    return sorted(row for row in rows if row[1] in (_RELEASE, f"{_RELEASE}-updates", f"{_RELEASE}-security"))
