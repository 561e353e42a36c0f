"""Objects against the published types: what is taken out, what is refused, in which form values are kept."""

from __future__ import annotations

from typing import Any

import pytest

from hypervisor.kube.errors import ApiError
from hypervisor.master.kinds.table import KINDS
from hypervisor.master.schema.conform import conform, missing, suggest, unknown_fields
from hypervisor.master.schema.decode import decode_json, decode_yaml
from hypervisor.master.schema.load import Schema
from hypervisor.master.schema.scalars import Unfit, canonical_quantity
from hypervisor.master.schema.types import ListOf, Struct

POD = Schema.load().type_of("io.k8s.api.core.v1.Pod")


def pod(**container: Any) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "a"},
        "spec": {"containers": [{"name": "c", "image": "i"} | container]},
    }


@pytest.mark.parametrize("kind", list(KINDS), ids=lambda k: k.resource.qualified)
def test_every_kind_has_its_published_type(kind: Any) -> None:
    struct = Schema.load().type_of(kind.schema)
    assert {"apiVersion", "kind", "metadata"} <= struct.fields.keys()


def test_list_types_and_merge_keys_come_from_the_schema() -> None:
    spec = POD.fields["spec"]
    assert isinstance(spec, Struct)
    containers = spec.fields["containers"]
    assert isinstance(containers, ListOf)
    assert (containers.list_type, containers.keys, containers.merge_key) == ("map", ("name",), "name")
    assert isinstance(containers.item, Struct)
    ports = containers.item.fields["ports"]
    assert isinstance(ports, ListOf)
    assert (ports.keys, ports.merge_key) == (("containerPort", "protocol"), "containerPort")


def test_unknown_fields_are_taken_out_and_named() -> None:
    obj = pod(imagee="x") | {"foo": 1}
    assert unknown_fields(obj, POD) == ["spec.containers[0].imagee", "foo"]
    assert conform(obj, POD).unknown == ["spec.containers[0].imagee", "foo"]
    assert obj == pod()


def test_a_near_field_is_suggested() -> None:
    assert suggest("spec.containers[0].imagee", POD) == "image"
    assert suggest("spec.containers[0].xyzzy", POD) == ""


def test_null_is_absent() -> None:
    obj = pod(command=None) | {"status": None}
    report = conform(obj, POD)
    assert (report.unknown, report.mismatches, obj) == ([], [], pod())


@pytest.mark.parametrize(
    ("container", "message"),
    [
        (
            {"tty": "yes"},
            "json: cannot unmarshal string into Go struct field Container.spec.containers.tty of type bool",
        ),
        (
            {"args": "x"},
            "json: cannot unmarshal string into Go struct field Container.spec.containers.args of type []string",
        ),
        ({"ports": [{"containerPort": 1 << 40}]}, "of type int32"),
        ({"ports": [{"containerPort": 1.5}]}, "cannot unmarshal number"),
        ({"resources": {"limits": {"cpu": "lots"}}}, "quantities must match"),
        ({"resources": 3}, "of type v1.ResourceRequirements"),
    ],
)
def test_a_value_of_a_wrong_type(container: dict[str, Any], message: str) -> None:
    report = conform(pod(**container), POD)
    assert [message in m.message for m in report.mismatches] == [True]


def test_kept_forms() -> None:
    obj = pod(resources={"limits": {"cpu": 0.5, "memory": "1024Mi", "x/y": 3}})
    obj["metadata"]["creationTimestamp"] = "2024-05-01T02:00:00+02:00"
    assert not conform(obj, POD).mismatches
    assert obj["spec"]["containers"][0]["resources"]["limits"] == {"cpu": "500m", "memory": "1Gi", "x/y": "3"}
    assert obj["metadata"]["creationTimestamp"] == "2024-05-01T00:00:00Z"


@pytest.mark.parametrize(
    ("given", "kept"),
    [("1000m", "1"), ("0.1", "100m"), ("1e3", "1e3"), ("1.5Gi", "1536Mi"), ("0", "0"), ("-1", "-1"), ("100n", "100n"),
     ("0.1n", "1n"), ("1000k", "1M"), ("1E", "1E"), ("2Ei", "2Ei"), ("512Ki", "512Ki")],
)  # fmt: skip
def test_canonical_quantities(given: str, kept: str) -> None:
    assert canonical_quantity(given) == kept
    assert canonical_quantity(kept) == kept


@pytest.mark.parametrize("given", ["", "1 Gi", "Gi", "1GiB", "0x10", "1e", "1e999999999"])
def test_no_quantities(given: str) -> None:
    with pytest.raises(Unfit):
        canonical_quantity(given)


def test_required_fields_outside_status() -> None:
    obj = {"spec": {"containers": [{}], "tolerations": [{}]}, "status": {"containerStatuses": [{}]}}
    assert [(c.reason, c.field) for c in missing(obj, POD)] == [("FieldValueRequired", "spec.containers[0].name")]


def test_json_with_doubles() -> None:
    value, doubles = decode_json(b'{"a":{"b":1,"b":2},"c":[{"d":1,"d":1}],"c":[]}')
    assert (value, doubles) == ({"a": {"b": 2}, "c": []}, ["a.b", "c[0].d", "c"])


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b'{"a":NaN}', b"\xff", b'"\xed\xa0\x80"', '{"a":1}'.encode("utf-16"), b"[" * 100_000, b"1" * 5000],
)
def test_no_json(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        decode_json(body)
    assert caught.value.code == 400


def test_half_a_surrogate_pair_is_replaced() -> None:
    value, _ = decode_json(rb'{"a":"\ud800","b":"\ud83d\ude00"}')
    assert value == {"a": "�", "b": "\U0001f600"}


def test_yaml() -> None:
    value, doubles = decode_yaml(b"a: 2001-01-01\nb: yes\n1: x\nc:\n  d: 1\n  d: 2\n")
    assert value == {"a": "2001-01-01", "b": True, "1": "x", "c": {"d": 2}}
    assert doubles == ['line 6: key "d" already set in map']


@pytest.mark.parametrize(
    "body", [b"a: [", b"a: 1\n---\nb: 2\n", b"!!python/object:os.system {}", b"a: !!binary aGk=", b"a: .nan"]
)
def test_no_yaml(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        decode_yaml(body)
    assert caught.value.code == 400


def test_a_yaml_bomb_is_refused() -> None:
    lines = ["a0: &a0 [x,x,x,x,x,x,x,x,x,x]"]
    lines += [f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    with pytest.raises(ApiError, match="more than"):
        decode_yaml("\n".join(lines).encode())
