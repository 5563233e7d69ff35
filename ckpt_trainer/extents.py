"""Which parts of a line of bytes are free, and who has the others: best fit, neighbours merged, in units of 4096 bytes.

What the bytes are, memory or a file, is the caller's.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Sequence

UNIT = 4096

Part = tuple[int, int]  # offset and length


def rounded_up(length: int) -> int:
    """The smallest multiple of `UNIT` that is no less."""
    return -(-length // UNIT) * UNIT


class Extents:
    """The free parts of a line. Lengths are rounded up, when taken and when given back. For one thread at a time.

    Args:
        length: Bytes of the line, a multiple of `UNIT`; all of them are free.

    Attributes:
        length: Bytes of the line.
        free: Bytes of it that nobody has.
    """

    def __init__(self, length: int = 0) -> None:
        self.length = 0
        self.free = 0
        self._offsets: list[int] = []  # of the free parts, sorted
        self._lengths: dict[int, int] = {}  # of the free parts, by offset
        self._sizes: list[Part] = []  # the free parts as (length, offset), sorted
        if length:
            self.grow(length)

    def grow(self, by: int) -> None:
        """The line is longer by this, at its end, and what came is free."""
        assert by % UNIT == 0, f"a line grows by units of {UNIT} bytes, not by {by}"
        self.length += by
        self.give_back(self.length - by, by)

    def take(self, length: int) -> int | None:
        """The offset of a part of this length, cut from the smallest free part that holds it; None if none does."""
        length = rounded_up(length)
        assert length > 0, "nothing to take"
        at = bisect_left(self._sizes, (length, 0))
        return self._cut(at, length) if at < len(self._sizes) else None

    def take_largest(self, at_most: int) -> Part | None:
        """Offset and length of the largest free part, cut to `at_most`; None if nothing is free."""
        assert at_most > 0, "nothing to take"
        if not self._sizes:
            return None
        length = min(self._sizes[-1][0], rounded_up(at_most))
        return self._cut(len(self._sizes) - 1, length), length

    def take_parts(self, length: int) -> list[Part] | None:
        """One part of this length where one is free, else as few as there can be; None if less is free in all."""
        left = rounded_up(length)
        if left > self.free:
            return None
        parts: list[Part] = []
        while left:
            offset = self.take(left)
            part = self.take_largest(left) if offset is None else (offset, left)
            assert part is not None, "more is free than there are free parts"
            parts.append(part)
            left -= part[1]
        return parts

    def give_back(self, offset: int, length: int) -> None:
        """What was taken is free again."""
        start, end = offset, offset + rounded_up(length)
        after = bisect_right(self._offsets, start)
        before = self._offsets[after - 1] if after else None
        following = self._offsets[after] if after < len(self._offsets) else self.length
        assert 0 <= start < end <= following, f"bytes {start} to {end} are free already, or not of this line"
        assert before is None or before + self._lengths[before] <= start, f"bytes {start} to {end} are free already"
        self.free += end - start
        if end in self._lengths:
            end += self._remove(end)
        if before is not None and before + self._lengths[before] == start:
            self._remove(before)
            start = before
        self._add(start, end - start)

    def _cut(self, at: int, length: int) -> int:
        """Take the start of the free part that is `at` in the order of sizes."""
        offset = self._sizes[at][1]
        whole = self._remove(offset)
        if whole > length:
            self._add(offset + length, whole - length)
        self.free -= length
        return offset

    def _add(self, offset: int, length: int) -> None:
        insort(self._offsets, offset)
        insort(self._sizes, (length, offset))
        self._lengths[offset] = length

    def _remove(self, offset: int) -> int:
        length = self._lengths.pop(offset)
        del self._offsets[bisect_left(self._offsets, offset)]
        del self._sizes[bisect_left(self._sizes, (length, offset))]
        return length


class Taken:
    """Parts that one owner has. They go to `returned` once: when they are given back, or when the owner is collected.

    Giving back does no more than append to a deque, which the owner of the line drains when it takes the next parts. So
    it is safe in any thread, and in a finaliser that runs in the middle of taking.
    """

    __slots__ = ("__weakref__", "_parts", "_returned")

    def __init__(self, parts: Sequence[Part], returned: deque[Part]) -> None:
        self._parts = list(parts)
        self._returned = returned

    def give_back(self) -> None:
        """Give the parts back, unless that was done."""
        # Popping is what makes two threads that give back at once share the parts, not double them.
        while self._parts:
            try:
                self._returned.append(self._parts.pop())
            except IndexError:
                return

    def __del__(self) -> None:
        self.give_back()


def drain(returned: deque[Part], extents: Extents) -> None:
    """Free what `Taken` gave back so far."""
    while returned:
        extents.give_back(*returned.popleft())
