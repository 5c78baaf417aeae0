"""Hundreds of descriptors at once are what they are one by one: chains, windows, written pages."""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.dma import DmaFault, DmaMemory
from devices.spans import Spans
from devices.virtio import packed as packed_module
from devices.virtio import queue
from devices.virtio.chain import Chain, RingError
from devices.virtio.long_chain import LONG, LongChain
from devices.virtio.packed import PackedRing
from devices.virtio.queue import SplitRing
from devices.virtio.ring import F_INDIRECT, F_NEXT, F_WRITE, QueueState

PAGE = 4096
LOW, HIGH = 8 * PAGE, 64 * PAGE
"""RAM is [0, LOW) and [HIGH, HIGH + LOW)."""


def memory(told: list[tuple[int, int]] | None = None) -> DmaMemory:
    found = DmaMemory((told if told is not None else []).extend)
    found.map([(0, memoryview(bytearray(LOW))), (HIGH, memoryview(bytearray(LOW)))])
    return found


ADDRESSES = st.sampled_from([0, 1, PAGE, LOW - PAGE, LOW - 1, LOW, HIGH - 1, HIGH, HIGH + PAGE])
LENGTHS = st.sampled_from([0, 1, 2, PAGE - 1, PAGE, 3 * PAGE, HIGH, 0xFFFF_FFFF])
DESCRIPTORS = st.lists(st.tuples(ADDRESSES, LENGTHS, st.sampled_from([0, F_WRITE])), min_size=1)


class Endless(DmaMemory):
    """Memory in which every range lies."""

    def __init__(self) -> None:
        super().__init__(lambda runs: None)

    def window(self, address: int, length: int) -> memoryview:
        return memoryview(b"")

    def host(self, spans: Spans) -> int | None:
        return None if 0 in spans.words[1::2] else 0


def long(ram: DmaMemory, descriptors: list[tuple[int, int, int]]) -> LongChain | None:
    """As a ring makes it of these, which has seen to the order."""
    readable = sum(not writable for _, _, writable in descriptors)
    return LongChain.make(ram, 7, Spans.of(each[:2] for each in descriptors), readable)


@given(DESCRIPTORS, st.booleans())
def test_a_long_chain_is_what_the_same_one_by_one_is(
    descriptors: list[tuple[int, int, int]], endless: bool
) -> None:
    """There is none of what breaks a rule."""
    descriptors.sort(key=lambda each: each[2])
    ram = Endless() if endless else memory()
    singly = Chain(ram, 7)
    found = long(ram, descriptors)
    try:
        for each in descriptors:
            singly.add(*each)
    except (RingError, DmaFault):
        assert found is None
        return
    if found is not None:
        assert (found.id, found.size, found.room) == (7, singly.size, singly.room)
        assert found.spans() == singly.spans()


def test_there_is_a_long_chain() -> None:
    assert long(memory(), [(0, 16, 0), (PAGE, PAGE, F_WRITE), (HIGH - 1, 1, F_WRITE)]) is None
    assert long(memory(), [(0, 16, 0), (PAGE, PAGE, F_WRITE), (LOW - PAGE, 1, F_WRITE)]) is not None


def test_all_together_are_at_most_4_gib() -> None:
    assert long(Endless(), [(0, 0xFFFF_FFFF, 0), (0, 1, F_WRITE)]) is not None
    assert long(Endless(), [(0, 0xFFFF_FFFF, 0), (0, 2, F_WRITE)]) is None


@pytest.mark.parametrize(("address", "length"), [(LOW - 1, 2), (HIGH - 1, 2), (HIGH + LOW, 1)])
def test_all_lie_in_ram(address: int, length: int) -> None:
    for writable in (0, F_WRITE):
        assert long(memory(), [(0, 1, writable), (address, length, writable)]) is None


def test_it_takes_no_more() -> None:
    found = long(memory(), [(0, 1, 0)])
    assert found is not None
    with pytest.raises(TypeError):
        found.add(0, 1, 0)


SIZES = st.lists(st.integers(1, 3 * PAGE), min_size=1, max_size=6)


def laid_out(sizes: list[int], writable: int) -> list[tuple[int, int, int]]:
    """Descriptors of these sizes, the last one first in RAM."""
    places, at = [], 0
    for size in reversed(sizes):
        places.append((at, size, writable))
        at += size
    return places[::-1]


