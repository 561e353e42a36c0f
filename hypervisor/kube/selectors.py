"""Label and field selectors: as text, as ``LabelSelector`` objects, and what they match.

Source: Kubernetes documentation, "Labels and Selectors" and "Field Selectors"; errors are worded as upstream's, which
users know. Everything here is pure and never blocks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hypervisor.kube.errors import ApiError, bad_request

Operator = Literal["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"]

_NAME = re.compile(r"([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]")
_DNS = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_TOKEN = re.compile(r"\s*(==|!=|=|!|,|\(|\)|>|<|[^\s=!,()<>]+)\s*")
_SYMBOLS = frozenset(("==", "!=", "=", "!", ",", "(", ")", ">", "<", ""))
_QUALIFIED = (
    "name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric "
    "character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is "
    "'([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')"
)
_VALUE = (
    "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start and "
    "end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used for validation is "
    "'(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')"
)
_PREFIX = (
    "prefix part a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and "
    "must start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is "
    "'[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')"
)


def label_key_error(key: str) -> str | None:
    """What is wrong with a label or annotation key; None when nothing is."""
    prefix, slash, name = key.rpartition("/")
    if slash and (not _DNS.fullmatch(prefix) or len(prefix) > 253):
        return "prefix part must be non-empty" if not prefix else _PREFIX
    if not name:
        return "name part must be non-empty"
    if len(name) > 63:
        return "name part must be no more than 63 bytes"
    return None if _NAME.fullmatch(name) else _QUALIFIED


def label_value_error(value: str) -> str | None:
    """What is wrong with a label's value; None when nothing is."""
    if len(value) > 63:
        return "must be no more than 63 bytes"
    return None if not value or _NAME.fullmatch(value) else _VALUE


