"""A disk-like device that was taken over: it has its own descriptors and the guest's RAM, no more.

The code below runs in the device's process, jailed as a disk is, with guest memory mapped.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
from taken_over import (
    Own,
    TakenOver,
    Takeover,
    Verdict,
    assert_caught,
    assert_stopped,
    census,
    descriptors,
    takeover,
)

from devices.contract import DeviceHost
from proxy.jail.escape import ATTEMPTS, Attempt
from vmm.memory import GuestMemory

RAM, ROM = 4 << 20, 1 << 20
_MADV_REMOVE = 9


def _own_memory(host: DeviceHost) -> tuple[int, int]:
    """Where guest memory is mapped in this process, and its length."""
    window = host.memory.window(0, RAM)
    return ctypes.addressof(ctypes.c_char.from_buffer(window)), RAM


def _memory_fd(host: DeviceHost) -> int:
    for fd in range(4096):
        try:
            if os.fstat(fd).st_size == RAM + ROM:
                return fd
        except OSError:
            continue
    raise OSError("it has no descriptor of guest memory")


def _zero_ram(host: DeviceHost) -> str:
    host.memory.window(0, RAM)[:] = bytes([0xAA]) * RAM
    return "overwrote all RAM"


def _drop_ram(host: DeviceHost) -> str:
    address, length = _own_memory(host)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), _MADV_REMOVE):
        raise OSError(ctypes.get_errno(), "madvise")
    return "dropped all RAM"


def _shrink(host: DeviceHost) -> str:
    os.ftruncate(_memory_fd(host), 0)
    return "shrank it"


def _grow_file(host: DeviceHost) -> str:
    os.posix_fallocate(host.fds["file"], 0, 1 << 30)
    return "filled the disk of the host"


def _append(host: DeviceHost) -> str:
    os.pwrite(host.fds["file"], b"more", 2 << 20)
    return "made its file longer"


def _far_away(host: DeviceHost) -> str:
    os.pwritev(host.fds["file"], [b"more"], 1 << 40)
    return "made its file a terabyte long"


def _zero_range(host: DeviceHost, offset: int, length: int) -> str:
    libc = ctypes.CDLL(None, use_errno=True)
    size = ctypes.c_long
    if libc.fallocate(host.fds["file"], 0x10, size(offset), size(length)):
        raise OSError(code := ctypes.get_errno(), os.strerror(code))
    return "allocated it"


def _zeros_within(host: DeviceHost) -> str:
    return _zero_range(host, 1 << 20, 4096)


def _zeros_past_the_end(host: DeviceHost) -> str:
    return _zero_range(host, 1 << 20, 64 << 20)


def _reserve(host: DeviceHost) -> str:
    """ZERO_RANGE with KEEP_SIZE: blocks past the end, and the file looks as long as before."""
    libc = ctypes.CDLL(None, use_errno=True)
    size = ctypes.c_long
    if libc.fallocate(host.fds["file"], 0x11, size(2 << 20), size(64 << 20)):
        raise OSError(code := ctypes.get_errno(), os.strerror(code))
    return "took space of the host"


def _punch(host: DeviceHost) -> str:
    libc = ctypes.CDLL(None, use_errno=True)
    size = ctypes.c_long
    if libc.fallocate(host.fds["file"], 3, size(0), size(4096)):
        raise OSError(code := ctypes.get_errno(), os.strerror(code))
    return "punched a hole"


def _use_file(host: DeviceHost) -> str:
    fd = host.fds["file"]
    os.pwritev(fd, [host.memory.window(0, 4), host.memory.window(8, 4)], 1 << 20)
    os.fdatasync(fd)
    return repr(os.pread(fd, 8, 1 << 20))


def _lock_off(host: DeviceHost) -> str:
    fcntl.flock(host.fds["file"], fcntl.LOCK_UN)
    return "gave up the lock"


def _more_of_memory(host: DeviceHost) -> str:
    fd = _memory_fd(host)
    past = mmap.mmap(fd, ROM, offset=RAM)
    return f"mapped the ROM: {past[:4]!r}"


OWN = (
    descriptors,
    _zero_ram,
    _drop_ram,
    _shrink,
    _grow_file,
    _append,
    _far_away,
    _zeros_within,
    _zeros_past_the_end,
    _reserve,
    _punch,
    _use_file,
    _lock_off,
    _more_of_memory,
)


class Disk(TakenOver):
    model: ClassVar[str] = "taken-over-disk"
    dma: ClassVar[bool] = True
    own = OWN


class Bench:
    """A machine's memory and file, and devices to be taken over."""

    def __init__(self, disks: Takeover, directory: Path) -> None:
        self._disks = disks
        self.path = directory / "disk.img"
        self.path.write_bytes(bytes(2 << 20))
        self.file = os.open(self.path, os.O_RDWR)
        self.memory = GuestMemory(RAM, ROM)
        self.memory.view[RAM : RAM + 4] = b"rom!"

    def attempt(self, what: Attempt | Own) -> Verdict:
        return self._disks.attempt(what, {"file": self.file}, guest_memory=self.memory)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with takeover(Disk, "blk") as disks:
        made = Bench(disks, tmp_path_factory.mktemp("escape"))
        yield made
        os.close(made.file)
        made.memory.close()


