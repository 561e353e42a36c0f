"""What skopeo says, in this package's errors; and where credentials are looked for and kept."""

from __future__ import annotations

import asyncio
import base64
import json
import stat
from pathlib import Path

import pytest

from hypervisor.errors import HostUnfit, HvError, InvalidInput, NotFound, ResourceExhausted, Timeout, Unavailable
from hypervisor.images import Credentials, credentials, skopeo
from hypervisor.images.credentials import auth_options, default_auth_file, find_auth_file, login, tls_options
from hypervisor.images.reference import parse


def fatal(message: str) -> str:
    return f'time="2024-01-01T00:00:00Z" level=warning msg="x"\ntime="2024" level=fatal msg="{message}"\n'


@pytest.mark.parametrize(
    ("said", "kind", "meaning"),
    [
        (fatal("reading manifest 2 in x: manifest unknown: manifest unknown"), NotFound, "no such image"),
        (fatal("reading manifest: unauthorized: authentication required"), InvalidInput, "hv image login"),
        (fatal("requested access to the resource is denied"), InvalidInput, "hv image login"),
        (fatal("logging into \\\"x\\\": invalid username/password"), InvalidInput, "refuses this user name"),
        (fatal("not logged into x"), NotFound, "no credentials"),
        (fatal("write /var/x: no space left on device"), ResourceExhausted, "hv image prune"),
        (fatal("Get x: x509: certificate signed by unknown authority"), Unavailable, "certificate is not trusted"),
        (fatal("http: server gave HTTP response to HTTPS client"), Unavailable, "plain HTTP"),
        (fatal("dial tcp: lookup nowhere.invalid: no such host"), Unavailable, "cannot be reached"),
        (fatal("dial tcp 127.0.0.1:1: connect: connection refused"), Unavailable, "cannot be reached"),
        (fatal("something else altogether"), Unavailable, "skopeo failed: something else altogether"),
        ("plain words", Unavailable, "plain words"),
        ("", Unavailable, "exit status 1"),
        (fatal("long " * 200), Unavailable, r" \.\.\. "),
    ],
)  # fmt: skip
def test_skopeos_last_words(said: str, kind: type[HvError], meaning: str) -> None:
    error = skopeo.explain(said, what="image x", status=1)
    assert type(error) is kind
    with pytest.raises(HvError, match=rf"^image x: .*{meaning}"):
        raise error
    assert len(str(error)) < 600


def test_skopeos_quotes_and_preamble_go() -> None:
    said = fatal('Error parsing image name \\"docker://x\\": reading \\"y\\": manifest unknown')
    assert '(reading "y": manifest unknown)' in str(skopeo.explain(said, what="image x", status=1))


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program in skopeo's place; tests write what it does."""
    path = tmp_path / "skopeo"
    monkeypatch.setattr(skopeo, "_PREFIX", ("setpriv", "--pdeathsig", "KILL", str(path)))
    return path


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


async def test_output_stdin_and_arguments(fake: Path) -> None:
    script(fake, 'echo "$@"; cat')
    assert (await skopeo.run(["a", "b c"], what="x", stdin=b"input")).endswith(b"a b c\ninput")


async def test_missing_programs(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HostUnfit, match="install the Debian package skopeo"):
        await skopeo.run([], what="x")
    monkeypatch.setattr(skopeo, "_PREFIX", ("no-such-program",))
    with pytest.raises(HostUnfit, match="util-linux"):
        await skopeo.run([], what="x")


async def test_a_registry_that_never_answers(fake: Path) -> None:
    script(fake, "exec sleep 1000")
    with pytest.raises(Timeout, match="image x: the registry did not answer within 0 s"):
        await skopeo.run([], what="image x", timeout=0.2)


async def test_cancelling_kills_it(fake: Path, tmp_path: Path) -> None:
    script(fake, f"echo $$ > {tmp_path}/pid.new; mv {tmp_path}/pid.new {tmp_path}/pid; exec sleep 1000")
    task = asyncio.create_task(skopeo.run([], what="x"))
    process = await asyncio.to_thread(appears, tmp_path / "pid")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not await asyncio.to_thread(process.exists)


def appears(path: Path) -> Path:
    """The process whose id is written into a file."""
    while not path.exists():
        pass
    return Path("/proc") / path.read_text().strip()


