"""Bodies of any content: a decoder gives a value or says BadRequest, and never anything else.

Short here; ``HV_FUZZ_EXAMPLES`` makes it long.
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hypervisor.kube.errors import ApiError
from hypervisor.kube.resources import CONFIG_MAPS, DEPLOYMENTS, PODS, SERVICES
from hypervisor.master.api.call import Call
from hypervisor.master.api.fit import PROTOBUF, decode, decode_object, fit
from hypervisor.master.auth.user import User
from hypervisor.master.kinds import strategy
from hypervisor.master.kinds.table import KINDS
from hypervisor.master.patch.json_patch import json_patch
from hypervisor.master.patch.merge_patch import merge_patch
from hypervisor.master.patch.strategic import strategic_merge
from hypervisor.master.schema.load import Schema

EXAMPLES = int(os.environ.get("HV_FUZZ_EXAMPLES", "100"))
fuzzed = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
REFUSALS = {400, 409, 413, 415, 422}
USER = User("somebody", ())

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20)
WORDS = ("metadata", "name", "labels", "spec", "containers", "ports", "port", "image", "status", "type", "value",
         "op", "path", "add", "$patch", "$retainKeys", "/metadata/name", "replace", "template", "selector")  # fmt: skip
keys = st.sampled_from(WORDS) | st.text(max_size=8)
values = st.recursive(
    scalars | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=20,
)


def tried(body: bytes, media: str) -> Any:
    try:
        return decode(body, media)[0]
    except ApiError as error:
        assert error.code in REFUSALS, error
        return None


@fuzzed
@given(st.binary(max_size=300))
@pytest.mark.parametrize("media", ["application/json", "application/yaml", PROTOBUF])
def test_bytes(media: str, body: bytes) -> None:
    tried(body, media)


@fuzzed
@given(st.binary(max_size=200))
def test_what_only_begins_like_protobuf(body: bytes) -> None:
    tried(b"k8s\x00" + body, PROTOBUF)


MESSAGE = bytes.fromhex(  # a ConfigMap "a" with data x=y in its envelope
    "6b38730a" + "0a0f0a02763112" + "09436f6e6669674d6170" + "120b0a030a01611204" + "0a01781201" + "79"
)


@fuzzed
@given(st.integers(0, len(MESSAGE) - 1), st.integers(0, 255), st.integers(0, len(MESSAGE)))
def test_damaged_protobuf(at: int, byte: int, length: int) -> None:
    body = bytearray(b"k8s\x00" + MESSAGE[4:])
    body[4 + at % (len(body) - 4)] = byte
    tried(bytes(body[:4]) + bytes(body[4 : 4 + length]), PROTOBUF)


@fuzzed
@given(values)
def test_json_and_yaml_give_what_was_written(value: Any) -> None:
    encoded = json.dumps(value).encode()
    assert tried(encoded, "application/json") in (value, None)  # None: numbers that no float holds are refused
    written = tried(yaml.safe_dump(value).encode(), "application/yaml")
    assert written in (value, None)


@fuzzed
@given(st.text(alphabet="{}[]:,&*!|>-?'\"# \n\tab01~<=.", max_size=60))
def test_text_that_looks_like_yaml(text: str) -> None:
    tried(text.encode(), "application/yaml")


@fuzzed
@given(values, st.sampled_from([PODS, DEPLOYMENTS, SERVICES, CONFIG_MAPS]))
def test_objects_of_any_content_are_fitted_or_refused(spec: Any, resource: Any) -> None:
    kind = KINDS.of(resource)
    body = {"metadata": {"name": "a", "namespace": "b"}, "spec": spec, "data": spec}
    call = Call(USER, kind, "b")
    try:
        obj, _ = decode_object(json.dumps(body).encode(), "application/json")
        fit(call, Schema.load().type_of(kind.schema), obj)
        strategy.prepare_create(kind, obj)
        strategy.check(kind, obj)
    except ApiError as error:
        assert error.code in REFUSALS, error


POD = {"metadata": {"name": "a", "labels": {"x": "y"}}, "spec": {"containers": [{"name": "c", "image": "i"}]}}


@fuzzed
@given(values)
def test_patches_of_any_content_are_done_or_refused(patch: Any) -> None:
    kind = Schema.load().type_of(KINDS.of(PODS).schema)
    for apply in (json_patch, merge_patch, lambda old, new: strategic_merge(old, new, kind)):
        try:
            apply(json.loads(json.dumps(POD)), patch)
        except ApiError as error:
            assert error.code in REFUSALS, error
