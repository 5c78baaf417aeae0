"""Many CPUs one after the other in one process: each gives back what it took."""

from __future__ import annotations

import ctypes

import pytest
from cpu_bench import Bench

_TABLE = 512 << 10


class _Heap(ctypes.Structure):
    """struct mallinfo2 of glibc 2.33 and later."""

    _fields_ = tuple((f"field{number}", ctypes.c_size_t) for number in range(10))


_MAPPED = "field4"  # hblkhd, after arena, ordblks, smblks and hblks


def bytes_outside_the_heap() -> int:
    """What malloc has in mappings of their own."""
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        pytest.skip("this C library does not tell how it allocates")
    mallinfo.restype = _Heap
    return int(getattr(mallinfo(), _MAPPED))


def test_the_engines_large_table_is_not_in_the_heap() -> None:
    # Each that is freed teaches glibc to put the next one into the heap, unless it is told not to;
    # and there it leaves a hole, which often no later one fits into.
    for _ in range(3):
        with Bench():
            pass
    before = bytes_outside_the_heap()
    with Bench():
        assert bytes_outside_the_heap() >= before + _TABLE
    assert bytes_outside_the_heap() == before