@given(SIZES, st.lists(st.integers(0, 4 * PAGE), max_size=4))
def test_reading_it(sizes: list[int], parts: list[int]) -> None:
    ram = DmaMemory(lambda runs: None)
    ram.map([(0, memoryview(bytearray(n % 251 for n in range(18 * PAGE + 1))))])
    singly, found = Chain(ram), long(ram, laid_out(sizes, 0))
    assert found is not None
    for each in laid_out(sizes, 0):
        singly.add(*each)
    for part in parts:
        assert found.read(part) == singly.read(part)
        assert found.size == singly.size
    with tempfile.TemporaryFile() as file:
        left = found.size
        found.pwrite_all(file.fileno(), 3)
        assert os.pread(file.fileno(), left + 1, 3) == singly.read()
    assert found.size == 0


@given(SIZES, st.lists(st.integers(0, 4 * PAGE), max_size=4), st.booleans())
def test_writing_to_it(sizes: list[int], parts: list[int], header: bool) -> None:
    """From a file, by copies, at places further on; and what is told of it."""
    results = []
    with tempfile.TemporaryFile() as file:
        file.write(bytes(n % 241 for n in range(16 * PAGE)))
        file.flush()
        for kind in (Chain, LongChain):
            told: list[tuple[int, int]] = []
            ram = DmaMemory(told.extend)
            ram.map([(0, memoryview(bytearray(24 * PAGE)))])
            descriptors = [(19 * PAGE, 16, 0)] * header + laid_out(sizes, F_WRITE)
            chain = Chain(ram) if kind is Chain else long(ram, descriptors)
            assert chain is not None
            if kind is Chain:
                for each in descriptors:
                    chain.add(*each)
            chain.read()
            for number, wanted in enumerate(parts):
                part = min(wanted, chain.room - chain.written)
                if number % 2:
                    chain.write(bytes((number,)) * part)
                elif part:
                    chain.wrote(chain.preadv(file.fileno(), part, number * 100))
            if chain.room - chain.written:
                chain.write_at(chain.room - 1, b"e")
            views = [bytes(view) for view in chain.places(0, chain.room)]
            ram.flush()
            pages = {page for first, count in told for page in range(first, first + count)}
            assert sum(count for _, count in told) == len(pages), "each once"
            results.append((ram.read(0, 20 * PAGE), chain.written, views, pages))
    assert results[0] == results[1]


def test_memory_behind_a_gap() -> None:
    """Where that lies in this process is another matter than for what lies before it."""
    low, high = bytearray(LOW), bytearray(n % 251 for n in range(LOW))
    ram = DmaMemory(lambda runs: None)
    ram.map([(0, memoryview(low)), (HIGH, memoryview(high))])
    source = long(ram, [(HIGH + 5, 100, 0), (HIGH + PAGE, 7, 0)])
    target = long(ram, [(HIGH + LOW - 107, 107, F_WRITE)])
    assert source is not None
    assert target is not None
    with tempfile.TemporaryFile() as file:
        source.pwrite_all(file.fileno(), 0)
        wanted = os.pread(file.fileno(), 200, 0)
        assert target.preadv(file.fileno(), 107, 0) == 107
    assert wanted == high[5:105] + high[PAGE : PAGE + 7]
    assert high[-107:] == wanted
    assert low == bytes(LOW)


PARTS = st.tuples(st.sampled_from([0, 1, PAGE - 1, HIGH, HIGH + PAGE]), st.integers(1, 3 * PAGE))


