"""A disk serves requests of many descriptors at once as it does them one by one, whatever they are.

The same driver against two disks: one makes a long chain of every table that it can, one of none.
"""

from __future__ import annotations

import fcntl
import os
import struct
from dataclasses import dataclass
from typing import Any

import pytest
from granted_rig import GrantedRig
from hypothesis import given, settings
from hypothesis import strategies as st
from virtio_driver import (
    BUFFERS,
    F_EVENT_IDX,
    F_INDIRECT,
    F_PACKED,
    F_VERSION_1,
    INDIRECT,
    RAM_SIZE,
    RING_AREA,
    WRITE,
    Driver,
    LocalRig,
)

from devices.virtio import packed, queue
from devices.virtio.blk import (
    F_DISCARD,
    F_FLUSH,
    F_WRITE_ZEROES,
    S_OK,
    SECTOR,
    T_DISCARD,
    T_FLUSH,
    T_GET_ID,
    T_IN,
    T_OUT,
    T_WRITE_ZEROES,
    Blk,
)
from devices.virtio.long_chain import LongChain

SECTORS = 64
TABLE = RING_AREA + 0x8_0000
PAGE = 4096
ALWAYS, NEVER = 1, 1 << 16
SHAPES = ["anywhere", "in a row", "backwards", "at the end"] * 5 + ["outside"]


@dataclass
class Ask:
    """One request: what the driver writes, how long the room is, and where the pieces of it are."""

    kind: int
    sector: int
    data: bytes
    room: int
    cuts: list[int]
    places: list[int]
    shape: str

    @property
    def text(self) -> bytes:
        return struct.pack("<IIQ", self.kind, 0, self.sector) + self.data

    def parts(self) -> list[tuple[int, int, int]]:
        """(address, length, flags) of each descriptor; pieces may lie over each other."""
        lengths = [(n, 0) for n in pieces(len(self.text), self.cuts)]
        lengths += [(n, WRITE) for n in pieces(self.room, self.cuts)]
        parts, at = [], BUFFERS + self.places[0]
        for number, (length, flags) in enumerate(lengths):
            if self.shape == "anywhere":
                at = BUFFERS + self.places[number % len(self.places)]
            elif self.shape == "backwards":
                at = BUFFERS + 0x8_0000 - PAGE * number
            elif self.shape == "at the end":
                at = RAM_SIZE - length
            elif self.shape == "outside" and number == len(lengths) // 2:
                at = RAM_SIZE - length + 1
            parts.append((at, length, flags))
            at += length
        return parts


def pieces(total: int, cuts: list[int]) -> list[int]:
    """Lengths that make `total`, by turns those of `cuts`."""
    found: list[int] = []
    while total:
        part = min(cuts[len(found) % len(cuts)], total) if len(found) < 200 else total
        found.append(part)
        total -= part
    return found


def segments(draw: st.DrawFn, kind: int) -> bytes:
    one = st.tuples(st.integers(0, SECTORS), st.integers(0, 9), st.sampled_from([0, 0, 1, 2]))
    most = 17 if kind == T_DISCARD else 2
    return b"".join(
        struct.pack("<QII", *each) for each in draw(st.lists(one, min_size=1, max_size=most))
    )


@st.composite
def asks(draw: st.DrawFn) -> Ask:
    kinds = [T_IN, T_OUT] * 4 + [T_FLUSH, T_GET_ID, T_DISCARD, T_WRITE_ZEROES, 99]
    kind = draw(st.sampled_from(kinds))
    length = draw(st.integers(0, 24)) * SECTOR + draw(st.sampled_from([0] * 9 + [1]))
    data = draw(st.binary(min_size=1, max_size=5))
    return Ask(
        kind,
        draw(st.integers(0, SECTORS + 1)),
        segments(draw, kind)
        if kind in (T_DISCARD, T_WRITE_ZEROES)
        else (data * length)[:length] * (kind != T_IN),
        1 + (length if kind == T_IN else draw(st.sampled_from([0, 0, 7, 19, 20, 40]))),
        draw(st.lists(st.sampled_from([1, 16, 100, SECTOR, 600, PAGE]), min_size=1, max_size=4)),
        draw(st.lists(st.integers(0, 5 * PAGE), min_size=1, max_size=8)),
        draw(st.sampled_from(SHAPES)),
    )


@dataclass
class Setting:
    rig: type[LocalRig]
    features: int
    options: dict[str, Any]
    size: int
    """Of the file when the requests come, in bytes."""
    seals: int


