"""The virtio disk by the rules of virtio 1.2, section 5.2, and against a model of a disk."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from virtio_driver import (
    F_EVENT_IDX,
    F_INDIRECT,
    F_PACKED,
    F_VERSION_1,
    NEEDS_RESET,
    WRITE,
    Driver,
    LocalRig,
    Request,
)

from devices import host_io
from devices.errors import DeviceError, UserError
from devices.registry import parse_options
from devices.virtio import blk
from devices.virtio.blk import (
    F_BLK_SIZE,
    F_DISCARD,
    F_FLUSH,
    F_MQ,
    F_RO,
    F_WRITE_ZEROES,
    S_IOERR,
    S_OK,
    S_UNSUPP,
    SECTOR,
    T_DISCARD,
    T_FLUSH,
    T_GET_ID,
    T_IN,
    T_OUT,
    T_WRITE_ZEROES,
    Blk,
)

SECTORS = 256
FORMATS = [0, F_PACKED, F_EVENT_IDX, F_PACKED | F_EVENT_IDX]


class Disk:
    """A driver of a disk whose image is a memfd."""

    def __init__(self, size: int = SECTORS * SECTOR, features: int = 0, **options: Any) -> None:
        self.fd = os.memfd_create("disk", os.MFD_ALLOW_SEALING)
        os.truncate(self.fd, size)
        self.rig = LocalRig(Blk, {"path": "disk", **options}, {"path": self.fd})
        self.driver = Driver(self.rig)
        self.features = F_VERSION_1 | F_INDIRECT | F_FLUSH | features

    def start(self, features: int | None = None, size: int = 64) -> None:
        self.driver.start(self.features if features is None else features, size)

    def send(
        self,
        kind: int,
        sector: int = 0,
        data: bytes = b"",
        into: int = 0,
        queue: int = 0,
        **how: Any,
    ) -> Request:
        out = [struct.pack("<IIQ", kind, 0, sector), *([data] if data else [])]
        return self.driver.queues[queue].send(out, [*([into] if into else []), 1], **how)

    def finish(self, queue: int = 0) -> list[Request]:
        self.rig.settle()
        return self.driver.queues[queue].collect()

    def ask(self, *request: Any, queue: int = 0, **how: Any) -> tuple[int, bytes]:
        """Status and data of one request."""
        sent = self.send(*request, queue=queue, **how)
        assert self.finish(queue) == [sent]
        data = sent.data(self.rig.ram)
        return data[-1], data[:-1]

    def image(self) -> bytes:
        return os.pread(self.fd, 1 << 30, 0)

    def close(self) -> None:
        os.close(self.fd)


@pytest.fixture
def disk() -> Iterator[Disk]:
    made = Disk()
    made.start()
    yield made
    made.close()


def segments(*parts: tuple[int, int, int]) -> bytes:
    return b"".join(struct.pack("<QII", *part) for part in parts)


# What it is.


def test_configuration() -> None:
    disk = Disk(100 * SECTOR + 7, serial="12345678901234567890", queues=3)
    disk.start(disk.features | F_BLK_SIZE | F_MQ)
    driver = disk.driver
    assert driver.config(0, 8) == 100  # whole sectors
    assert driver.config(20, 4) == SECTOR
    assert driver.config(34, 2) == 3
    assert len(driver.queues) == 3
    assert disk.ask(T_GET_ID, 0, b"", 20) == (S_OK, b"12345678901234567890")
    disk.close()


@pytest.mark.parametrize("queue", [0, 1, 2])
def test_every_queue(queue: int) -> None:
    disk = Disk(queues=3)
    disk.start(disk.features | F_MQ)
    assert disk.ask(T_OUT, 7, bytes([queue]) * SECTOR, queue=queue)[0] == S_OK
    assert disk.ask(T_IN, 7, b"", SECTOR, queue=2 - queue) == (S_OK, bytes([queue]) * SECTOR)
    disk.close()


@pytest.mark.parametrize(
    "options",
    [{}, {"path": ""}, {"path": "x", "serial": "x" * 21}, {"path": "x", "serial": "\u00e9"}]
    + [{"path": "x", "queues": n} for n in (0, 17)],
)
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="device 'blk'"):
        parse_options(Blk, options)


# Requests.

sector_numbers = st.integers(0, SECTORS + 2)


@settings(deadline=None, max_examples=60)
@given(
    features=st.sampled_from(FORMATS),
    requests=st.lists(
        st.tuples(
            st.sampled_from([T_IN, T_OUT, T_DISCARD, T_WRITE_ZEROES, T_FLUSH]),
            sector_numbers,
            st.integers(0, 5),
            st.binary(min_size=1, max_size=8),
            st.lists(st.integers(1, 700), max_size=4),
            st.booleans(),
        ),
        max_size=25,
    ),
    saved=st.booleans(),
)
def test_like_a_disk(features: int, requests: Any, saved: bool) -> None:
    """Any requests, cut into descriptors anywhere, against an array of bytes."""
    disk = Disk(features=features | F_DISCARD | F_WRITE_ZEROES)
    disk.start()
    model = bytearray(SECTORS * SECTOR)
    for kind, sector, count, pattern, cuts, indirect in requests:
        fits = sector + count <= SECTORS
        length, offset = count * SECTOR, sector * SECTOR
        data, into, expected = b"", 1, S_OK if fits else S_IOERR
        if kind == T_IN:
            into += length
        elif kind == T_OUT:
            data = (pattern * length)[:length]
            if fits:
                model[offset : offset + length] = data
        elif kind == T_FLUSH:
            expected = S_OK
        else:
            data = segments((sector, count, kind == T_WRITE_ZEROES and count % 2))
            if fits:
                model[offset : offset + length] = bytes(length)
        out = cut(struct.pack("<IIQ", kind, 0, sector) + data, cuts)
        request = disk.driver.queues[0].ask(out, cut_lengths(into, cuts), indirect=indirect)
        answer = request.data(disk.rig.ram)
        assert answer[-1] == expected
        if kind == T_IN and fits:
            assert answer[:-1] == model[offset : offset + length]
            assert request.length == length + 1
        if saved:
            disk.rig.replace(disk.rig.snapshot())
    assert disk.image() == model
    assert disk.rig.logs == []
    disk.close()


def cut(data: bytes, lengths: list[int]) -> list[bytes]:
    pieces = []
    for length in lengths:
        if length < len(data):
            pieces.append(data[:length])
            data = data[length:]
    return [*pieces, data]


def cut_lengths(total: int, lengths: list[int]) -> list[int]:
    return [len(piece) for piece in cut(bytes(total), lengths)]


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        ((T_IN, SECTORS, b"", SECTOR), S_IOERR),
        ((T_IN, SECTORS - 1, b"", 2 * SECTOR), S_IOERR),
        ((T_IN, (1 << 64) - 1, b"", SECTOR), S_IOERR),
        ((T_IN, 1 << 55, b"", SECTOR), S_IOERR),
        ((T_IN, 0, b"", SECTOR - 1), S_IOERR),
        ((T_OUT, 0, bytes(SECTOR + 1), 0), S_IOERR),
        ((T_OUT, SECTORS, bytes(SECTOR), 0), S_IOERR),
        ((T_IN, 0, b"", 0), S_OK),
        ((T_GET_ID, 0, b"", 4), S_OK),
        ((T_GET_ID, 0, b"", 0), S_OK),
        ((2, 0, b"", SECTOR), S_UNSUPP),
        ((0xFFFF_FFFF, 0, b"", SECTOR), S_UNSUPP),
        ((14, 0, segments((0, 1, 0)), 0), S_UNSUPP),
        ((T_DISCARD, 0, segments((0, 1, 1)), 0), S_UNSUPP),
        ((T_DISCARD, 0, segments((0, 1, 2)), 0), S_UNSUPP),
        ((T_WRITE_ZEROES, 0, segments((0, 1, 2)), 0), S_UNSUPP),
        ((T_WRITE_ZEROES, 0, segments((0, 1, 0), (0, 1, 0)), 0), S_IOERR),
        ((T_WRITE_ZEROES, 0, segments((0, 0xFFFF_FFFF, 0)), 0), S_IOERR),
        ((T_DISCARD, 0, segments(((1 << 64) - 1, 0xFFFF_FFFF, 0)), 0), S_IOERR),
        ((T_DISCARD, 0, segments(*[(0, 1, 0)] * 17), 0), S_IOERR),
        ((T_DISCARD, 0, segments(*[(0, 1, 0)] * 16), 0), S_OK),
        ((T_DISCARD, 0, b"", 0), S_IOERR),
        ((T_DISCARD, 0, segments((0, 1, 0))[:-1], 0), S_IOERR),
    ],
)
def test_odd_requests(disk: Disk, asked: tuple[int, int, bytes, int], status: int) -> None:
    assert disk.ask(*asked)[0] == status
    assert not disk.driver.status & NEEDS_RESET
    assert disk.image() == bytes(SECTORS * SECTOR)


@pytest.mark.parametrize(("out", "into"), [([b"x" * 15], [1]), ([b"x" * 16], []), ([], [1])])
def test_no_header_or_no_status(disk: Disk, out: list[bytes], into: list[int]) -> None:
    disk.driver.queues[0].send(out, into)
    disk.rig.settle()
    assert disk.driver.status & NEEDS_RESET
    assert "without header or status" in disk.rig.logs[0]


def test_larger_than_ram() -> None:
    size = 1 << 40
    disk = Disk(size)
    disk.start()
    last = size // SECTOR - 1
    assert disk.driver.config(0, 8) == last + 1
    assert disk.ask(T_OUT, last, b"z" * SECTOR)[0] == S_OK
    assert disk.ask(T_IN, last, b"", SECTOR) == (S_OK, b"z" * SECTOR)
    assert os.pread(disk.fd, SECTOR, size - SECTOR) == b"z" * SECTOR
    disk.close()


def test_read_only() -> None:
    disk = Disk(readonly=True)
    assert disk.driver.offered() & F_RO
    assert not disk.driver.offered() & (F_DISCARD | F_WRITE_ZEROES)
    disk.start(disk.features | F_RO)
    assert disk.ask(T_OUT, 0, b"x" * SECTOR)[0] == S_IOERR
    assert disk.ask(T_DISCARD, 0, segments((0, 1, 0)))[0] == S_IOERR
    assert disk.ask(T_IN, 0, b"", SECTOR) == (S_OK, bytes(SECTOR))
    disk.close()


def test_discard_gives_space_back() -> None:
    disk = Disk(1 << 20)
    disk.start()
    for sector in range(0, 2048, 128):
        disk.ask(T_OUT, sector, b"x" * (128 * SECTOR))
    before = os.fstat(disk.fd).st_blocks
    assert disk.ask(T_DISCARD, 0, segments((0, 1024, 0)))[0] == S_OK
    assert os.fstat(disk.fd).st_blocks <= before // 2
    # 5.2.6.2: zeros in any case; "unmap" allows to give the space back.
    assert disk.ask(T_WRITE_ZEROES, 0, segments((1024, 1024, 1)))[0] == S_OK
    assert os.fstat(disk.fd).st_blocks == 0
    assert disk.ask(T_WRITE_ZEROES, 0, segments((0, 1024, 0)))[0] == S_OK
    assert disk.image() == bytes(1 << 20)
    disk.close()


def test_zeros_where_the_host_has_no_call_for_it(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.ask(T_OUT, 0, b"x" * (8 * SECTOR))
    monkeypatch.setattr(host_io, "_fallocate", lambda *_: False)
    for unmap in (0, 1):
        assert disk.ask(T_WRITE_ZEROES, 0, segments((2 + unmap, 1, unmap)))[0] == S_OK
    assert disk.ask(T_DISCARD, 0, segments((0, 1, 0)))[0] == S_OK  # a hint
    assert disk.image()[: 8 * SECTOR] == b"x" * 1024 + bytes(1024) + b"x" * 2048


# The host's errors.


def test_a_host_that_refuses_is_an_io_error(disk: Disk) -> None:
    fcntl.fcntl(disk.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    assert disk.ask(T_OUT, 0, b"x" * SECTOR)[0] == S_IOERR
    assert disk.ask(T_OUT, 0, b"x" * SECTOR)[0] == S_IOERR
    assert disk.ask(T_IN, 0, b"", SECTOR)[0] == S_OK
    assert len(disk.rig.logs) == 1, "each kind of error is named once"
    assert "the disk's file" in disk.rig.logs[0]


def test_a_file_that_became_shorter(disk: Disk) -> None:
    os.truncate(disk.fd, 10 * SECTOR + 100)
    assert disk.ask(T_IN, 9, b"", SECTOR)[0] == S_OK
    assert disk.ask(T_IN, 10, b"", SECTOR)[0] == S_IOERR
    assert disk.ask(T_IN, 100, b"", SECTOR)[0] == S_IOERR
    assert disk.rig.logs == ["the disk's file: the file has become shorter"]
    assert disk.ask(T_OUT, 9, b"x" * SECTOR)[0] == S_OK
    assert disk.ask(T_OUT, 10, b"x" * SECTOR)[0] == S_IOERR
    assert disk.ask(T_OUT, 100, b"x" * SECTOR)[0] == S_IOERR
    assert disk.ask(T_WRITE_ZEROES, 0, struct.pack("<QII", 20, 1, 0))[0] == S_IOERR
    assert os.fstat(disk.fd).st_size == 10 * SECTOR + 100, "what is lost does not become zeros"


def test_a_full_host_loses_nothing_that_was_flushed(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert disk.ask(T_OUT, 0, b"a" * SECTOR)[0] == S_OK
    assert disk.ask(T_FLUSH)[0] == S_OK
    real, room = os.pwritev, [SECTOR + 100]

    def nearly_full(fd: int, views: Any, offset: int) -> int:
        data = b"".join(views)[: room[0]]
        if not data:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room[0] -= len(data)
        return real(fd, [data], offset)

    monkeypatch.setattr(os, "pwritev", nearly_full)
    assert disk.ask(T_OUT, 1, b"b" * SECTOR)[0] == S_OK
    assert disk.ask(T_OUT, 2, b"c" * SECTOR)[0] == S_IOERR
    assert disk.ask(T_FLUSH)[0] == S_OK
    assert disk.image()[: 2 * SECTOR] == b"a" * SECTOR + b"b" * SECTOR
    assert "No space left" in disk.rig.logs[0]


def test_short_writes_are_continued(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwritev
    monkeypatch.setattr(
        os, "pwritev", lambda fd, views, offset: real(fd, [b"".join(views)[:100]], offset)
    )
    data = bytes(range(256)) * 8
    request = disk.driver.queues[0].ask(
        [struct.pack("<IIQ", T_OUT, 0, 3), *cut(data, [1, 300, 7])], [1]
    )
    assert request.data(disk.rig.ram) == b"\0"
    assert disk.image()[3 * SECTOR :][: len(data)] == data


# Flushes.


class Syncs:
    """Stands for `os.fdatasync`: what was on the disk at each."""

    def __init__(self, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[bytes] = []
        self.fails = False
        self._disk = disk
        monkeypatch.setattr(blk.os, "fdatasync", self)

    def __call__(self, fd: int) -> None:
        if self.fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self.seen.append(self._disk.image())


def test_a_flush_waits_beside_the_guest(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The doorbell does not wait for it, requests after it do not, and it comes after what it
    promises."""
    syncs = Syncs(disk, monkeypatch)
    disk.ask(T_OUT, 0, b"a" * SECTOR)
    flush = disk.send(T_FLUSH)
    assert disk.driver.queues[0].collect() == []
    read = disk.send(T_IN, 0, b"", SECTOR)
    assert disk.driver.queues[0].collect() == [read]
    assert syncs.seen == []
    assert disk.finish() == [flush]
    assert [image[:SECTOR] for image in syncs.seen] == [b"a" * SECTOR]


