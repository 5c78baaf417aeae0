"""System calls on pieces of memory: the host may do a part of one, or have none of it."""

from __future__ import annotations

import ctypes
import errno
import os
import tempfile
from array import array
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices import host_io
from devices.host_io import MOST_PIECES, Vector, address_of

DATA = bytes(n % 251 for n in range(300))
Call = Callable[[int, int, int, int], int]


@pytest.fixture
def file() -> Iterator[int]:
    with tempfile.TemporaryFile() as opened:
        yield opened.fileno()


MEMORY = bytearray(DATA)


def vector(lengths: list[int], memory: bytearray = MEMORY) -> Vector:
    view, at, views = memoryview(memory), 0, []
    for length in lengths:
        views.append(view[at : at + length])
        at += length
    return Vector.of(views)


def at_most(length: int) -> Call:
    """A pwritev that writes so much of the first piece."""
    real = host_io._libc.pwritev

    def pwritev(fd: int, address: int, count: int, offset: int) -> int:
        assert count
        first = array("Q", ctypes.string_at(address, 16))
        first[1] = min(first[1], length)
        done: int = real(fd, first.buffer_info()[0], 1, offset)
        return done

    return pwritev


@given(st.lists(st.integers(1, 60), min_size=1, max_size=5), st.integers(1, 70))
def test_a_write_in_parts(lengths: list[int], part: int) -> None:
    total = sum(lengths)
    with tempfile.TemporaryFile() as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_io, "_libc", SimpleNamespace(pwritev=at_most(part)))
        vector(lengths).write_all(file.fileno(), 3)
        assert os.pread(file.fileno(), 400, 0) == bytes(3) + DATA[:total]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=5), st.integers(0, 300))
def test_what_is_behind(lengths: list[int], skipped: int) -> None:
    total = sum(lengths)
    rest = vector(lengths).behind(min(skipped, total)).words
    pieces = [ctypes.string_at(*piece) for piece in zip(rest[::2], rest[1::2], strict=True)]
    assert b"".join(pieces) == DATA[:total][skipped:]
    assert all(pieces)


def test_a_host_that_writes_nothing(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_io, "_libc", SimpleNamespace(pwritev=at_most(0)))
    with pytest.raises(OSError, match="nothing could be written"):
        vector([10, 10]).write_all(file, 0)


def test_an_interrupted_call_is_made_again(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes, real = [errno.EINTR, errno.EINTR, 0], host_io._libc.pwritev

    def pwritev(*call: int) -> int:
        code = codes.pop(0)
        ctypes.set_errno(code)
        done: int = -1 if code else real(*call)
        return done

    monkeypatch.setattr(host_io, "_libc", SimpleNamespace(pwritev=pwritev))
    vector([10, 10]).write_all(file, 0)
    assert os.pread(file, 30, 0) == DATA[:20]
    assert not codes


def test_more_pieces_than_one_call_takes(file: int) -> None:
    memory = bytearray(2 * MOST_PIECES + 1)
    memory[:] = (DATA * 8)[: len(memory)]
    everything = vector([1] * len(memory), memory)
    everything.write_all(file, 0)
    assert os.pread(file, 4000, 0) == memory
    memory[:] = bytes(len(memory))
    assert everything.read(file, 7) == MOST_PIECES
    assert memory == (DATA * 8)[7 : 7 + MOST_PIECES] + bytes(MOST_PIECES + 1)


@pytest.mark.parametrize("call", [Vector.read, Vector.write_all])
def test_errors_have_their_number(call: Callable[[Vector, int, int], object]) -> None:
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)) as caught:
        call(vector([10]), -1, 0)
    assert caught.value.errno == errno.EBADF
    with tempfile.TemporaryFile() as file, pytest.raises(OSError) as caught:  # noqa: PT011
        call(Vector(array("Q", (8, 4096))), file.fileno(), -1)
    assert caught.value.errno == errno.EINVAL


def test_nothing_lies_nowhere() -> None:
    assert address_of(memoryview(bytearray())) == 0
    assert Vector.of([]).words == array("Q")