@pytest.mark.parametrize("tried", ATTEMPTS, ids=lambda each: each.name)
def test_no_way_out_is_open(bench: Bench, tried: Attempt) -> None:
    assert_stopped(tried, bench.attempt(tried))


def test_it_has_its_own_descriptors_and_no_others(bench: Bench) -> None:
    verdict = bench.attempt(descriptors)
    found = census(verdict.said, {"guest memory": bench.memory.fd, "its file": bench.file})
    memory = found.pop("guest memory")
    assert found == {"null": 3, "tube": 1, "doorbell": 1, "its file": 1}
    assert memory == 1, "one for the mapping"


@pytest.mark.parametrize("function", [_zero_ram, _drop_ram])
def test_all_it_can_spoil_is_the_guests(bench: Bench, function: Own) -> None:
    bench.memory.write(RAM - 8, b"precious")
    got, said, failure = bench.attempt(function)
    assert got, (said, failure)
    assert bench.memory.read(RAM - 8, 8) == (
        bytes([0xAA] * 8) if function is _zero_ram else bytes(8)
    )
    bench.memory.write(RAM - 8, b"goes on.")
    assert bench.memory.read(RAM - 8, 8) == b"goes on."


@pytest.mark.parametrize(
    ("function", "call"),
    [
        (_shrink, "ftruncate"),
        (_grow_file, "fallocate"),
        (_reserve, "fallocate"),
        (_lock_off, "flock"),
    ],
)
def test_what_would_harm_the_host_is_caught(bench: Bench, function: Own, call: str) -> None:
    assert_caught(bench.attempt(function), call)
    assert os.fstat(bench.memory.fd).st_size == RAM + ROM
    assert os.fstat(bench.file).st_size == 2 << 20


@pytest.mark.parametrize("function", [_append, _far_away, _zeros_past_the_end])
def test_its_file_grows_by_no_byte(bench: Bench, function: Own) -> None:
    """Else it could fill the host's disk."""
    before = os.fstat(bench.file)
    got, said, failure = bench.attempt(function)
    assert not got, said
    assert "File too large" in said or "not supported" in said, (said, failure)
    assert not failure
    after = os.fstat(bench.file)
    assert (after.st_size, after.st_blocks) == (before.st_size, before.st_blocks)


def test_its_file_is_its_own(bench: Bench) -> None:
    bench.memory.write(0, b"good....disk")
    got, said, failure = bench.attempt(_use_file)
    assert got, (said, failure)
    assert said == repr(b"gooddisk")
    for function in (_punch, _zeros_within):
        got, said, failure = bench.attempt(function)
        assert got or (said and not failure), failure  # not every file system has these


def test_the_rom_is_not_mapped_but_lies_in_the_same_memory(bench: Bench) -> None:
    """Known and said in ARCHITECTURE.md: the descriptor is of RAM and ROM, both the guest's."""
    got, said, _ = bench.attempt(_more_of_memory)
    assert got
    assert "rom!" in said
