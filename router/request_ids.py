"""Ids for requests that bring none: random UUIDs, version 4."""

from binascii import hexlify
from secrets import token_bytes
from typing import Final

_AT_ONCE: Final = 128
_DIGITS: Final = 32


class RequestIds:
    """A source of ids, 36 characters each. Randomness is drawn for many at once."""

    __slots__ = ("_digits", "_place")

    def __init__(self) -> None:
        self._digits = b""
        self._place = 0

    def new(self) -> bytes:
        """An id that nobody has had."""
        if self._place >= len(self._digits):
            drawn = bytearray(hexlify(token_bytes(_AT_ONCE * _DIGITS // 2)))
            drawn[12::_DIGITS] = b"4" * _AT_ONCE  # the version, and the variant
            drawn[16::_DIGITS] = b"a" * _AT_ONCE
            self._digits, self._place = bytes(drawn), 0
        digits, place = self._digits, self._place
        self._place = place + _DIGITS
        return b"-".join(
            (
                digits[place : place + 8],
                digits[place + 8 : place + 12],
                digits[place + 12 : place + 16],
                digits[place + 16 : place + 20],
                digits[place + 20 : place + 32],
            )
        )
