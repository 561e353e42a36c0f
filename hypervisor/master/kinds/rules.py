"""What rules are written with: causes worded as upstream words them, names, and the metadata that every object has.

A rule is a generator of `Cause`; it finds everything that is wrong and stops at nothing. It sees objects that fit
their schema and have their defaults.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from hypervisor.kube.errors import Cause
from hypervisor.kube.selectors import label_key_error, label_value_error

Causes = Iterator[Cause]
View = Mapping[str, Any]
NameRule = Callable[[str], str | None]

ANNOTATIONS_MAX = 256 * 1024
_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_SUBDOMAIN = rf"{_LABEL}(\.{_LABEL})*"
_LABEL_TEXT = (
    "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end "
    f"with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is '{_LABEL}')"
)
_SUBDOMAIN_TEXT = (
    "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start "
    f"and end with an alphanumeric character (e.g. 'example.com', regex used for validation is '{_SUBDOMAIN}')"
)
_LABEL_1035 = r"[a-z]([-a-z0-9]*[a-z0-9])?"
_LABEL_1035_TEXT = (
    "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an alphabetic character, "
    f"and end with an alphanumeric character (e.g. 'my-name',  or 'abc-123', regex used for validation is "
    f"'{_LABEL_1035}')"
)
_CONFIG_KEY = r"[-._a-zA-Z0-9]+"
_CONFIG_KEY_TEXT = (
    "a valid config key must consist of alphanumeric characters, '-', '_' or '.' (e.g. 'key.name',  or 'KEY_NAME',  "
    f"or 'key-name', regex used for validation is '{_CONFIG_KEY}')"
)


def shown(value: Any) -> str:
    """A value as upstream quotes it in a message."""
    if value is None:
        return "null"
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def required(path: str, why: str = "") -> Cause:
    """A field that is not there."""
    return Cause("FieldValueRequired", f"Required value: {why}" if why else "Required value", path)


def invalid(path: str, value: Any, why: str) -> Cause:
    """A value that will not do."""
    return Cause("FieldValueInvalid", f"Invalid value: {shown(value)}: {why}", path)


def unsupported(path: str, value: Any, supported: Iterable[str]) -> Cause:
    """A value that is none of the known ones."""
    listed = ", ".join(shown(v) for v in sorted(supported))
    return Cause("FieldValueNotSupported", f"Unsupported value: {shown(value)}: supported values: {listed}", path)


def forbidden(path: str, why: str) -> Cause:
    """A field that may not be set, or not be changed so."""
    return Cause("FieldValueForbidden", f"Forbidden: {why}", path)


def duplicate(path: str, value: Any) -> Cause:
    """A value that stands twice where it must be unique."""
    return Cause("FieldValueDuplicate", f"Duplicate value: {shown(value)}", path)


def not_found(path: str, value: Any) -> Cause:
    """A reference to what is not there."""
    return Cause("FieldValueNotFound", f"Not found: {shown(value)}", path)


def too_long(path: str, most: int) -> Cause:
    """More bytes than fit."""
    return Cause("FieldValueTooLong", f"Too long: may not be more than {most} bytes", path)


def one_of(path: str, value: Any, supported: Iterable[str], *, needed: bool = True) -> Causes:
    """`value` is one of `supported`; when not `needed`, it may be absent."""
    known = tuple(supported)
    if value in (None, ""):
        if needed:
            yield required(path)
    elif value not in known:
        yield unsupported(path, value, known)


def at_least(path: str, value: Any, least: int = 0) -> Causes:
    """A number, if there is one, that is `least` or more."""
    if isinstance(value, int) and value < least:
        yield invalid(path, value, f"must be greater than or equal to {least}")


def between(path: str, value: Any, least: int, most: int) -> Causes:
    """A number, if there is one, in a range."""
    if isinstance(value, int) and not least <= value <= most:
        yield invalid(path, value, f"must be between {least} and {most}, inclusive")


def unchanged(path: str, new: Any, old: Any, why: str = "field is immutable") -> Causes:
    """A field that stays as it was made."""
    if new != old:
        yield invalid(path, new, why)


def unique(path: str, items: Iterable[View], key: str) -> Causes:
    """One field of every entry of a list is there once only."""
    seen = set()
    for index, item in enumerate(items):
        value = item.get(key)
        if value in seen:
            yield duplicate(f"{path}[{index}].{key}", value)
        seen.add(value)


# ---- names -----------------------------------------------------------------------------------------------------------


def _name(pattern: str, text: str, most: int) -> NameRule:
    compiled = re.compile(pattern)

    def check(name: str) -> str | None:
        if len(name.encode()) > most:
            return f"must be no more than {most} bytes"
        return None if compiled.fullmatch(name) else text

    return check


dns_label = _name(_LABEL, _LABEL_TEXT, 63)
dns_subdomain = _name(_SUBDOMAIN, _SUBDOMAIN_TEXT, 253)
dns_1035_label = _name(_LABEL_1035, _LABEL_1035_TEXT, 63)
_config_key = _name(_CONFIG_KEY, _CONFIG_KEY_TEXT, 253)


def config_key(name: str) -> str | None:
    """What is wrong with a key of a ConfigMap or Secret, which becomes the name of a file."""
    if name in (".", "..") or name.startswith(".."):
        return f"must not be '{name}'" if name in (".", "..") else "must not start with '..'"
    return _config_key(name)


def path_segment(name: str) -> str | None:
    """What is wrong with a name that only has to fit in a URL path (RBAC)."""
    if name in (".", ".."):
        return f"may not be '{name}'"
    return next((f"may not contain '{char}'" for char in "/%" if char in name), None)


def named(path: str, value: Any, rule: NameRule) -> Causes:
    """A name is there and follows its rule."""
    if not value:
        yield required(path)
    elif why := rule(str(value)):
        yield invalid(path, value, why)


# ---- metadata --------------------------------------------------------------------------------------------------------


def labels(path: str, pairs: Mapping[str, str] | None) -> Causes:
    """Labels, and selectors that are sets of labels."""
    for key, value in (pairs or {}).items():
        if why := label_key_error(key):
            yield invalid(path, key, why)
        if why := label_value_error(value):
            yield invalid(path, value, why)


def annotation_set(path: str, pairs: Mapping[str, str] | None) -> Causes:
    """Annotations: their keys, and their size together."""
    total = 0
    for key, value in (pairs or {}).items():
        total += len(key.encode()) + len(value.encode())
        if why := label_key_error(key.lower()):
            yield invalid(path, key, why)
    if total > ANNOTATIONS_MAX:
        yield too_long(path, ANNOTATIONS_MAX)


def metadata(meta: View, rule: NameRule, path: str = "metadata") -> Causes:
    """The metadata of an object whose name follows `rule`."""
    if meta.get("generateName") and (why := rule(str(meta["generateName"]).rstrip("-.") or "a")):
        yield invalid(f"{path}.generateName", meta["generateName"], why)
    if meta.get("name"):
        yield from named(f"{path}.name", meta["name"], rule)
    elif not meta.get("generateName"):
        yield required(f"{path}.name", "name or generateName is required")
    if meta.get("namespace") and (why := dns_label(meta["namespace"])):
        yield invalid(f"{path}.namespace", meta["namespace"], why)
    yield from labels(f"{path}.labels", meta.get("labels"))
    yield from annotation_set(f"{path}.annotations", meta.get("annotations"))
    yield from _owners(f"{path}.ownerReferences", meta.get("ownerReferences") or ())
    for index, finalizer in enumerate(meta.get("finalizers") or ()):
        if why := label_key_error(finalizer):
            yield invalid(f"{path}.finalizers[{index}]", finalizer, why)
        elif not {"/", "."} & set(finalizer) and finalizer not in ("orphan", "foregroundDeletion", "kubernetes"):
            yield invalid(
                f"{path}.finalizers[{index}]",
                finalizer,
                "name is neither a standard finalizer name nor is it fully qualified",
            )


def _owners(path: str, owners: Iterable[View]) -> Causes:
    controllers = []
    for index, owner in enumerate(owners):
        for key in ("apiVersion", "kind", "name", "uid"):
            if not owner.get(key):
                yield invalid(f"{path}[{index}].{key}", "", "must not be empty")
        if owner.get("controller"):
            controllers.append(owner.get("name"))
    if len(controllers) > 1:
        yield invalid(path, controllers, "Only one reference can have Controller set to true")


# ---- selectors -------------------------------------------------------------------------------------------------------

_OPERATORS = ("In", "NotIn", "Exists", "DoesNotExist")


def label_selector(path: str, selector: View | None) -> Causes:
    """A LabelSelector."""
    if not selector:
        return
    yield from labels(f"{path}.matchLabels", selector.get("matchLabels"))
    for index, rule in enumerate(selector.get("matchExpressions") or ()):
        yield from expression(f"{path}.matchExpressions[{index}]", rule, _OPERATORS)


def expression(path: str, rule: View, operators: tuple[str, ...]) -> Causes:
    """One requirement of a label selector or a node selector."""
    operator, values = rule.get("operator"), rule.get("values") or ()
    if operator not in operators:
        yield invalid(f"{path}.operator", operator, "not a valid selector operator")
    elif operator in ("In", "NotIn") and not values:
        yield required(f"{path}.values", "must be specified when `operator` is 'In' or 'NotIn'")
    elif operator in ("Exists", "DoesNotExist") and values:
        yield forbidden(f"{path}.values", "may not be specified when `operator` is 'Exists' or 'DoesNotExist'")
    elif operator in ("Gt", "Lt") and len(values) != 1:
        yield required(f"{path}.values", "must be specified single value when `operator` is 'Lt' or 'Gt'")
    if why := label_key_error(str(rule.get("key") or "")):
        yield invalid(f"{path}.key", rule.get("key"), why)
