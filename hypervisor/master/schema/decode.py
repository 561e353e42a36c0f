"""Bodies of requests, decoded: JSON and YAML, with fields that stand twice found and told.

What comes back holds only what JSON has, with valid Unicode, so that it can be kept and sent again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Iterator
from typing import Any

import yaml

from hypervisor.kube.errors import bad_request

MAX_NODES = 1_000_000
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as its members stand, twice or not."""


def decode_json(body: bytes) -> tuple[Any, list[str]]:
    """The value in `body`, and the paths of fields that stand in it more than once (the last one counts).

    :raises ApiError: 400, it is no JSON
    """
    twice = False

    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal twice
        built = dict(pairs)
        twice = twice or len(built) != len(pairs)
        return built

    value = _loads(body, build)
    if _SURROGATE.search(body):
        value = _clean(value)
    return value, list(_doubles(_loads(body, _Pairs), "")) if twice else []


def _loads(body: bytes, hook: Any) -> Any:
    try:
        # Decoded here: of bytes json.loads would take half a surrogate pair, and UTF-16.
        return json.loads(body.decode(), object_pairs_hook=hook, parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise bad_request("the body is not valid UTF-8") from None
    except RecursionError:
        raise bad_request("the body is nested too deeply") from None
    except ValueError as error:
        raise bad_request(f"couldn't get version/kind; json parse error: {error}") from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _doubles(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, _Pairs):
        seen: set[str] = set()
        for key, item in value:
            here = f"{path}.{key}" if path else key
            if key in seen:
                yield here
            seen.add(key)
            yield from _doubles(item, here)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _doubles(item, f"{path}[{index}]")


def _clean(value: Any) -> Any:
    """Half a surrogate pair cannot be written as UTF-8; upstream's decoder has U+FFFD there."""
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, dict):
        return {_clean(key): _clean(item) for key, item in value.items()}
    return [_clean(item) for item in value] if isinstance(value, list) else value


def decode_yaml(body: bytes) -> tuple[Any, list[str]]:
    """As `decode_json`, of the one YAML document in `body`; dates stay strings, aliases are expanded within bounds.

    :raises ApiError: 400, it is no YAML, has more than one document, or holds what JSON has not
    """
    try:
        loader = _Loader(body)
    except yaml.YAMLError as error:  # no text at all
        raise bad_request(f"error converting YAML to JSON: {error}") from None
    try:
        node = loader.get_single_node()
        value = loader.construct_document(node) if node is not None else None
        return _jsonable(value, [MAX_NODES]), loader.twice
    except RecursionError:  # also of an alias that stands within its own anchor
        raise bad_request("the body is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        raise bad_request(f"error converting YAML to JSON: {error}") from None
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    """YAML without timestamps (a string with dashes is a string), which notes mapping keys that stand twice."""

    def __init__(self, body: bytes) -> None:
        super().__init__(body)
        self.twice: list[str] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """As the base class, with double keys noted by line."""
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                self.twice.append(f'line {key.start_mark.line + 1}: key "{key.value}" already set in map')
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in listed if tag != "tag:yaml.org,2002:timestamp"]
    for first, listed in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _jsonable(value: Any, budget: list[int]) -> Any:
    budget[0] -= 1
    if budget[0] < 0:
        raise bad_request(f"the YAML has more than {MAX_NODES} values")
    if isinstance(value, dict):
        return {_key(key): _jsonable(item, budget) for key, item in value.items()}
    if isinstance(value, list):
        return [_jsonable(item, budget) for item in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float) and value == value and value not in (float("inf"), float("-inf")):
        return value
    raise bad_request(f"error converting YAML to JSON: a value of type {type(value).__name__} has no JSON form")


def _key(key: Any) -> str:
    if isinstance(key, bool):
        return "true" if key else "false"
    if isinstance(key, (str, int, float)):
        return str(key)
    raise bad_request("error converting YAML to JSON: a mapping key is no scalar")
