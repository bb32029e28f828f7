"""What sysctl accepts: the kernel's own parsing (kernel/sysctl.c, lib/vsprintf.c), for values that we store. Pure.

A `Check` is given the value as it is and what was written at offset 0. It says what the value is from then on, as reads
show it, and how many bytes were taken; `NodeError` refuses.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Container
from typing import NamedTuple

from interceptor.view.nodes import NodeError, Owner

PAGE_SIZE = 4096
INT_MAX = 2**31 - 1
INT_MIN = -(2**31)
ULONG_MAX = 2**64 - 1
LONG_MAX = 2**63 - 1
_SPACES = b" \t\n\v\f\r\xa0"  # isspace() of lib/ctype.c
_BETWEEN = b" \t\n"  # proc_wspace_sep
_DIGITS_MAX = 21
"""TMPBUFLEN: longer numbers are refused whatever they are."""


class Accepted(NamedTuple):
    """The value from now on, and how much of what was written counts as taken."""

    value: bytes
    taken: int


Check = Callable[[Owner, bytes, bytes], Accepted]


def _digits(text: bytes, base: int) -> int:
    count = 0
    allowed = b"0123456789abcdef"[:base]
    while count < len(text) and text[count : count + 1].lower() in allowed and text[count : count + 1]:
        count += 1
    return count


def _number(text: bytes) -> tuple[int, int]:
    """strtoul_lenient with base 0: the value and how long it is. `NodeError` EINVAL."""
    sign = 1 if text[:1] == b"-" and len(text) > 1 else 0
    body = text[sign : _DIGITS_MAX + 1]
    if not body[:1].isdigit():
        raise NodeError(errno.EINVAL)
    base, skip = 10, 0
    if body[:1] == b"0":
        if body[1:2] in (b"x", b"X") and _digits(body[2:3], 16):
            base, skip = 16, 2
        else:
            base = 8
    length = skip + _digits(body[skip:], base)
    value = int(body[skip:length] or b"0", base)
    end = sign + length
    if end >= _DIGITS_MAX or value > ULONG_MAX or (end < len(text) and text[end : end + 1] not in _BETWEEN):
        raise NodeError(errno.EINVAL)
    return -value if sign else value, end


def _skip_spaces(data: bytes, at: int) -> int:
    while at < len(data) and data[at] in _SPACES:
        at += 1
    return at


def ints(low: int = INT_MIN, high: int = INT_MAX, *, count: int = 1) -> Check:
    """proc_dointvec_minmax: at most ``count`` numbers; fewer leave the rest as it was, more are left untaken."""

    def check(_owner: Owner, current: bytes, data: bytes) -> Accepted:
        text = data[: PAGE_SIZE - 1]
        values = current.split()
        at = 0
        for index in range(count):
            at = _skip_spaces(text, at)
            if at == len(text):
                if index == 0:
                    raise NodeError(errno.EINVAL)
                break
            value, length = _number(text[at:])
            if not low <= value <= high:
                raise NodeError(errno.EINVAL)
            values[index : index + 1] = [b"%d" % value]
            at += length
        at = _skip_spaces(text, at)
        return Accepted(b"\t".join(values[:count]) + b"\n", len(data) - (len(text) - at))

    return check


def ulong(low: int = 0, high: int = ULONG_MAX) -> Check:
    """proc_doulongvec_minmax with one number."""

    def check(_owner: Owner, _current: bytes, data: bytes) -> Accepted:
        text = data[: PAGE_SIZE - 1]
        at = _skip_spaces(text, 0)
        if at == len(text):
            raise NodeError(errno.EINVAL)
        value, length = _number(text[at:])
        if text[at : at + 1] == b"-" or not low <= value <= high:
            raise NodeError(errno.EINVAL)
        at = _skip_spaces(text, at + length)
        return Accepted(b"%d\n" % value, len(data) - (len(text) - at))

    return check


def _line(data: bytes, length_max: int) -> bytes:
    """proc_dostring: up to a newline or NUL, cut to the length there is room for."""
    for end in (b"\n", b"\0"):
        data = data.partition(end)[0]
    return data[:length_max]


def string(length_max: int) -> Check:
    """proc_dostring of a table with ``maxlen`` one more than ``length_max``."""
    return lambda _owner, _current, data: Accepted(_line(data, length_max) + b"\n", len(data))


def word_of(allowed: Container[bytes], error: int) -> Check:
    """One of the words the kernel knows; any other fails with ``error``."""

    def check(_owner: Owner, _current: bytes, data: bytes) -> Accepted:
        word = _line(data, 15).strip()  # IFNAMSIZ
        if word not in allowed:
            raise NodeError(error)
        return Accepted(word + b"\n", len(data))

    return check


def parameter(high: int) -> Check:
    """kstrtouint, as module parameters take their value: one number and at most one newline."""

    def check(_owner: Owner, _current: bytes, data: bytes) -> Accepted:
        text = data[:-1] if data.endswith(b"\n") else data
        try:
            value, length = _number(text.removeprefix(b"+"))
        except NodeError:
            raise NodeError(errno.EINVAL) from None
        if length != len(text.removeprefix(b"+")) or not 0 <= value <= high:
            raise NodeError(errno.ERANGE if value > high else errno.EINVAL)
        return Accepted(b"%d\n" % value, len(data))

    return check


def ratchet(low: int, high: int) -> Check:
    """Like `ints`, but never lower than what it is (vm/memfd_noexec, kernel/yama/ptrace_scope at its maximum)."""
    plain = ints(low, high)

    def check(owner: Owner, current: bytes, data: bytes) -> Accepted:
        accepted = plain(owner, current, data)
        if int(accepted.value) < int(current):
            raise NodeError(errno.EPERM)
        return accepted

    return check


def group_range(owner: Owner, current: bytes, data: bytes) -> Accepted:
    """net/ipv4/ping_group_range: groups that the container has not are replaced by the nearest that it has.

    A virtual host has them all; the kernel refuses those without a mapping (ipv4_ping_group_range, EINVAL).
    """
    accepted = ints(INT_MIN, INT_MAX, count=2)(owner, current, data)
    low, high = (int(number) for number in accepted.value.split())
    if low < 0 or high < 0:
        raise NodeError(errno.EINVAL)
    return Accepted(b"%d\t%d\n" % (min(low, owner.groups - 1), min(high, owner.groups - 1)), accepted.taken)
