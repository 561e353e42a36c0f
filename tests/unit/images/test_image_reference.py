"""Names of images, pull policies, and the small values."""

from __future__ import annotations

import pytest

from hypervisor.errors import InvalidInput
from hypervisor.images import Platform, PullPolicy
from hypervisor.images.reference import LOCAL_REGISTRY, Reference, digest_of, id_prefix, lookups, parse, parse_digest

DIGEST = "sha256:" + "ab" * 32


@pytest.mark.parametrize(
    ("text", "full", "familiar"),
    [
        ("busybox", "docker.io/library/busybox:latest", "busybox:latest"),
        ("busybox:1.36", "docker.io/library/busybox:1.36", "busybox:1.36"),
        ("podvisor/busybox", "docker.io/podvisor/busybox:latest", "podvisor/busybox:latest"),
        ("index.docker.io/library/busybox", "docker.io/library/busybox:latest", "busybox:latest"),
        ("docker.io/busybox", "docker.io/library/busybox:latest", "busybox:latest"),
        ("quay.io/a/b/c:v1", "quay.io/a/b/c:v1", "quay.io/a/b/c:v1"),
        ("localhost/x", "localhost/x:latest", "x:latest"),
        ("localhost:5000/x", "localhost:5000/x:latest", "localhost:5000/x:latest"),
        ("127.0.0.1:5000/x:t", "127.0.0.1:5000/x:t", "127.0.0.1:5000/x:t"),
        ("[::1]:5000/x", "[::1]:5000/x:latest", "[::1]:5000/x:latest"),
        (f"x@{DIGEST}", f"docker.io/library/x@{DIGEST}", f"x@{DIGEST}"),
        (f"x:1@{DIGEST}", f"docker.io/library/x@{DIGEST}", f"x@{DIGEST}"),
        ("Host/x", "Host/x:latest", "Host/x:latest"),
        ("a__b/c-d.e--f", "docker.io/a__b/c-d.e--f:latest", "a__b/c-d.e--f:latest"),
    ],
)
def test_names_are_completed_as_docker_does(text: str, full: str, familiar: str) -> None:
    assert str(parse(text)) == full
    assert parse(text).familiar == familiar
    assert parse(full) == parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the name is empty"),
        (":tag", "the name is empty"),
        ("Busybox", "bad name part 'Busybox'"),
        ("a//b", "bad name part ''"),
        ("../x", r"bad registry '\.\.'"),
        ("a/../b", r"bad name part '\.\.'"),
        ("a b", "bad name part 'a b'"),
        ("-x", "bad name part '-x'"),
        ("x:", "bad tag ''"),
        ("x:a b", "bad tag 'a b'"),
        ("x:" + "t" * 129, "bad tag"),
        ("x@sha256:abc", "is no digest"),
        ("x@" + DIGEST.upper(), "is no digest"),
        ("host:99999/x", "bad registry 'host:99999'"),
        ("ho_st.x/y", "bad registry 'ho_st.x'"),
        ("n" * 256, "longer than 255"),
        ("x\n", "bad name part"),
        ("--help", "bad name part '--help'"),
    ],
)
def test_what_is_no_name_is_refused_with_the_reason(text: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        parse(text)


def test_short_names_are_looked_up_locally_first() -> None:
    assert [str(reference) for reference in lookups("busybox")] == [
        "localhost/busybox:latest",
        "localhost/podvisor/busybox:latest",
        "docker.io/library/busybox:latest",
    ]
    assert [str(reference) for reference in lookups("a/b:1")] == ["localhost/a/b:1", "docker.io/a/b:1"]
    assert [str(reference) for reference in lookups("quay.io/b")] == ["quay.io/b:latest"]


def test_only_this_machines_registries_are_loopback() -> None:
    for text in ("127.0.0.1/x", "127.1.2.3:5000/x", "localhost:5000/x", "[::1]/x", "[::1]:5000/x"):
        assert parse(text).is_loopback, text
    for text in ("x", "128.0.0.1/x", "localhost.example/x", "127.0.0.1.example/x", "[::2]/x", "1127.0.0.1/x"):
        assert not parse(text).is_loopback, text
    assert parse("x", default_registry=LOCAL_REGISTRY).is_local
    assert not parse("localhost:5000/x").is_local


def test_ids_are_told_from_names() -> None:
    assert id_prefix("0123456789ab") == "0123456789ab"
    assert id_prefix("sha256:0123") == "0123"
    assert id_prefix("beef") is None
    assert id_prefix("0123456789ab:latest") is None


def test_digests() -> None:
    assert digest_of(b"") == "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert parse_digest(DIGEST) == "ab" * 32
    assert parse("x").with_digest(DIGEST) == Reference("docker.io", "library/x", None, DIGEST)
    for bad in (None, 5, "sha512:" + "a" * 128, DIGEST + "0"):
        with pytest.raises(InvalidInput, match="is no digest"):
            parse_digest(bad)


def test_policies_in_both_vocabularies() -> None:
    assert PullPolicy.parse("always") is PullPolicy.parse("Always") is PullPolicy.ALWAYS
    assert PullPolicy.parse("missing") is PullPolicy.parse("IfNotPresent") is PullPolicy.MISSING
    with pytest.raises(InvalidInput, match=r"spec\.x: unknown pull policy 'sometimes'; use one of: always"):
        PullPolicy.parse("sometimes", where="spec.x")
    assert [PullPolicy.ALWAYS.must_pull(present=here) for here in (True, False)] == [True, True]
    assert [PullPolicy.MISSING.must_pull(present=here) for here in (True, False)] == [False, True]
    assert [PullPolicy.NEVER.must_pull(present=here) for here in (True, False)] == [False, False]


def test_the_hosts_platform_has_docker_s_name() -> None:
    assert str(Platform.of_host()).startswith("linux/")
    assert "x86_64" not in str(Platform.of_host())
