"""What a container is to be: the checked form of ``container.start``'s arguments (docs/wire-protocol.md)."""

from __future__ import annotations

import binascii
import signal
from typing import Any, NamedTuple

from .caps import check_caps
from .errors import invalid
from .fields import Fields, check_command

MAX_NAME = 63
MAX_FILES_BYTES = 3 * 1024 * 1024
SECCOMP_DEFAULT = "runtime/default"
SECCOMP_NONE = "unconfined"


class User(NamedTuple):
    """Numbers that a process runs as."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()
    home: str | None = None


class NamedUser(NamedTuple):
    """A text that the image's /etc/passwd resolves, and groups beside those that it has there."""

    name: str
    groups: tuple[int, ...]


class Resources(NamedTuple):
    """Limits; None is no limit. `cpu_quota_us` is microseconds of CPU time in each 100 ms."""

    memory_bytes: int | None = None
    cpu_quota_us: int | None = None
    cpu_shares: int | None = None
    pids: int | None = None


class VolumeMount(NamedTuple):
    """A volume of the pod at `path` in the container."""

    volume: str
    path: str
    read_only: bool
    sub_path: str


class File(NamedTuple):
    """A read-only file that the host puts at `path` in the container."""

    path: str
    mode: int
    content: bytes


class Message(NamedTuple):
    """Where a container may leave word of why it ended, and how much of it is told.

    :ivar from_logs: when it failed and left nothing, the end of its log is told
    """

    path: str
    max_bytes: int
    from_logs: bool


class ContainerSpec(NamedTuple):
    """A whole container; every field has been checked by `parse_spec`."""

    name: str
    image_disk: str
    argv: list[str]
    env: list[str]
    cwd: str
    user: User | NamedUser | str
    hostname: str | None
    tty: bool
    stdin: bool
    stdin_once: bool
    read_only_root: bool
    privileged: bool
    cap_add: tuple[str, ...]
    cap_drop: tuple[str, ...]
    no_new_privileges: bool
    seccomp: str
    mounts: list[VolumeMount]
    files: list[File]
    resources: Resources
    stop_signal: int
    log_max_bytes: int
    log_files: int
    oom_score_adj: int
    message: Message | None
    disk_bytes: int | None


def parse_spec(args: object) -> ContainerSpec:
    """The checked arguments of ``container.start``.

    :raises AgentError: Invalid; the message names the field
    """
    fields = Fields(args, "container")
    spec = ContainerSpec(
        name=parse_name(fields),
        image_disk=_image_disk(fields),
        argv=fields.texts("argv"),
        env=parse_env(fields),
        cwd=fields.path_text("cwd", "/"),
        user=parse_user(fields, User(0, 0)),
        hostname=fields.text("hostname", None, limit=64),
        tty=fields.flag("tty"),
        stdin=fields.flag("stdin"),
        stdin_once=fields.flag("stdin_once"),
        read_only_root=fields.flag("read_only_root"),
        privileged=fields.flag("privileged"),
        **_capabilities(fields.object("capabilities")),
        no_new_privileges=fields.flag("no_new_privileges"),
        seccomp=fields.choice("seccomp", (SECCOMP_DEFAULT, SECCOMP_NONE), SECCOMP_DEFAULT),
        mounts=[_mount(f) for f in fields.objects("mounts")],
        files=_files(fields),
        resources=parse_resources(fields.object("resources")),
        stop_signal=_signal(fields),
        log_max_bytes=fields.integer("log_max_bytes", 10 * 1024 * 1024, low=4096),
        log_files=fields.integer("log_files", 2, low=1, high=100),
        oom_score_adj=fields.integer("oom_score_adj", 0, low=-1000, high=1000),
        message=_message(fields),
        disk_bytes=fields.integer("disk_bytes", None, low=1),
    )
    fields.done()
    check_command(spec.argv, spec.env, "container")
    return spec


def parse_name(fields: Fields, field: str = "name") -> str:
    """A container's or volume's name: an RFC 1123 label, so that it is safe as a file name."""
    name: str = fields.text(field)
    allowed = "abcdefghijklmnopqrstuvwxyz0123456789-"
    if not 0 < len(name) <= MAX_NAME or name.strip(allowed) or name[0] == "-" or name[-1] == "-":
        raise invalid(
            f"{fields.path(field)}: must be 1 to {MAX_NAME} lower-case letters, digits, inner dashes; not {name[:80]!r}"
        )
    return name