@dataclass(frozen=True, slots=True)
class Requirement:
    """One condition. `values` has one for Gt and Lt, none for Exists and DoesNotExist."""

    key: str
    operator: Operator
    values: frozenset[str] = frozenset()

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether `labels` meet it; NotIn and DoesNotExist are met by a label that is not there."""
        value = labels.get(self.key)
        match self.operator:
            case "In":
                return value is not None and value in self.values
            case "NotIn":
                return value is None or value not in self.values
            case "Exists":
                return value is not None
            case "DoesNotExist":
                return value is None
        return self._compares(value)

    def _compares(self, value: str | None) -> bool:
        try:
            number, bound = int(value or ""), int(next(iter(self.values)))
        except ValueError:
            return False
        return number > bound if self.operator == "Gt" else number < bound

    def __str__(self) -> str:
        listed = ",".join(sorted(self.values))
        match self.operator:
            case "In":
                return f"{self.key}={listed}" if len(self.values) == 1 else f"{self.key} in ({listed})"
            case "NotIn":
                return f"{self.key}!={listed}" if len(self.values) == 1 else f"{self.key} notin ({listed})"
            case "Exists":
                return self.key
            case "DoesNotExist":
                return f"!{self.key}"
        return f"{self.key}{'>' if self.operator == 'Gt' else '<'}{listed}"


@dataclass(frozen=True, slots=True)
class LabelSelector:
    """All requirements must hold; none at all matches everything. One that is `void` matches nothing."""

    requirements: tuple[Requirement, ...] = ()
    void: bool = False

    @classmethod
    def of(cls, selector: Mapping[str, Any] | None) -> LabelSelector:
        """The selector of a ``LabelSelector`` object; None selects nothing, an empty one everything.

        :raises ApiError: BadRequest
        """
        if selector is None:
            return cls.nothing()
        required = [_made(k, "In", [str(v)]) for k, v in (selector.get("matchLabels") or {}).items()]
        for requirement in required:
            _check_key(requirement.key)
        return cls((*required, *map(expression, selector.get("matchExpressions") or ())))

    @classmethod
    def nothing(cls) -> LabelSelector:
        """The one that matches nothing."""
        return cls(void=True)

    def __bool__(self) -> bool:
        """False when it matches everything."""
        return self.void or bool(self.requirements)

    def matches(self, labels: Mapping[str, str] | None) -> bool:
        """Whether an object with these labels is selected."""
        if self.void:
            return False
        given = labels or {}
        return all(r.matches(given) for r in self.requirements)

    def matches_object(self, obj: Mapping[str, Any]) -> bool:
        """As `matches`, for the labels of an object."""
        return self.matches((obj.get("metadata") or {}).get("labels"))

    def __str__(self) -> str:
        """The text that `parse_labels` reads back; one that is `void` has none."""
        return ",".join(map(str, self.requirements))


EVERYTHING = LabelSelector()


def parse_labels(text: str) -> LabelSelector:
    """A selector as in ``?labelSelector=``: ``a=b,c!=d,e in (f,g),h notin (i),j,!k,l>1``.

    :raises ApiError: BadRequest
    """
    if not text.strip():
        return EVERYTHING
    return LabelSelector(tuple(_LabelParser(text).parse()))


class _LabelParser:
    """Recursive descent over the tokens of one selector."""

    def __init__(self, text: str) -> None:
        self._tokens: list[str] = [*_TOKEN.findall(text), ""]
        self._at = 0

    def parse(self) -> Iterator[Requirement]:
        while True:
            yield self._requirement()
            token = self._take()
            if token == "":
                return
            if token != ",":
                raise _unparsable(f"found '{token}', expected: ',' or 'end of string'")
            if self._peek() in _SYMBOLS - {"!"}:
                raise _unparsable(f"found '{self._peek()}', expected: identifier after ','")

    def _peek(self) -> str:
        return self._tokens[self._at]

    def _take(self) -> str:
        token = self._tokens[self._at]
        self._at += token != ""
        return token

    def _requirement(self) -> Requirement:
        negated = self._peek() == "!"
        if negated:
            self._take()
        key = self._take()
        if key in _SYMBOLS:
            raise _unparsable(f"found '{key}', expected: !, identifier, or 'end of string'")
        _check_key(key)
        if negated:
            return Requirement(key, "DoesNotExist")
        return self._compared(key)

    def _compared(self, key: str) -> Requirement:
        token = self._peek()
        if token in ("", ","):
            return Requirement(key, "Exists")
        self._take()
        match token:
            case "=" | "==":
                return _made(key, "In", [self._exact()])
            case "!=":
                return _made(key, "NotIn", [self._exact()])
            case ">" | "<":
                return _made(key, "Gt" if token == ">" else "Lt", [self._exact()])
            case "in" | "notin":
                return _made(key, "In" if token == "in" else "NotIn", self._set())
        raise _unparsable(f"found '{token}', expected: in, notin, =, ==, !=, gt, lt")

    def _exact(self) -> str:
        if self._peek() in ("", ","):
            return ""
        token = self._take()
        if token in _SYMBOLS:
            raise _unparsable(f"found '{token}', expected: identifier")
        return token

    def _set(self) -> list[str]:
        if (token := self._take()) != "(":
            raise _unparsable(f"found '{token}' expected: '('")
        values = [""] if self._peek() in (",", ")") else []
        while (token := self._take()) != ")":
            if token == ",":
                values += [""] if self._peek() in (",", ")") else []
            elif token in _SYMBOLS:
                raise _unparsable(f"found '{token}', expected: ',' or ')'")
            else:
                values.append(token)
        return values


def _unparsable(why: str) -> ApiError:
    return bad_request(f"unable to parse requirement: {why}")


def _check_key(key: str) -> None:
    if error := label_key_error(key):
        raise _unparsable(f'key: Invalid value: "{key}": {error}')


def _made(key: str, operator: Operator, values: list[str]) -> Requirement:
    for index, value in enumerate(values):
        if operator in ("Gt", "Lt") and not re.fullmatch(r"[+-]?[0-9]{1,18}", value):
            raise _unparsable(
                f"values[{index}]: Invalid value: \"{value}\": for 'Gt', 'Lt' operators, the value must be an integer"
            )
        if error := label_value_error(value):
            raise _unparsable(f'values[{index}][{key}]: Invalid value: "{value}": {error}')
    return Requirement(key, operator, frozenset(values))


def expression(item: Mapping[str, Any]) -> Requirement:
    """One element of ``matchExpressions`` (also those of node selectors: Gt, Lt).

    :raises ApiError: BadRequest
    """
    key, operator, values = str(item.get("key", "")), item.get("operator"), list(item.get("values") or ())
    _check_key(key)
    match operator:
        case "In" | "NotIn" if not values:
            raise bad_request("values: Invalid value: []: for 'in', 'notin' operators, values set can't be empty")
        case "Exists" | "DoesNotExist" if values:
            raise bad_request("values: Invalid value: values set must be empty for exists and does not exist")
        case "Gt" | "Lt" if len(values) != 1:
            raise bad_request("values: Invalid value: for 'Gt', 'Lt' operators, exactly one value is required")
        case "In" | "NotIn" | "Exists" | "DoesNotExist" | "Gt" | "Lt":
            return _made(key, operator, [str(v) for v in values])
    raise bad_request(f'"{operator}" is not a valid label selector operator')


# ---- fields ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FieldRequirement:
    """``field=value``, or with `equal` False ``field!=value``."""

    field: str
    value: str
    equal: bool = True


@dataclass(frozen=True, slots=True)
class FieldSelector:
    """All requirements must hold; none at all matches everything. Which fields exist is the server's business."""

    requirements: tuple[FieldRequirement, ...] = ()

    def __bool__(self) -> bool:
        """False when it matches everything."""
        return bool(self.requirements)

    def matches(self, value_of: Callable[[str], str]) -> bool:
        """Whether an object is selected, of which `value_of` gives the text of a field (empty: not set)."""
        return all((value_of(r.field) == r.value) == r.equal for r in self.requirements)

    def matches_object(self, obj: Mapping[str, Any]) -> bool:
        """As `matches`, with each field looked up by its path in the object."""
        return self.matches(lambda path: field_text(obj, path))

    def exact(self, field: str) -> str | None:
        """The value that it demands of `field`, if it does."""
        return next((r.value for r in self.requirements if r.field == field and r.equal), None)

    def __str__(self) -> str:
        return ",".join(f"{r.field}{'=' if r.equal else '!='}{_escaped(r.value)}" for r in self.requirements)


