"""Splits a command line that carries another one: ``hv exec -it POD -- CMD...``, ``hv run --rm IMAGE CMD...``.

The rule, for exec and run alike: options stand before or after POD or IMAGE; the command begins at ``--``, or at the
first word after POD or IMAGE that is no option. From there on nothing is hv's.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence


def split(args: Sequence[str], valued: Collection[str]) -> tuple[list[str], list[str]]:
    """hv's own words, and the command.

    :param valued: options that take a value, as ``-c`` and ``--container``
    """
    own: list[str] = []
    named = False
    at = 0
    while at < len(args):
        word = args[at]
        if word == "--":
            return _after_dashes(own, list(args[at + 1 :]), named)
        if len(word) > 1 and word.startswith("-"):
            width = 2 if _wants_next(word, valued) else 1
            own += args[at : at + width]
            at += width
            continue
        if named:
            return own, list(args[at:])
        own.append(word)
        named = True
        at += 1
    return own, []


def _after_dashes(own: list[str], rest: list[str], named: bool) -> tuple[list[str], list[str]]:
    if named or not rest:
        return own, rest
    command = rest[1:]
    return [*own, rest[0]], command[1:] if command[:1] == ["--"] else command


def _wants_next(word: str, valued: Collection[str]) -> bool:
    if word.startswith("--"):
        return "=" not in word and word in valued
    for at, letter in enumerate(word[1:], 1):
        if f"-{letter}" in valued:
            return at == len(word) - 1
    return False


def parse(own: Sequence[str], flags: Mapping[str, str], valued: Mapping[str, str]) -> dict[str, str] | None:
    """A quick parse of hv's own words; None for anything that click should look at (help, a mistake).

    :param flags: option to key
    :param valued: option with a value to key
    :returns: key to value; a flag's value is ``"1"``, the positional word's key is ``""``
    """
    found: dict[str, str] = {}
    words = iter(own)
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            items = [(name, value if equals else None)]
        elif len(word) > 1 and word.startswith("-"):
            items = _cluster(word, valued)
        elif "" in found:
            return None
        else:
            found[""] = word
            continue
        for name, given in items:
            if name in flags and given is None:
                found[flags[name]] = "1"
            elif name in valued:
                given = next(words, None) if given is None else given
                if given is None:
                    return None
                found[valued[name]] = given
            else:
                return None
    return found


def _cluster(word: str, valued: Collection[str]) -> list[tuple[str, str | None]]:
    """``-itcNAME`` as its options."""
    items: list[tuple[str, str | None]] = []
    for at, letter in enumerate(word[1:], 1):
        if f"-{letter}" in valued:
            return [*items, (f"-{letter}", word[at + 1 :] or None)]
        items.append((f"-{letter}", None))
    return items
