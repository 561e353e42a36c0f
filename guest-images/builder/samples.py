"""The sample images `busybox`, `python` and `web`: made from Debian packages, so that no pod needs a registry.

All three share busybox as their first layer; `python` and `web` put one more on top.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from builder import debs, oci, packages, pyroot, stamp, tree
from builder.run import output_of, say

NAMES = ("busybox", "python", "web")
PORT = 8080

_PATH = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
_DIRECTORIES = ("dev", "etc", "home", "mnt", "proc", "root", "run", "srv", "sys", "tmp", "usr/local/bin", "var/tmp")
_MODES = {"tmp": 0o1777, "var/tmp": 0o1777, "root": 0o700}
_TEXTS = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\n"
    "daemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin\n"
    "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
    "etc/group": "root:x:0:\ndaemon:x:1:\ntty:x:5:\nusers:x:100:\nnogroup:x:65534:\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
}
# Parts of Python's library that belong to no program in a container, or that need a library the image lacks.
_LEFT_OUT = ("curses", "ensurepip", "idlelib", "lib2to3", "test", "tkinter", "turtledemo", "pydoc_data")
_INDEX = """<!doctype html>
<title>podvisor</title>
<h1>It works</h1>
<p>This page comes from busybox httpd in a container, in a pod VM of its own.</p>
"""

Unpacked = Mapping[str, Path]


def build_samples(out: Path, cache: Path, *, force: bool = False) -> bool:
    """Brings the three archives in `out` up to date; whether anything had to be built.

    :raises BuildError: on failure `out` is as it was
    """
    out, cache = out.resolve(), cache.resolve()
    chosen = debs.resolve([*packages.BUSYBOX_PACKAGES, *packages.PYTHON_PACKAGES], cache)
    inputs = stamp.digest({name: deb.sha256 for name, deb in chosen.items()}, {})
    files = [f"{name}.tar" for name in NAMES]
    if not force and stamp.is_current(out, inputs) and all((out / name).is_file() for name in files):
        say(f"{out.name} are up to date")
        return False
    debs.fetch(chosen.values(), cache)
    unpacked = {name: debs.unpack(deb, cache) for name, deb in chosen.items()}
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=out) as scratch:
        finished = Path(scratch) / "finished"
        finished.mkdir()
        _write_all(unpacked, Path(scratch), finished)
        stamp.replace(finished, out, files, inputs)
    say(f"{out.name} are ready: " + ", ".join(f"{n} {(out / n).stat().st_size / 1e6:.1f} MB" for n in files))
    return True


def _write_all(unpacked: Unpacked, scratch: Path, finished: Path) -> None:
    base = _layer(_busybox_tree, unpacked, scratch / "busybox", "busybox-static with its applets", modes=_MODES)
    python = _layer(_python_tree, unpacked, scratch / "python", "python3.11 with its standard library")
    web = _layer(_web_tree, unpacked, scratch / "web", "a page for busybox httpd")

    def write(name: str, layers: list[oci.Layer], config: oci.ImageConfig) -> None:
        oci.write_archive(finished / f"{name}.tar", f"podvisor/{name}:latest", layers, config)

    write("busybox", [base], oci.ImageConfig(cmd=["sh"], env=_PATH, labels=_labels("a shell and its tools")))
    write(
        "python",
        [base, python],
        oci.ImageConfig(
            cmd=["python3"],
            env={**_PATH, "LANG": "C.UTF-8", "PYTHONUNBUFFERED": "1"},
            labels=_labels("Python with its standard library"),
        ),
    )
    write(
        "web",
        [base, web],
        oci.ImageConfig(
            entrypoint=["busybox", "httpd"],
            cmd=["-f", "-v", "-p", str(PORT), "-h", "/srv/www"],
            env=_PATH,
            user="nobody",
            workdir="/srv/www",
            exposed_ports=[f"{PORT}/tcp"],
            stop_signal="SIGTERM",
            labels=_labels("a small web server"),
        ),
    )


def _layer(
    fill: Callable[[Unpacked, Path], None],
    unpacked: Unpacked,
    folder: Path,
    comment: str,
    *,
    modes: Mapping[str, int] | None = None,
) -> oci.Layer:
    folder.mkdir()
    fill(unpacked, folder)
    return oci.make_layer(folder, comment, modes=modes)


def _labels(description: str) -> dict[str, str]:
    return {"org.opencontainers.image.description": description, "org.opencontainers.image.vendor": "podvisor"}


def _busybox_tree(unpacked: Unpacked, root: Path) -> None:
    tree.lay_out(root, _DIRECTORIES)
    for name, text in _TEXTS.items():
        (root / name).write_text(text)
    program = root / "usr/bin/busybox"
    tree.copy_file(unpacked["busybox-static"] / "bin/busybox", program)
    for applet in output_of([str(program), "--list"]).split():
        if applet != "busybox":
            (root / "usr/bin" / applet).symlink_to("busybox")


def _python_tree(unpacked: Unpacked, root: Path) -> None:
    """Only what the busybox layer does not have: no /bin, /lib or /lib64, which are links there."""
    tree.copy_file(unpacked["python3.11-minimal"] / "usr/bin/python3.11", root / "usr/bin/python3.11")
    for link in ("python3", "python"):
        (root / "usr/bin" / link).symlink_to("python3.11")
    library = root / pyroot.LIBRARY
    for name in ("libpython3.11-minimal", "libpython3.11-stdlib"):
        tree.merge(unpacked[name] / pyroot.LIBRARY, library)
    for name in _LEFT_OUT:
        tree.remove(library / name)
    # Debian's site module looks for packages there.
    (root / "usr/local/lib/python3.11/dist-packages").mkdir(parents=True)
    (root / "usr/lib/python3/dist-packages").mkdir(parents=True)
    libraries = [unpacked[name] for name in packages.PYTHON_PACKAGES]
    for extension in tree.without_libraries(library / "lib-dynload", libraries):
        extension.unlink()
    (root / "usr/lib64").mkdir()
    tree.install_libraries(root, libraries)
    pyroot.compile_in_place(pyroot.GuestPython(root), library)


def _web_tree(_: Unpacked, root: Path) -> None:
    page = root / "srv/www/index.html"
    page.parent.mkdir(parents=True)
    page.write_text(_INDEX)