@st.composite
def sets(draw: st.DrawFn) -> Setting:
    readonly = draw(st.sampled_from([False, False, False, True]))
    features = draw(st.sampled_from([0, F_PACKED])) | draw(st.sampled_from([0, F_EVENT_IDX]))
    features |= draw(st.sampled_from([0, F_FLUSH]))
    features |= 0 if readonly else F_DISCARD | F_WRITE_ZEROES
    return Setting(
        draw(st.sampled_from([LocalRig, LocalRig, GrantedRig])),
        features,
        {"readonly": readonly, "direct": draw(st.sampled_from([False, False, True]))},
        draw(st.sampled_from([SECTORS * SECTOR] * 3 + [20 * SECTOR, 20 * SECTOR + 100, 0])),
        draw(st.sampled_from([0, 0, 0, fcntl.F_SEAL_GROW, fcntl.F_SEAL_WRITE])),
    )


def play(setting: Setting, requests: list[Ask], least: int) -> list[Any]:
    """All that can be seen of it, by the guest and by the host."""
    story: list[Any] = []
    fd = os.memfd_create("disk", os.MFD_ALLOW_SEALING)
    try:
        os.truncate(fd, SECTORS * SECTOR)
        os.pwrite(fd, bytes(n % 251 for n in range(SECTORS * SECTOR)), 0)
        rig = setting.rig(Blk, {"path": "disk", **setting.options}, {"path": fd})
        os.truncate(fd, setting.size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, setting.seals)
        with pytest.MonkeyPatch.context() as patch:
            for module in (queue, packed):
                patch.setattr(module, "LONG", least)
            driver = Driver(rig)
            driver.start(F_VERSION_1 | F_INDIRECT | setting.features, 256)
            for ask in requests:
                story.append(one(driver, ask))
        story.append((bytes(rig.ram), os.pread(fd, 1 << 20, 0), rig.logs))
        rig.device.close()
    finally:
        os.close(fd)
    return story


def one(driver: Driver, ask: Ask) -> Any:
    ring, parts, text = driver.queues[0], ask.parts(), ask.text
    left = len(text)
    for place, length, flags in reversed(parts):  # what comes first matters most: the header
        if not flags:
            left -= length
            end = min(place + length, RAM_SIZE)
            driver.ram[place:end] = text[left : left + end - place]
    table = ring.table(parts)
    driver.ram[TABLE : TABLE + len(table)] = table
    driver.rig.host.forget()  # type: ignore[attr-defined]
    wrote = getattr(driver.rig, "wrote", [])
    wrote.clear()
    token = ring.offer([(TABLE, len(table), INDIRECT)])
    ring.kick()
    driver.rig.settle()
    calls = driver.rig.host.calls  # type: ignore[attr-defined]
    runs = [call[1:] for call in calls if call[0] == "wrote_pages"] + wrote
    pages = {page for first, count in runs for page in range(first, first + count)}
    used = ring.used()
    assert used is None or used[0] == token
    return used, driver.status, pages, [call for call in calls if call[0] != "wrote_pages"]


@settings(deadline=None, max_examples=150)
@given(setting=sets(), requests=st.lists(asks(), min_size=1, max_size=6))
def test_a_disk_is_the_same_short_and_long(setting: Setting, requests: list[Ask]) -> None:
    for number, (long, short) in enumerate(
        zip(play(setting, requests, ALWAYS), play(setting, requests, NEVER), strict=True)
    ):
        assert long == short, f"request {number}"


@pytest.mark.parametrize("features", [0, F_PACKED])
def test_these_are_long_chains(features: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above compares two ways, not one with itself."""
    made = []
    make = LongChain.make
    monkeypatch.setattr(LongChain, "make", lambda *all: made.append(make(*all)) or made[-1])
    ask = Ask(T_IN, 3, b"", 8 * SECTOR + 1, [100], [0], "in a row")
    setting = Setting(LocalRig, features, {}, SECTORS * SECTOR, 0)
    (used, _, pages, _), (ram, image, _) = play(setting, [ask], ALWAYS)
    assert [type(each) for each in made] == [LongChain]
    assert used[1] == 8 * SECTOR + 1
    assert BUFFERS // PAGE in pages
    start = BUFFERS + 16
    assert ram[start : start + 8 * SECTOR + 1] == image[3 * SECTOR : 11 * SECTOR] + bytes([S_OK])
    play(setting, [ask], NEVER)
    assert len(made) == 1
