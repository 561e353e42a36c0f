"""Arguments: every bad one is refused with a message that names it; good ones become config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypervisor.agent import seccomp, setup
from hypervisor.agent.bundle import Bind, Context, config, environment
from hypervisor.agent.caps import DEFAULT, NAMES, effective, mask
from hypervisor.agent.errors import AgentError
from hypervisor.agent.seccomp import Filter, Profiles
from hypervisor.agent.spec import NamedUser, User, parse_spec
from hypervisor.agent.users import resolve

GOLDEN = Path(__file__).parent / "golden"
PLAIN: dict[str, Any] = {"name": "main", "image_disk": "img-0123456789ab", "argv": ["sh"]}
FULL: dict[str, Any] = PLAIN | {
    "argv": ["server", "--port", "80"],
    "env": ["A=1", "A=2", "PATH=/bin"],
    "cwd": "/srv",
    "user": "web",
    "tty": True,
    "stdin": True,
    "stdin_once": True,
    "read_only_root": True,
    "capabilities": {"add": ["NET_ADMIN"], "drop": ["ALL"]},
    "no_new_privileges": True,
    "mounts": [{"volume": "cache", "path": "/srv/cache", "read_only": True, "sub_path": "a/b"}],
    "files": [{"path": "/etc/conf", "mode": 256, "content_b64": "eA=="}],
    "resources": {"memory_bytes": 1 << 26, "cpu_quota_us_per_100ms": 50_000, "cpu_shares": 512, "pids": 10},
    "stop_signal": "SIGUSR1",
    "oom_score_adj": 500,
}
PASSWD = "root:x:0:0:root:/root:/bin/sh\nweb:x:33:34:web:/srv:/bin/false\nbroken:x:a:b:::\n"
GROUP = "root:x:0:\nweb:x:34:\nssl:x:40:other,web\nlogs:x:41:web\n"


def test_a_missing_optional_field_has_its_default() -> None:
    spec = parse_spec(PLAIN)
    assert (spec.cwd, spec.user, spec.seccomp, spec.stop_signal) == ("/", User(0, 0), "runtime/default", 15)
    assert (spec.log_max_bytes, spec.log_files, spec.resources.pids) == (10485760, 2, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": None}, "container.name: missing"),
        ({"name": "../up"}, "container.name: must be 1 to 63"),
        ({"image_disk": "/dev/sda"}, "container.image_disk: must be a disk's serial"),
        ({"argv": []}, "container.argv: must name a program"),
        ({"argv": ["a\0b"]}, r"container.argv\[0\]: must not contain a NUL"),
        ({"argv": "sh"}, "container.argv: must be a list"),
        ({"argv": ["x" * (1 << 20)]}, "Linux takes at most 131072 for one"),
        ({"argv": ["x" * 100_000] * 30}, "Linux takes at most 2097152"),
        ({"env": ["novalue"]}, r"container.env\[0\]: must be NAME=VALUE"),
        ({"cwd": "srv"}, "container.cwd: must be an absolute path"),
        ({"tty": "yes"}, "container.tty: must be true or false"),
        ({"log_files": True}, "container.log_files: must be a whole number"),
        ({"log_files": 0}, "container.log_files: must be a whole number from 1 to 100"),
        ({"seccomp": "none"}, "container.seccomp: must be one of runtime/default, unconfined"),
        ({"capabilities": {"add": ["FLY"]}}, "container.capabilities.add: 'FLY' is no Linux capability"),
        ({"mounts": [{"volume": "v", "path": "/v", "sub_path": "../x"}]}, "sub_path: must be a relative path without"),
        ({"files": [{"path": "/f", "content_b64": "%"}]}, r"files\[0\].content_b64: is not base64"),
        ({"resources": {"memory_bytes": 5}}, "container.resources.memory_bytes: must be a whole number from 1048576"),
        ({"resources": {"memory": 5}}, "container.resources: unknown field 'memory'"),
        ({"stop_signal": "SIGNOPE"}, "container.stop_signal: must be a signal"),
        ({"user": {"uid": -1}}, "container.user.uid: must be a whole number"),
        ({"user": {"uid": 1, "groups": ["x"]}}, "container.user.groups"),
        ({"user": {"name": "web", "uid": 1}}, "container.user: unknown field 'uid'"),
        ({"disk_bytes": 0}, "container.disk_bytes: must be a whole number"),
        ({"colour": "red"}, "container: unknown field 'colour'"),
    ],
)
def test_bad_fields_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(AgentError, match=message) as caught:
        parse_spec(PLAIN | change)
    assert caught.value.reason == "Invalid"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(sorted(FULL)) | st.text(max_size=8), json_values, max_size=12))
def test_any_json_is_a_spec_or_an_agent_error(args: dict[str, Any]) -> None:
    try:
        parse_spec(PLAIN | args)
    except AgentError as e:
        assert e.reason == "Invalid"


@given(json_values)
def test_any_json_is_settings_or_an_agent_error(value: Any) -> None:
    try:
        setup.parse(value)
    except AgentError as e:
        assert e.reason == "Invalid"


@pytest.mark.parametrize(("text", "number"), [("SIGTERM", 15), ("term", 15), ("9", 9), ("SIGRTMIN+3", 37)])
def test_stop_signals(text: str, number: int) -> None:
    assert parse_spec(PLAIN | {"stop_signal": text}).stop_signal == number


@pytest.mark.parametrize("name", ["plain", "full", "privileged"])
def test_config_json_is_as_it_was(name: str) -> None:
    spec = parse_spec({"plain": PLAIN, "full": FULL, "privileged": PLAIN | {"privileged": True}}[name])
    user = resolve(spec.user, PASSWD, GROUP)
    binds = [Bind("/data/x", "/deep/er/path", False), Bind("/data/y", "/deep", True)]
    profile = Filter({"defaultAction": "SCMP_ACT_ERRNO"}, "AAAA") if name == "full" else None
    made = config(spec, Context("/root/fs", f"/podvisor/{name}", user, binds, profile, None))
    golden = GOLDEN / f"{name}.json"
    if not golden.exists():  # delete a file to make it anew
        golden.write_text(json.dumps(made, indent=1) + "\n")
    assert made == json.loads(golden.read_text())


def test_outer_mounts_come_before_inner_ones() -> None:
    binds = [Bind("/1", "/a/b/c", False), Bind("/2", "/a", False), Bind("/3", "/a/b", False)]
    made = config(parse_spec(PLAIN), Context("/r", "/c", User(0, 0), binds, None))
    assert [m["destination"] for m in made["mounts"] if m["type"] == "bind"] == ["/a", "/a/b", "/a/b/c"]


def test_environment() -> None:
    user = User(0, 0, (), "/home/me")
    assert environment(["A=1", "A=2"], user, True) == [
        "A=2",
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME=/home/me",
        "TERM=xterm",
    ]
    assert environment(["HOME=/x", "PATH=/y"], user, False) == ["HOME=/x", "PATH=/y"]


# ---- users -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "user"),
    [
        ("web", User(33, 34, (40, 41), "/srv")),
        ("33", User(33, 34, (40, 41), "/srv")),
        ("web:ssl", User(33, 40, (), "/srv")),
        ("web:7", User(33, 7, (), "/srv")),
        ("1234", User(1234, 0, (), None)),
        ("1234:ssl", User(1234, 40, (), None)),
        ("", User(0, 0, (), "/root")),
        (User(33, 1, (2,)), User(33, 1, (2,), "/srv")),
        (NamedUser("web", (7, 41)), User(33, 34, (7, 40, 41), "/srv")),
        (NamedUser("1234:5", (7,)), User(1234, 5, (7,), None)),
    ],
)
def test_users(wanted: User | NamedUser | str, user: User) -> None:
    assert resolve(wanted, PASSWD, GROUP) == user


@pytest.mark.parametrize("wanted", ["nobody", "web:nogroup", "broken", "99999999999", "0:4294967295"])
def test_unknown_users_are_refused(wanted: str) -> None:
    with pytest.raises(AgentError):
        resolve(wanted, PASSWD, GROUP)


@given(st.text(max_size=20), st.text(max_size=200), st.text(max_size=200))
def test_hostile_databases(wanted: str, passwd: str, group: str) -> None:
    try:
        user = resolve(wanted, passwd, group)
    except AgentError:
        return
    assert 0 <= user.uid < 2**32 - 1 and 0 <= user.gid < 2**32 - 1


# ---- capabilities and seccomp ----------------------------------------------------------------------------------------


def test_capabilities() -> None:
    assert set(effective((), (), False)) == DEFAULT
    assert effective(("CAP_NET_ADMIN",), ("ALL",), False) == ["CAP_NET_ADMIN"]
    assert set(effective(("ALL",), ("CAP_KILL",), False)) == set(NAMES) - {"CAP_KILL"}
    assert len(effective((), ("ALL",), True)) == len(NAMES) == 41
    assert mask(["CAP_CHOWN", "CAP_CHECKPOINT_RESTORE"]) == 1 | 1 << 40


def test_rules_that_depend_on_capabilities() -> None:
    profile = {
        "defaultAction": "SCMP_ACT_ERRNO",
        "archMap": [{"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"]}],
        "syscalls": [
            {"names": ["read"], "action": "SCMP_ACT_ALLOW"},
            {"names": ["bpf"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_BPF"]}},
            {"names": ["bpf"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1, "excludes": {"caps": ["CAP_BPF"]}},
        ],
    }
    without, having = seccomp.resolve(profile, []), seccomp.resolve(profile, ["CAP_BPF"])
    assert [r["action"] for r in without["syscalls"]] == ["SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO"]
    assert [r["action"] for r in having["syscalls"]] == ["SCMP_ACT_ALLOW", "SCMP_ACT_ALLOW"]
    assert without["architectures"] == ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"]


def test_compiled_filters_are_used_again(tmp_path: Path) -> None:
    profile = {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW"}]}
    (tmp_path / "seccomp.json").write_text(json.dumps(profile))
    (tmp_path / "seccomp-1.bpf").write_bytes(bytes(16))
    (tmp_path / "compiled").write_bytes(bytes(8))
    (tmp_path / "torn").write_bytes(bytes(9))
    profiles = Profiles(str(tmp_path / "seccomp.json"))
    assert profiles.get(["CAP_CHOWN"]) == Filter({"defaultAction": "SCMP_ACT_ERRNO"}, "AAAAAAAAAAAAAAAAAAAAAA==")
    assert profiles.get([]).profile["syscalls"] == profile["syscalls"]
    for name in ("none", "torn"):
        profiles.learn([], str(tmp_path / name))
        assert profiles.get([]).compiled is None
    profiles.learn([], str(tmp_path / "compiled"))
    assert profiles.get([]) == Filter({"defaultAction": "SCMP_ACT_ERRNO"}, "AAAAAAAAAAA=")