def parse_env(fields: Fields) -> list[str]:
    """``env`` as a list of NAME=VALUE."""
    env: list[str] = fields.texts("env", [])
    for i, variable in enumerate(env):
        if variable.find("=") < 1:
            raise invalid(f"{fields.path('env')}[{i}]: must be NAME=VALUE, not {variable[:80]!r}")
    return env


def parse_user(fields: Fields, default: Any) -> Any:
    """``user``: numbers, a text that the image's /etc/passwd resolves, or such a text and further groups."""
    value = fields.take("user", object, "an object or a text", default)
    if value is default or isinstance(value, str):
        return value
    user = Fields(value, fields.path("user"))
    name = user.text("name", None)
    uid, gid = 0, 0
    if name is None:
        uid, gid = user.integer("uid", high=2**32 - 2), user.integer("gid", 0, high=2**32 - 2)
    groups = user.take("groups", list, "a list of numbers", [])
    user.done()
    if len(groups) > 1000 or not all(isinstance(g, int) and 0 <= g < 2**32 - 1 for g in groups):
        raise invalid(f"{user.path('groups')}: must be at most 1000 group numbers")
    return User(uid, gid, tuple(groups)) if name is None else NamedUser(name, tuple(groups))


def parse_resources(fields: Fields) -> Resources:
    """Limits; an absent one is no limit."""
    resources = Resources(
        memory_bytes=fields.integer("memory_bytes", None, low=1024 * 1024),
        cpu_quota_us=fields.integer("cpu_quota_us_per_100ms", None, low=1000),
        cpu_shares=fields.integer("cpu_shares", None, low=2, high=262144),
        pids=fields.integer("pids", None, low=1),
    )
    fields.done()
    return resources


def _message(fields: Fields) -> Message | None:
    value = fields.take("message", dict, "an object or null", None)
    if value is None:
        return None
    inner = Fields(value, fields.path("message"))
    message = Message(
        path=inner.path_text("path"),
        max_bytes=inner.integer("max_bytes", 4096, low=1, high=4096),
        from_logs=inner.flag("from_logs"),
    )
    inner.done()
    return message


def _image_disk(fields: Fields) -> str:
    serial: str = fields.text("image_disk", limit=20)
    if not serial or serial.strip("abcdefghijklmnopqrstuvwxyz0123456789-"):
        raise invalid(f"{fields.path('image_disk')}: must be a disk's serial such as img-0123456789ab, not {serial!r}")
    return serial


def _capabilities(fields: Fields) -> dict[str, Any]:
    found = {}
    for name in ("add", "drop"):
        found[f"cap_{name}"] = check_caps(fields.texts(name, []), fields.path(name))
    fields.done()
    return found


def _mount(fields: Fields) -> VolumeMount:
    mount = VolumeMount(
        volume=parse_name(fields, "volume"),
        path=fields.path_text("path"),
        read_only=fields.flag("read_only"),
        sub_path=fields.text("sub_path", "", limit=4095),
    )
    fields.done()
    if mount.sub_path.startswith("/") or ".." in mount.sub_path.split("/"):
        raise invalid(f"{fields.path('sub_path')}: must be a relative path without .., not {mount.sub_path!r}")
    return mount


def _files(fields: Fields) -> list[File]:
    files = [_file(f) for f in fields.objects("files")]
    if sum(len(f.content) for f in files) > MAX_FILES_BYTES:
        raise invalid(f"{fields.path('files')}: more than {MAX_FILES_BYTES} bytes in all")
    return files


def _file(fields: Fields) -> File:
    path = fields.path_text("path")
    mode = fields.integer("mode", 0o644, high=0o777)
    try:
        content = binascii.a2b_base64(fields.text("content_b64", "", limit=MAX_FILES_BYTES * 2), strict_mode=True)
    except ValueError as e:
        raise invalid(f"{fields.path('content_b64')}: is not base64: {e}") from e
    fields.done()
    return File(path, mode, content)


def _signal(fields: Fields) -> int:
    """``stop_signal``: SIGTERM, TERM, a number, SIGRTMIN+3."""
    text: str = fields.text("stop_signal", "SIGTERM", limit=16)
    name, plus, offset = text.upper().partition("+")
    name = name if name.startswith("SIG") else f"SIG{name}"
    if text.isdigit():
        number = int(text)
    elif name in signal.Signals.__members__ and (not plus or offset.isdigit()):
        number = signal.Signals[name].value + int(offset or 0)
    else:
        number = 0
    if not 0 < number <= 64:
        raise invalid(f"{fields.path('stop_signal')}: must be a signal such as SIGTERM or 15, not {text!r}")
    return number