def test_nothing_to_flush_is_not_flushed(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    syncs = Syncs(disk, monkeypatch)
    for _ in range(3):
        assert disk.ask(T_FLUSH)[0] == S_OK
    assert len(syncs.seen) == 1  # who knows what was before us
    for request in ((T_OUT, 0, b"x" * SECTOR), (T_DISCARD, 0, segments((0, 1, 0)))):
        disk.ask(*request)
        assert disk.ask(T_FLUSH)[0] == S_OK
    assert len(syncs.seen) == 3


def test_after_a_failed_flush_none_succeeds(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    syncs = Syncs(disk, monkeypatch)
    disk.ask(T_OUT, 0, b"a" * SECTOR)
    syncs.fails = True
    assert disk.ask(T_FLUSH)[0] == S_IOERR
    syncs.fails = False
    assert disk.ask(T_FLUSH)[0] == S_IOERR
    assert disk.ask(T_IN, 0, b"", SECTOR)[0] == S_OK


def test_without_flush_every_write_is_stable(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """5.2.6.2, the first case."""
    disk.start(F_VERSION_1)
    syncs = Syncs(disk, monkeypatch)
    write = disk.send(T_OUT, 0, b"a" * SECTOR)
    assert disk.driver.queues[0].collect() == []
    assert disk.finish() == [write]
    assert syncs.seen[0][:SECTOR] == b"a" * SECTOR
    disk.ask(T_WRITE_ZEROES, 0, segments((0, 1, 0)))
    assert syncs.seen[1][:SECTOR] == bytes(SECTOR)


def test_a_flush_ends_before_a_snapshot(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    syncs = Syncs(disk, monkeypatch)
    disk.ask(T_OUT, 0, b"a" * SECTOR)
    flush = disk.send(T_FLUSH)
    disk.rig.replace(disk.rig.snapshot())
    assert len(syncs.seen) == 1
    assert disk.driver.queues[0].collect() == [flush]
    assert flush.data(disk.rig.ram) == b"\0"


def test_a_flush_does_not_outlive_a_reset(disk: Disk) -> None:
    disk.ask(T_OUT, 0, b"a" * SECTOR)
    flush = disk.send(T_FLUSH)
    place = flush.places[0][0]
    disk.rig.ram[place] = 0x77
    disk.driver.reset()
    disk.rig.settle()
    assert disk.rig.ram[place] == 0x77
    disk.start()
    assert disk.ask(T_FLUSH)[0] == S_OK


# State.


def test_a_disk_of_another_size_is_refused(disk: Disk) -> None:
    saved = disk.rig.snapshot()
    os.truncate(disk.fd, (SECTORS + 1) * SECTOR)
    with pytest.raises(DeviceError, match="had 256 sectors, its file has 257"):
        disk.rig.replace(saved)


# Past the host's cache.


@pytest.fixture
def direct(tmp_path: Path) -> Iterator[Disk]:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(SECTORS * SECTOR))
    try:
        fd = os.open(image, os.O_RDWR | os.O_DIRECT)
    except OSError:
        pytest.skip("NO O_DIRECT on the file system of temporary files")
    made = Disk(direct="true")
    os.dup2(fd, made.fd)
    os.close(fd)
    # Memory of guests begins on a page.
    made.rig.ram = memoryview(mmap.mmap(-1, len(made.rig.ram)))
    made.rig.replace(made.rig.snapshot())
    made.driver = Driver(made.rig)
    made.start()
    yield made
    made.close()


@pytest.mark.parametrize("shift", [0, 4, SECTOR])
def test_direct(direct: Disk, shift: int) -> None:
    """Whatever the alignment of the guest's memory."""
    assert fcntl.fcntl(direct.fd, fcntl.F_GETFL) & os.O_DIRECT
    driver = direct.driver
    data = bytes(range(256)) * (5 * SECTOR // 256)
    start = driver.memory(16 * SECTOR)
    place = start + -start % SECTOR + shift
    direct.rig.ram[place : place + len(data)] = data
    head, status = driver.memory(16), driver.memory(1)
    for kind, writable in ((T_OUT, 0), (T_IN, WRITE)):
        direct.rig.ram[head : head + 16] = struct.pack("<IIQ", kind, 0, 7)
        if kind == T_IN:
            direct.rig.ram[place : place + len(data)] = bytes(len(data))
        parts = [
            (head, 16, 0),
            (place, 3 * SECTOR, writable),
            (place + 3 * SECTOR, 2 * SECTOR, writable),
            (status, 1, WRITE),
        ]
        direct.rig.ram[status] = 0xFF
        queue = driver.queues[0]
        queue.in_flight[queue.offer(parts)] = Request([])
        queue.kick()
        direct.rig.settle()
        assert len(queue.collect()) == 1
        assert direct.rig.ram[status] == S_OK
        assert direct.rig.ram[place : place + len(data)] == data
    assert direct.ask(T_WRITE_ZEROES, 0, segments((8, 1, 0)))[0] == S_OK
    assert (
        direct.ask(T_IN, 7, b"", 3 * SECTOR)[1]
        == data[:SECTOR] + bytes(SECTOR) + data[2 * SECTOR : 3 * SECTOR]
    )
    assert direct.ask(T_IN, SECTORS - 1, b"", 2 * SECTOR)[0] == S_IOERR


def test_long_writes_in_pieces_that_are_not_aligned(direct: Disk) -> None:
    """More than the memory of its own that they go through."""
    size = 3 << 20
    os.ftruncate(direct.fd, size)
    odd = memoryview(bytearray(random.Random(1).randbytes(size)))
    views = [odd[:100], odd[100 : 2 << 20], odd[2 << 20 :]]
    io = host_io.Direct(direct.fd)
    io.write_all(views, 0)
    back = bytearray(size + 1)
    at = 0
    while at < size:
        at += io.read([memoryview(back)[1 + at :][: size - at]], at)
    assert back[1:] == odd
