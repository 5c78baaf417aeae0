"""Many ranges of guest memory at once.

A disk request of 1 MiB is some 250 ranges of a page each. Python's arrays slice, compare and copy
numbers without making an object of every one; so what is done 250 times is done in C.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from itertools import accumulate, chain

PAGE_SHIFT = 12


class Spans:
    """Ranges of guest-physical memory in an order of their own; none is empty.

    Attributes:
        words: address and length of each, in turn, 8 bytes both ("Q"): what `struct iovec` is for
            memory of the host.
    """

    __slots__ = ("_ends", "words")

    def __init__(self, words: array[int]) -> None:
        self.words = words
        self._ends: list[int] | None = None

    @classmethod
    def of(cls, pairs: Iterable[tuple[int, int]] = ()) -> Spans:
        """From (address, length) of each."""
        return cls(array("Q", chain.from_iterable(pairs)))

    def __len__(self) -> int:
        return len(self.words) // 2

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self.words[::2], self.words[1::2], strict=True)

    @property
    def ends(self) -> list[int]:
        """Up to which byte of all of them each reaches."""
        ends = self._ends
        if ends is None:
            ends = self._ends = list(accumulate(self.words[1::2]))
        return ends

    def cut(self, offset: int, length: int) -> Spans:
        """`length` bytes from byte `offset` on, or as many as there are."""
        ends = self.ends
        past = min(offset + length, ends[-1]) if ends else 0
        if past <= offset:
            return Spans.of()
        first, last = bisect_right(ends, offset), bisect_left(ends, past)
        words = self.words[2 * first : 2 * last + 2]
        words[-1] -= ends[last] - past
        skipped = offset - (ends[first - 1] if first else 0)
        words[0] += skipped
        words[1] -= skipped
        return Spans(words)

    def pages(self) -> list[tuple[int, int]]:
        """The pages that they touch, as runs: first page, first page behind; there is one range.

        In order; runs may overlap or meet.
        """
        lengths = self.words[1::2]
        size = lengths[0]
        if lengths != array("Q", [size]) * len(lengths):
            return sorted(
                (address >> PAGE_SHIFT, _page_behind(address + length)) for address, length in self
            )
        runs = []
        starts = sorted(self.words[::2])
        first = last = starts[0]
        for start in starts:
            if start - last > size:
                runs.append((first >> PAGE_SHIFT, _page_behind(last + size)))
                first = start
            last = start
        runs.append((first >> PAGE_SHIFT, _page_behind(last + size)))
        return runs


def _page_behind(end: int) -> int:
    return (end - 1 >> PAGE_SHIFT) + 1
