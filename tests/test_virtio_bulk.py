"""Hundreds of descriptors at once are what they are one by one: chains, windows, written pages."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.dma import DmaFault, DmaMemory
from devices.virtio.chain import Chain, RingError
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


class Endless:
    """Memory in which every range lies."""

    def window(self, address: int, length: int) -> memoryview:
        return memoryview(b"")

    def holds(self, addresses: object, lengths: object) -> bool:
        return True


@given(DESCRIPTORS, DESCRIPTORS, st.booleans())
def test_a_chain_is_the_same(
    first: list[tuple[int, int, int]], then: list[tuple[int, int, int]], endless: bool
) -> None:
    """Also what is wrong with it, and what comes behind descriptors that are there already."""

    def build(at_once: bool) -> tuple[object, ...]:
        chain = Chain(Endless() if endless else memory())  # type: ignore[arg-type]
        wrong = None
        try:
            for part in (first, then):
                if at_once:
                    addresses, lengths, writable = zip(*part, strict=True)
                    chain.add_all(addresses, lengths, writable)
                else:
                    for each in part:
                        chain.add(*each)
        except (RingError, DmaFault) as error:
            wrong = type(error), str(error)
        return wrong, chain.size, chain.room, chain._sources, chain._places

    assert build(True) == build(False)


@pytest.mark.parametrize("writable", [[0, F_WRITE, 0], [F_WRITE, 0, 0]])
def test_readable_ones_come_first(writable: list[int]) -> None:
    with pytest.raises(RingError, match="follows a writable one"):
        Chain(memory()).add_all([0, 0, 0], [1, 1, 1], writable)


def test_readable_ones_do_not_come_behind_others() -> None:
    chain = Chain(memory())
    chain.add(0, 1, F_WRITE)
    with pytest.raises(RingError, match="follows a writable one"):
        chain.add_all([0, 0], [1, 1], [0, F_WRITE])


def test_none_is_empty() -> None:
    with pytest.raises(RingError, match="no bytes"):
        Chain(memory()).add_all([0, PAGE], [1, 0], [0, 0])


def test_all_together_are_at_most_4_gib() -> None:
    chain = Chain(Endless())  # type: ignore[arg-type]
    with pytest.raises(RingError, match="4 GiB"):
        chain.add_all([0, 0], [0xFFFF_FFFF, 2], [0, F_WRITE])


@pytest.mark.parametrize(("address", "length"), [(LOW - 1, 2), (HIGH - 1, 2), (HIGH + LOW, 1)])
def test_all_lie_in_ram(address: int, length: int) -> None:
    for writable in (0, F_WRITE):
        with pytest.raises(DmaFault):
            Chain(memory()).add_all([0, address], [1, length], [writable, writable])


PARTS = st.tuples(st.sampled_from([0, 1, PAGE - 1, HIGH, HIGH + PAGE]), st.integers(0, 3 * PAGE))


@given(st.lists(PARTS) | st.lists(st.tuples(ADDRESSES, LENGTHS)))
def test_windows_and_written_pages_are_the_same(spans: list[tuple[int, int]]) -> None:
    told: list[tuple[int, int]] = []
    ram, singly = memory(told), memory(told)
    try:
        wanted = [singly.window(*span).nbytes for span in spans]
    except DmaFault:
        with pytest.raises(DmaFault):
            ram.windows(spans)
        return
    assert [view.nbytes for view in ram.windows(spans)] == wanted
    for number, view in enumerate(ram.windows(spans)):
        view[:] = bytes((number & 0xFF,)) * view.nbytes
        assert ram.read(*spans[number]) == view.tobytes()
    whole = [span for span in spans if span[1]]
    ram.mark_all(whole)
    ram.flush()
    at_once = told.copy()
    told.clear()
    for span in whole:
        singly.mark(*span)
    singly.flush()

    def pages(runs: list[tuple[int, int]]) -> set[int]:
        return {page for first, count in runs for page in range(first, first + count)}

    assert pages(at_once) == pages(told)
    assert sum(count for _, count in at_once) == len(pages(at_once)), "each once"


TABLE, QUEUE, AVAIL, USED, DATA = PAGE, 0, 2 * PAGE, 3 * PAGE, 4 * PAGE
DESC = struct.Struct("<QIHH")


def taken(table: list[tuple[int, int, int, int]]) -> Chain | None:
    """The chain of one indirect table."""
    ram = memory()
    for index, each in enumerate(table):
        ram.write(TABLE + 16 * index, DESC.pack(*each))
    ram.write(QUEUE, DESC.pack(TABLE, 16 * len(table), F_INDIRECT, 0))
    ram.write(AVAIL, struct.pack("<HHH", 0, 1, 0))
    state = QueueState(16, enabled=True, desc=QUEUE, driver=AVAIL, device=USED)
    return SplitRing(state, ram, indirect=True, event_idx=False).take()


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [0, 2, 1, 3], [0, 1, 3, 2]])
def test_an_indirect_table_is_followed_as_its_links_say(order: list[int]) -> None:
    table = [(0, 0, 0, 0)] * 4
    for number, at in enumerate(order):
        last = number == 3
        following = 0 if last else order[number + 1]
        table[at] = DATA + PAGE * number, 100 + number, F_WRITE | (0 if last else F_NEXT), following
    chain = taken(table)
    assert chain is not None
    assert chain.spans() == [(DATA + PAGE * n, 100 + n) for n in range(4)]


def test_a_chain_may_end_before_its_table() -> None:
    chain = taken([(DATA, 1, F_WRITE, 1), (DATA, 2, F_WRITE | F_NEXT, 2), (DATA, 3, F_WRITE, 0)])
    assert chain is not None
    assert chain.spans() == [(DATA, 1)]


def test_a_table_that_links_to_itself_is_refused() -> None:
    with pytest.raises(RingError, match="loops"):
        taken([(DATA, 1, F_WRITE | F_NEXT, 1), (DATA, 1, F_WRITE | F_NEXT, 0)])