def field_text(obj: Mapping[str, Any], path: str) -> str:
    """The value at a dotted path as a field selector sees it: text; booleans in lower case; unset is empty."""
    value: Any = obj
    for step in path.split("."):
        value = value.get(step) if isinstance(value, Mapping) else None
    if isinstance(value, bool):
        return "true" if value else "false"
    return "" if value is None else str(value)


def _escaped(value: str) -> str:
    return re.sub(r"([\\,=])", r"\\\1", value)


def parse_fields(text: str) -> FieldSelector:
    r"""A selector as in ``?fieldSelector=``: ``a=b,c!=d``; ``\,`` ``\=`` and ``\\`` stand for themselves in values.

    :raises ApiError: BadRequest
    """
    terms = [term for term in re.findall(r"(?:\\.|[^,\\]|\\$)+", text) if term]
    return FieldSelector(tuple(_field_term(term, text) for term in terms))


def _field_term(term: str, text: str) -> FieldRequirement:
    match = re.fullmatch(r"((?:\\.|[^\\=!]|!(?!=))*)(!=|==|=)((?:\\.|[^\\=])*)", term, re.DOTALL)
    if match is None:
        raise bad_request(f"invalid selector: '{text}'; can't understand '{term}'")
    field, operator, value = match.groups()
    if wrong := re.search(r"\\[^\\,=]", value):
        raise bad_request(f"invalid field selector: invalid escape sequence: {wrong[0]}")
    return FieldRequirement(field, re.sub(r"\\(.)", r"\1", value), operator != "!=")
