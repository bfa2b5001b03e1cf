"""Kubernetes label selectors, as the `external-filter` header carries them.

    key            the label is there              key=v  key==v     it is v
    !key           it is not                       key!=v            it is not v, or not there
    key in (a,b)   it is one of them               key notin (a,b)   it is none of them, or not there
    key>n  key<n   it is an integer above, below

joined by commas, all of which must hold; an empty selector matches everything. Keys and values are checked as
Kubernetes checks them (apimachinery, `labels.Parse`), and errors are worded after its own.
"""

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Final

Labels = Mapping[str, str]
Requirement = Callable[[Labels], bool]

MAX_SELECTOR_LENGTH: Final = 4096
MAX_CACHED: Final = 256

_TOKEN: Final = re.compile(r"\s*(?:(==|!=|[=<>!(),])|([^\s=<>!(),]+))")
_NAME: Final = re.compile(r"(?:[A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]")
_PREFIX: Final = re.compile(r"[a-z0-9](?:[-a-z0-9]*[a-z0-9])?(?:\.[a-z0-9](?:[-a-z0-9]*[a-z0-9])?)*")
_INTEGER: Final = re.compile(r"\d{1,19}", re.ASCII)
"""Of a label's value, which cannot begin with a sign."""


class SelectorError(ValueError):
    """The text is no selector."""


class Selector:
    """A parsed selector."""

    __slots__ = ("_requirements", "text")

    def __init__(self, text: str, requirements: tuple[Requirement, ...]) -> None:
        self.text = text
        self._requirements = requirements

    def matches(self, labels: Labels) -> bool:
        """Whether all requirements hold for these labels."""
        return all(requirement(labels) for requirement in self._requirements)


@lru_cache(MAX_CACHED)
def parse_selector(text: str) -> Selector:
    """The selector for this text; the last few hundred are remembered. Raises SelectorError."""
    if len(text) > MAX_SELECTOR_LENGTH:
        raise SelectorError(f"selector is longer than {MAX_SELECTOR_LENGTH} characters")
    parser = _Parser(_tokens(text))
    requirements: list[Requirement] = []
    if not parser.ended:
        requirements.append(parser.requirement())
        while not parser.ended:
            parser.expect(",")
            requirements.append(parser.requirement())
    return Selector(text, tuple(requirements))


def _tokens(text: str) -> list[str]:
    tokens: list[str] = []
    text = text.strip()
    at = 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:  # cannot be: every character is one or the other
            raise SelectorError(f"unable to parse requirement: found '{text[at]}'")
        tokens.append(match[1] or match[2])
        at = match.end()
    return tokens


class _Parser:
    """Walks the tokens once."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens = tokens
        self._at = 0

    @property
    def ended(self) -> bool:
        return self._at >= len(self._tokens)

    def _next(self) -> str:
        token = "" if self.ended else self._tokens[self._at]
        self._at += 1
        return token

    def _peek(self) -> str:
        return "" if self.ended else self._tokens[self._at]

    def expect(self, token: str) -> None:
        """Take this token and no other."""
        found = self._next()
        if found != token:
            raise SelectorError(f"unable to parse requirement: found '{found}', expected: '{token}'")

    def requirement(self) -> Requirement:
        """One requirement."""
        if self._peek() == "!":
            self._next()
            key = self._key()
            return lambda labels: key not in labels
        key = self._key()
        operator = self._peek()
        if operator in ("", ","):
            return lambda labels: key in labels
        self._next()
        if operator in ("=", "=="):
            value = self._value()
            return lambda labels: labels.get(key) == value
        if operator == "!=":
            value = self._value()
            return lambda labels: labels.get(key) != value
        if operator == "in":
            values = self._values()
            return lambda labels: labels.get(key) in values
        if operator == "notin":
            values = self._values()
            return lambda labels: labels.get(key) not in values
        if operator in ("<", ">"):
            return self._comparison(key, operator)
        raise SelectorError(
            f"unable to parse requirement: found '{operator}', expected: in, notin, =, ==, !=, <, >, or end of string"
        )

    def _key(self) -> str:
        key = self._next()
        if not key or not (key[0].isalnum() or key[0] in "-_./"):
            raise SelectorError(
                f"unable to parse requirement: found '{key}', expected: !, identifier, or end of string"
            )
        prefix, slash, name = key.rpartition("/")
        if (
            (slash and (len(prefix) > 253 or not _PREFIX.fullmatch(prefix)))
            or len(name) > 63
            or not _NAME.fullmatch(name)
        ):
            raise SelectorError(f'unable to parse requirement: key: Invalid value: "{key}": not a qualified name')
        return key

    def _value(self) -> str:
        """A value, or nothing before a comma or the end."""
        value = self._peek()
        if value in ("", ",", ")"):
            return ""
        self._next()
        if len(value) > 63 or not _NAME.fullmatch(value):
            raise SelectorError(f'unable to parse requirement: values: Invalid value: "{value}": not a label value')
        return value

    def _values(self) -> frozenset[str]:
        self.expect("(")
        values = [self._value()]
        while self._peek() == ",":
            self._next()
            values.append(self._value())
        self.expect(")")
        return frozenset(values)

    def _comparison(self, key: str, operator: str) -> Requirement:
        text = self._next()
        if not _INTEGER.fullmatch(text):
            raise SelectorError("unable to parse requirement: for 'Gt', 'Lt' operators, the value must be an integer")
        bound = int(text)
        above = operator == ">"

        def holds(labels: Labels) -> bool:
            label = labels.get(key)
            if label is None or not _INTEGER.fullmatch(label):
                return False
            return int(label) > bound if above else int(label) < bound

        return holds