@given(st.lists(PARTS, min_size=1) | st.lists(st.tuples(ADDRESSES, LENGTHS), min_size=1))
def test_pages_of_ranges(spans: list[tuple[int, int]]) -> None:
    spans = [span for span in spans if span[1]] or [(0, 1)]
    pages = {p for a, n in spans for p in range(a // PAGE, (a + n - 1) // PAGE + 1) if p < 1 << 16}
    found = {p for a, b in Spans.of(spans).pages() for p in range(a, min(b, 1 << 16))}
    assert found == pages


def test_pages_that_follow_each_other_are_one_run() -> None:
    """In any order: Linux has them backwards."""
    spans = Spans.of((PAGE * n, PAGE) for n in (9, 8, 7, 3, 2, 20))
    assert spans.pages() == [(2, 4), (7, 10), (20, 21)]


@given(st.lists(st.tuples(ADDRESSES, st.sampled_from([1, 2, PAGE, 3 * PAGE]))), st.data())
def test_a_part_of_ranges(spans: list[tuple[int, int]], data: st.DataObject) -> None:
    offset = data.draw(st.integers(0, 5 * PAGE))
    length = data.draw(st.integers(0, 5 * PAGE))
    singly = [a + n for a, size in spans for n in range(size)][offset : offset + length]
    cut = Spans.of(spans).cut(offset, length)
    assert [a + n for a, size in cut for n in range(size)] == singly
    assert all(size for _, size in cut)


@given(st.lists(st.tuples(ADDRESSES, LENGTHS)))
def test_windows_are_the_same(spans: list[tuple[int, int]]) -> None:
    ram = memory()
    try:
        wanted = [ram.window(*span).nbytes for span in spans]
    except DmaFault:
        with pytest.raises(DmaFault):
            ram.windows(spans)
        return
    assert [view.nbytes for view in ram.windows(spans)] == wanted


TABLE, QUEUE, AVAIL, USED, DATA = PAGE, 0, 2 * PAGE, 3 * PAGE, 4 * PAGE
SPLIT, PACKED = struct.Struct("<QIHH"), struct.Struct("<QIHH")
SIZE = 32
Table = list[tuple[int, int, int, int]]
"""Of each descriptor: address, length, flags, next."""


def split(table: Table) -> Chain | None:
    """The chain of one indirect table in a split ring."""
    ram = memory()
    for index, each in enumerate(table):
        ram.write(TABLE + 16 * index, SPLIT.pack(*each))
    ram.write(QUEUE, SPLIT.pack(TABLE, 16 * len(table), F_INDIRECT, 0))
    ram.write(AVAIL, struct.pack("<HHH", 0, 1, 0))
    state = QueueState(SIZE, enabled=True, desc=QUEUE, driver=AVAIL, device=USED)
    return SplitRing(state, ram, indirect=True, event_idx=False).take()


def packed(table: Table) -> Chain | None:
    """The same in a packed ring, where the order of the table counts."""
    ram = memory()
    for index, (address, length, flags, id) in enumerate(table):
        ram.write(TABLE + 16 * index, PACKED.pack(address, length, id, flags))
    ram.write(QUEUE, PACKED.pack(TABLE, 16 * len(table), 5, F_INDIRECT | 1 << 7))
    state = QueueState(SIZE, enabled=True, desc=QUEUE, driver=AVAIL, device=USED)
    return PackedRing(state, ram, indirect=True, event_idx=False).take()


TAKES = pytest.mark.parametrize("take", [split, packed])


@pytest.fixture(params=[True, False], ids=["long", "short"])
def is_long(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether a table of any length becomes a long chain, where it can, or none does."""
    for module in (queue, packed_module):
        monkeypatch.setattr(module, "LONG", 1 if request.param else SIZE + 1)
    return bool(request.param)


def what(take: Callable[[Table], Chain | None], table: Table) -> object:
    try:
        chain = take(table)
    except (RingError, DmaFault) as error:
        return str(error)
    assert chain is not None
    read = [view.nbytes for view in chain.sources()]
    return chain.id, chain.count, read, chain.room, chain.spans()


@st.composite
def tables(draw: st.DrawFn) -> Table:
    """Mostly in order and right, sometimes not."""
    count = draw(st.integers(1, 8))
    readable = draw(st.integers(0, count))
    table = []
    for n in range(count):
        flags = (F_NEXT if n < count - 1 else 0) | (F_WRITE if n >= readable else 0)
        flags ^= draw(st.sampled_from([0] * 30 + [F_NEXT, F_WRITE, F_INDIRECT, 8]))
        following = n + 1 if draw(st.integers(0, 20)) else draw(st.integers(0, count))
        place = draw(st.sampled_from([(DATA + 64 * n, 64)] * 30 + [(LOW - 1, 2), (DATA, 0)]))
        table.append((*place, flags, following))
    return table


@TAKES
@given(table=tables())
def test_a_table_is_the_same_short_and_long(
    take: Callable[[Table], Chain | None], table: Table
) -> None:
    results = []
    for least in (1, SIZE + 1):
        with pytest.MonkeyPatch.context() as patch:
            for module in (queue, packed_module):
                patch.setattr(module, "LONG", least)
            results.append(what(take, table))
    assert results[0] == results[1]


@TAKES
def test_a_table_becomes_a_long_chain_from_some_length_on(
    take: Callable[[Table], Chain | None],
) -> None:
    for count in (LONG - 1, LONG):
        last = count - 1
        flags = [F_NEXT, *[F_NEXT | F_WRITE] * (count - 2), F_WRITE]
        chain = take([(DATA + 64 * n, 64, flags[n], n + 1) for n in range(count)])
        assert isinstance(chain, LongChain) == (count == LONG)
        assert chain is not None
        assert (chain.size, chain.room) == (64, 64 * last)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [0, 2, 1, 3], [0, 1, 3, 2]])
def test_an_indirect_table_is_followed_as_its_links_say(order: list[int], is_long: bool) -> None:
    table = [(0, 0, 0, 0)] * 4
    for number, at in enumerate(order):
        last = number == 3
        following = 0 if last else order[number + 1]
        table[at] = DATA + PAGE * number, 100 + number, F_WRITE | (0 if last else F_NEXT), following
    chain = split(table)
    assert chain is not None
    assert isinstance(chain, LongChain) == (is_long and order == [0, 1, 2, 3])
    assert chain.spans() == [(DATA + PAGE * n, 100 + n) for n in range(4)]


@pytest.mark.usefixtures("is_long")
def test_a_chain_may_end_before_its_table() -> None:
    chain = split([(DATA, 1, F_WRITE, 1), (DATA, 2, F_WRITE | F_NEXT, 2), (DATA, 3, F_WRITE, 0)])
    assert chain is not None
    assert chain.spans() == [(DATA, 1)]


@pytest.mark.usefixtures("is_long")
def test_a_table_that_links_to_itself_is_refused() -> None:
    with pytest.raises(RingError, match="loops"):
        split([(DATA, 1, F_WRITE | F_NEXT, 1), (DATA, 1, F_WRITE | F_NEXT, 0)])


@TAKES
@pytest.mark.usefixtures("is_long")
def test_a_table_is_no_longer_than_the_queue(take: Callable[[Table], Chain | None]) -> None:
    for count in (SIZE, SIZE + 1):
        table = [(DATA, 1, F_NEXT, n + 1) for n in range(count - 1)] + [(DATA, 1, F_WRITE, 0)]
        if count == SIZE:
            assert take(table) is not None
        else:
            with pytest.raises(RingError, match="longer than the queue"):
                take(table)


@TAKES
@pytest.mark.usefixtures("is_long")
def test_readable_ones_come_first(take: Callable[[Table], Chain | None]) -> None:
    with pytest.raises(RingError, match="follows a writable one"):
        take([(DATA, 1, F_NEXT, 1), (DATA, 1, F_WRITE | F_NEXT, 2), (DATA, 1, 0, 3)])


@TAKES
@pytest.mark.usefixtures("is_long")
def test_none_is_empty(take: Callable[[Table], Chain | None]) -> None:
    with pytest.raises(RingError, match="no bytes"):
        take([(DATA, 1, F_NEXT, 1), (DATA, 0, F_WRITE, 2)])


@pytest.mark.usefixtures("is_long")
def test_what_stands_before_a_table_belongs_to_the_chain() -> None:
    """2.7.5.3.2: a chain may end in an indirect descriptor."""
    ram = memory()
    for index in range(2):
        ram.write(TABLE + 16 * index, SPLIT.pack(DATA, 5, F_WRITE | (1 - index), 1))
    ram.write(QUEUE, SPLIT.pack(DATA, 3, F_NEXT, 1))
    ram.write(QUEUE + 16, SPLIT.pack(TABLE, 32, F_INDIRECT, 0))
    ram.write(AVAIL, struct.pack("<HHH", 0, 1, 0))
    state = QueueState(SIZE, enabled=True, desc=QUEUE, driver=AVAIL, device=USED)
    chain = SplitRing(state, ram, indirect=True, event_idx=False).take()
    assert chain is not None
    assert (chain.size, chain.room) == (3, 10)