def test_a_signature_policy_is_obeyed_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skopeo, "_POLICY_FILES", (tmp_path / "policy.json",))
    assert skopeo._policy_options() == ("--insecure-policy",)
    (tmp_path / "policy.json").write_text("{}")
    assert skopeo._policy_options() == ()


# ---- credentials -----------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("REGISTRY_AUTH_FILE", "DOCKER_CONFIG", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    return tmp_path


def write(path: Path, value: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def test_where_credentials_are_looked_for(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_auth_file("quay.io") is None
    docker = write(home / ".docker/config.json", {"auths": {"quay.io": {}, "https://index.docker.io/v1/": {}}})
    assert find_auth_file("quay.io") == find_auth_file("docker.io") == docker
    assert find_auth_file("other.io") is None
    configured = write(home / ".config/containers/auth.json", {"credHelpers": {"quay.io": "x"}})
    assert find_auth_file("quay.io") == configured
    runtime = write(home / "run/containers/auth.json", {"auths": {"quay.io": {}}})
    assert find_auth_file("quay.io") == runtime == default_auth_file()
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(home / "mine.json"))
    assert default_auth_file() == home / "mine.json"
    write(home / "mine.json", {"credsStore": "secretservice"})
    assert find_auth_file("anything.io") == home / "mine.json"


@pytest.mark.parametrize("content", ["{", "[]", '{"auths": null}'])
def test_auth_files_that_say_nothing(home: Path, content: str) -> None:
    path = write(home / ".docker/config.json", {})
    path.write_text(content)
    assert find_auth_file("quay.io") is None


def test_where_login_writes_without_a_runtime_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr(credentials.os, "geteuid", lambda: 0)
    assert default_auth_file() == Path("/run/containers/0/auth.json")
    monkeypatch.setattr(credentials.os, "geteuid", lambda: 1000)
    assert default_auth_file() == home / ".config/containers/auth.json"


def test_a_password_goes_into_a_private_file_only(home: Path) -> None:
    given = Credentials("user", "secret:word")
    assert "secret" not in repr(given)
    options = auth_options(parse("quay.io/x"), given, home)
    assert options == ["--authfile", str(home / "auth.json")]
    assert stat.S_IMODE((home / "auth.json").stat().st_mode) == 0o600
    [(registry, entry)] = json.loads((home / "auth.json").read_text())["auths"].items()
    assert (registry, base64.b64decode(entry["auth"])) == ("quay.io", b"user:secret:word")
    assert auth_options(parse("quay.io/x"), Credentials(authfile=home / "a"), home) == ["--authfile", str(home / "a")]
    assert auth_options(parse("quay.io/x"), None, home) == []


def test_plain_http_for_this_machine_only() -> None:
    assert tls_options(parse("127.0.0.1:5000/x"), "src-") == ["--src-tls-verify=false"]
    assert tls_options(parse("quay.io/x"), "") == []


@pytest.mark.parametrize("registry", ["", "a b", "quay.io/x", "Not A Host", "x", "http://"])
async def test_login_at_what_is_no_registry(home: Path, registry: str) -> None:
    with pytest.raises(InvalidInput, match="is no name of a registry"):
        await login(registry, "user", "password")


async def test_login_refuses_names_and_passwords_that_would_be_cut(home: Path) -> None:
    for user, password in (("", "x"), ("a\nb", "x"), ("a", "x\ny")):
        with pytest.raises(InvalidInput, match="line breaks"):
            await login("quay.io", user, password)


async def test_login_where_nothing_can_be_kept(home: Path) -> None:
    (home / "run").write_text("")
    with pytest.raises(Unavailable, match="cannot keep credentials"):
        await login("quay.io", "user", "password")


async def test_login_gives_the_password_on_stdin(home: Path, fake: Path) -> None:
    script(fake, f'echo "$@" > {home}/argv; cat > {home}/stdin; echo "{{}}" > {home}/run/containers/auth.json')
    path = await login("https://127.0.0.1:5000/", "user", "s3cret w0rd")
    assert (home / "stdin").read_text() == "s3cret w0rd"
    assert "s3cret" not in (home / "argv").read_text()
    assert "--tls-verify=false 127.0.0.1:5000" in (home / "argv").read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    await login("docker.io", "user", "x")
    assert (home / "argv").read_text().endswith(" docker.io\n")
