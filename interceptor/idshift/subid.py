"""Subordinate ID ranges: which are ours by ``/etc/subuid`` and ``/etc/subgid``, and which of them is free. Pure.

Source: subuid(5).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from interceptor.errors import ContainerError

#: The largest ID that can be mapped; 2^32 - 1 means "no change" to chown(2).
ID_MAX = 2**32 - 2


class Block(NamedTuple):
    """IDs ``first`` to ``first + size - 1`` of the host."""

    first: int
    size: int

    @property
    def end(self) -> int:
        """One past the last."""
        return self.first + self.size

    def overlaps(self, other: Block) -> bool:
        """Whether an ID is in both."""
        return self.first < other.end and other.first < self.end


def parse(text: str, users: Iterable[str]) -> list[Block]:
    """The ranges of any of ``users`` (a name, or a number in decimal) in the text of subuid(5), in its order.

    Lines that make no sense are left out, as by newuidmap(1).
    """
    wanted = set(users)
    found = []
    for line in text.splitlines():
        fields = line.strip().split(":")
        if len(fields) != 3 or fields[0] not in wanted:
            continue
        if not (fields[1].isdecimal() and fields[2].isdecimal()):
            continue
        block = Block(int(fields[1]), int(fields[2]))
        if block.first > 0 and block.size > 0 and block.end - 1 <= ID_MAX:
            found.append(block)
    return found


def allocate(ranges: Sequence[Block], taken: Iterable[Block], size: int) -> Block | None:
    """The first block of ``size`` IDs within one of ``ranges`` that overlaps none of ``taken``; None: exhausted."""
    used = sorted(taken)
    for whole in ranges:
        start = whole.first
        for block in used:
            if block.overlaps(Block(start, size)):
                start = block.end
        if start + size <= whole.end:
            return Block(start, size)
    return None


def require(file: str, user: str, ranges: Sequence[Block], taken: Sequence[Block], size: int) -> Block:
    """`allocate`, or the error that says what an administrator has to do. Raises `ContainerError`."""
    block = allocate(ranges, taken, size)
    if block is not None:
        return block
    if not ranges:
        raise ContainerError(
            f"{file}: no range of IDs for the user {user!r}",
            f"append a line, for ten containers for example: {user}:1000000:{10 * size}",
        )
    held = sum(1 for one in taken if any(one.overlaps(whole) for whole in ranges))
    raise ContainerError(
        f"{file}: the ranges of {user!r} are exhausted: {held} containers hold {size} IDs each",
        f"give {user} a longer range, or remove containers that are no longer needed",
    )
