"""The ATA registers and commands by the rules of ATA/ATAPI-6, against images in memory."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Callable, Iterator

import ata_rig as ata
import pytest
from ata_rig import AtaRig, Cable, pattern

from devices.ata import registers as r
from devices.ata.registers import (
    ABRT,
    BSY,
    COUNT,
    DATA,
    DEVICE,
    DRQ,
    DSC,
    ERR,
    ERROR_FEATURES,
    HOB,
    IDNF,
    LBA,
    LOW,
    NIEN,
    READY,
    SECTOR,
    SRST,
    STATUS_COMMAND,
    UNC,
)
from devices.errors import UserError
from devices.registry import parse_options

SECTORS = 1000
"""Of the disk; not a whole cylinder, so that its end is in the middle of one."""


@pytest.fixture
def rig() -> Iterator[AtaRig]:
    made = AtaRig(SECTORS)
    made.fill(pattern(SECTORS))
    yield made
    made.close()


@pytest.fixture
def cable(rig: AtaRig) -> Cable:
    return Cable(rig)


def content(first: int, count: int) -> bytes:
    return pattern(SECTORS)[first * SECTOR : (first + count) * SECTOR]


# What it is.


def words(cable: Cable, drive: int = 0) -> tuple[int, ...]:
    assert cable.ask(ata.IDENTIFY, drive=drive) & DRQ
    data = cable.block()
    assert sum(data) & 0xFF == 0
    assert data[510] == 0xA5
    return struct.unpack("<256H", data)


def text(some: tuple[int, ...]) -> str:
    return struct.pack(f">{len(some)}H", *some).decode().rstrip()


def test_identify() -> None:
    rig = AtaRig(0, (1 << 28) + 5, serial1="a-serial")
    found = words(Cable(rig), drive=1)
    assert found[0] & 1 << 15 == 0  # ATA
    assert (found[1], found[3], found[6]) == (16383, 16, 63)
    assert text(found[10:20]) == "a-serial"
    assert text(found[27:47]) == "JAILED-VMM ATA DISK"
    assert found[47] & 0xFF == 16
    assert found[49] & 1 << 9  # LBA
    assert found[49] & 1 << 8  # DMA
    assert found[60] | found[61] << 16 == (1 << 28) - 1
    assert found[100] | found[101] << 16 | found[102] << 32 == (1 << 28) + 5
    assert found[83] >> 14 == found[87] >> 14 == 0b01
    assert found[83] & found[86] & 1 << 10  # 48-bit addresses
    rig.close()


def test_identify_shows_what_was_set(cable: Cable) -> None:
    assert cable.ask(ata.SET_MULTIPLE, 0, 8) == READY
    assert cable.ask(ata.SET_FEATURES, 0, 0x22, features=0x03) == READY
    assert cable.ask(ata.SET_FEATURES, features=0x82) == READY
    cable.select(0, 3)
    cable.put(COUNT, 5)
    cable.put(STATUS_COMMAND, ata.INITIALIZE)
    found = words(cable)
    assert found[59] == 0x108
    assert found[63] == 0x407
    assert found[85] & 1 << 5 == 0
    assert found[54:57] == (SECTORS // 20, 4, 5)
    assert cable.ask(ata.SET_FEATURES, 0, 0x45, features=0x03) == READY
    found = words(cable)
    assert found[63] == 0x007
    assert found[88] == 0x203F


@pytest.mark.parametrize(
    "options", [{"serial0": "a-serial-of-21-chars!"}, {"serial3": "ä"}, {"serial": "x"}]
)
def test_options(options: dict[str, str]) -> None:
    with pytest.raises(UserError, match="serial"):
        parse_options(ata.Ata, options)


# Reading and writing by PIO.


Span = tuple[int, int, int]
"""A command, its first sector, and how many; 0 is 256."""


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    "span",
    [
        (ata.READ, 0, 1),
        (0x21, 7, 3),
        (ata.READ, 100, 0),
        (ata.READ, SECTORS - 1, 1),
        (ata.READ_EXT, 500, 300),
        (ata.READ_MULTIPLE, 3, 10),
        (ata.READ_MULTIPLE_EXT, SECTORS - 9, 9),
    ],
)
def test_reads(cable: Cable, span: Span, size: int) -> None:
    cable.ask(ata.SET_MULTIPLE, 0, 4)
    cable.give(*span)
    assert cable.take(size) == content(span[1], span[2] or 256)
    assert cable.status() == READY


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    "span",
    [
        (ata.WRITE, 0, 1),
        (0x31, 7, 3),
        (ata.WRITE, 100, 0),
        (ata.WRITE_EXT, SECTORS - 300, 300),
        (ata.WRITE_MULTIPLE, 3, 10),
        (ata.WRITE_MULTIPLE_EXT, SECTORS - 9, 9),
    ],
)
def test_writes(rig: AtaRig, cable: Cable, span: Span, size: int) -> None:
    cable.ask(ata.SET_MULTIPLE, 0, 4)
    data = pattern(span[2] or 256, seed=99)
    assert cable.ask(*span) == READY | DRQ
    cable.feed(data, size)
    assert cable.status() == READY
    expected = bytearray(pattern(SECTORS))
    expected[span[1] * SECTOR : span[1] * SECTOR + len(data)] = data
    assert rig.image() == expected


def test_a_sector_far_out() -> None:
    rig = AtaRig(1 << 33)
    last = (1 << 33) - 1
    os.pwrite(rig.fds["disk0"], b"the end", last * SECTOR)
    cable = Cable(rig)
    cable.give(ata.READ_EXT, last, 1)
    assert cable.take().startswith(b"the end")
    rig.close()


@pytest.mark.parametrize(
    ("cylinder", "head", "number", "sector"),
    [(0, 0, 1, 0), (0, 1, 1, 5), (2, 3, 4, 2 * 20 + 3 * 5 + 3), (49, 3, 5, SECTORS - 1)],
)
def test_cylinders_heads_and_sectors(
    cable: Cable, cylinder: int, head: int, number: int, sector: int
) -> None:
    """After INITIALIZE DEVICE PARAMETERS: four heads, five sectors."""
    cable.select(0, 3)
    cable.put(COUNT, 5)
    cable.put(STATUS_COMMAND, ata.INITIALIZE)
    assert cable.status() == READY
    for code in (ata.SEEK, ata.VERIFY, ata.READ):
        cable.select(0, head)
        cable.put(COUNT, 1)
        cable.put(LOW, number)
        cable.put(r.MID, cylinder)
        cable.put(r.HIGH, 0)
        cable.put(STATUS_COMMAND, code)
        assert cable.status() & ~DRQ == READY
    assert cable.block() == content(sector, 1)


@pytest.mark.parametrize(
    ("head", "number", "cylinder"), [(0, 0, 0), (0, 6, 0), (4, 1, 0), (0, 1, 50)]
)
def test_what_no_translation_has(cable: Cable, head: int, number: int, cylinder: int) -> None:
    cable.select(0, 3)
    cable.put(COUNT, 5)
    cable.put(STATUS_COMMAND, ata.INITIALIZE)
    cable.select(0, head)
    cable.put(COUNT, 1)
    cable.put(LOW, number)
    cable.put(r.MID, cylinder)
    cable.put(STATUS_COMMAND, ata.READ)
    assert (cable.status(), cable.error()) == (READY | ERR, IDNF)


# Interrupts (9.5, 9.6, 5.2.9).


def test_an_interrupt_for_each_block_that_is_ready(rig: AtaRig, cable: Cable) -> None:
    cable.ask(ata.SET_MULTIPLE, 0, 2)
    cable.give(ata.READ_MULTIPLE, 0, 5)
    for sectors in (2, 2, 1):
        assert rig.line()
        assert cable.alternate() == READY | DRQ
        assert rig.line(), "the alternate status leaves it"
        assert cable.status() == READY | DRQ
        assert not rig.line()
        cable.block(length=sectors * SECTOR)
    assert not rig.line(), "none at the end"
    assert cable.status() == READY


def test_an_interrupt_for_each_block_that_was_taken(rig: AtaRig, cable: Cable) -> None:
    cable.give(ata.WRITE, 0, 2)
    assert not rig.line(), "none for the first block"
    cable.feed(bytes(SECTOR))
    assert rig.line()
    assert cable.status() == READY | DRQ
    assert not rig.line()
    cable.feed(bytes(SECTOR))
    assert rig.line()
    assert cable.status() == READY
    assert not rig.line()


def test_nien(rig: AtaRig, cable: Cable) -> None:
    cable.control(NIEN)
    cable.give(ata.SEEK)
    assert not rig.line()
    cable.control(0)
    assert rig.line(), "it waited"
    cable.control(NIEN)
    assert not rig.line()


def test_the_line_is_that_of_the_selected_drive() -> None:
    rig = AtaRig(8, 8)
    cable = Cable(rig)
    cable.give(ata.SEEK, drive=1)
    assert rig.line()
    cable.select(0)
    assert not rig.line()
    cable.select(1)
    assert rig.line()
    cable.put(STATUS_COMMAND, 0x00)  # a new command takes it as well; this one is aborted
    assert cable.status() == READY | ERR
    assert not rig.line()
    rig.close()


def test_channels_have_lines_of_their_own() -> None:
    rig = AtaRig(8, 0, 8)
    Cable(rig, 1).give(ata.SEEK)
    assert (rig.line(0), rig.line(1)) == (False, True)
    assert [region.irq for region in rig.device.regions()] == [None, 14, None, 15, None]
    rig.close()


# Errors.


@pytest.mark.parametrize(
    "code",
    [
        *(ata.READ, ata.READ_EXT, ata.WRITE, ata.WRITE_EXT),
        *(ata.VERIFY, ata.VERIFY_EXT, ata.READ_DMA, ata.WRITE_DMA_EXT),
    ],
)
@pytest.mark.parametrize(
    ("sector", "count", "named"),
    [(SECTORS, 1, SECTORS), (SECTORS - 2, 3, SECTORS), (0xFFF_FFFE, 1, 0xFFF_FFFE)],
)
def test_beyond_the_end(cable: Cable, code: int, sector: int, count: int, named: int) -> None:
    assert cable.ask(code, sector, count) == READY | ERR
    assert cable.error() == IDNF
    _, low, mid, high = cable.registers()
    if r.COMMANDS[code].ext:
        cable.control(HOB)
        assert cable.registers()[1] == named >> 24
    else:
        assert cable.get(DEVICE) & 0xF == named >> 24
    assert low | mid << 8 | high << 16 == named & 0xFF_FFFF


def test_far_beyond_the_end(cable: Cable) -> None:
    assert cable.ask(ata.READ_EXT, 0xABCD_EF98_7654, 0) == READY | ERR
    assert cable.error() == IDNF
    assert cable.registers()[1:] == (0x54, 0x76, 0x98)
    cable.control(HOB)
    assert cable.registers()[1:] == (0xEF, 0xCD, 0xAB)


@pytest.mark.parametrize(("sectors", "status"), [(1 << 16, READY), ((1 << 16) - 1, READY | ERR)])
def test_a_count_of_zero_is_all_of_65536(sectors: int, status: int) -> None:
    rig = AtaRig(sectors)
    assert Cable(rig).ask(ata.VERIFY_EXT, 0, 0) == status
    rig.close()


@pytest.mark.parametrize(
    "code",
    [
        *(0x00, 0x06, 0x08, 0xA0, ata.IDENTIFY_PACKET, 0xB0, 0xCE, 0xF5, 0xFF),
        *(ata.READ_MULTIPLE, ata.WRITE_MULTIPLE_EXT),  # without SET MULTIPLE MODE
    ],
)
def test_what_it_does_not_have_is_aborted(rig: AtaRig, cable: Cable, code: int) -> None:
    assert cable.ask(code, 0, 1) == READY | ERR
    assert cable.error() == ABRT
    cable.give(code, 0, 1)
    assert rig.line()
    assert cable.ask(ata.SEEK) == READY, "the next one is free of it"
    assert cable.error() == 0


@pytest.mark.parametrize("count", [3, 5, 17, 32, 255])
def test_blocks_that_cannot_be_set(cable: Cable, count: int) -> None:
    cable.ask(ata.SET_MULTIPLE, 0, 4)
    assert cable.ask(ata.SET_MULTIPLE, 0, count) == READY | ERR
    assert words(cable)[59] == 0x104
    assert cable.ask(ata.SET_MULTIPLE, 0, 0) == READY
    assert words(cable)[59] == 0


@pytest.mark.parametrize(
    ("features", "count", "status"),
    [
        (0x03, 0x00, READY),
        (0x03, 0x01, READY),
        (0x03, 0x02, READY | ERR),
        (0x03, 0x0C, READY),
        (0x03, 0x0D, READY | ERR),
        (0x03, 0x10, READY | ERR),
        (0x03, 0x22, READY),
        (0x03, 0x23, READY | ERR),
        (0x03, 0x45, READY),
        (0x03, 0x46, READY | ERR),
        (0x03, 0xFF, READY | ERR),
        (0x02, 0, READY),
        (0x82, 0, READY),
        (0x55, 0, READY),
        (0xAA, 0, READY),
        (0x66, 0, READY),
        (0xCC, 0, READY),
        (0x05, 0x80, READY | ERR),
        (0x00, 0, READY | ERR),
    ],
)
def test_set_features(cable: Cable, features: int, count: int, status: int) -> None:
    assert cable.ask(ata.SET_FEATURES, 0, count, features=features) == status
    assert cable.error() == (ABRT if status & ERR else 0)


def test_a_translation_without_sectors(cable: Cable) -> None:
    assert cable.ask(ata.INITIALIZE, 0, 0) == READY | ERR


def test_a_readonly_disk_aborts_writes() -> None:
    rig = AtaRig(8, readonly0=True)
    cable = Cable(rig)
    for code in (ata.WRITE, ata.WRITE_EXT, ata.WRITE_DMA):
        assert cable.ask(code, 0, 1) == READY | ERR
        assert cable.error() == ABRT
    assert cable.ask(ata.READ, 0, 1) == READY | DRQ
    rig.close()


def test_a_file_that_became_shorter(rig: AtaRig, cable: Cable) -> None:
    os.truncate(rig.fds["disk0"], 4 * SECTOR)
    cable.give(ata.READ, 2, 4)
    assert cable.take() == content(2, 2)
    assert (cable.alternate(), cable.error()) == (READY | ERR, UNC)
    assert cable.registers()[1] == 4, "the sector that could not be read"
    assert cable.ask(ata.VERIFY, 0, 4) == READY
    assert cable.ask(ata.VERIFY, 2, 4) == READY | ERR
    assert cable.error() == UNC
    cable.control(NIEN)
    cable.control(0)
    assert len(rig.logs) == 1, "each kind of error is told once"
    cable.give(ata.WRITE, 4, 1)
    cable.feed(content(0, 1))
    assert cable.status() & ERR
    assert os.fstat(rig.fds["disk0"]).st_size == 4 * SECTOR, "what is lost does not become zeros"


def test_a_file_that_cannot_be_written(rig: AtaRig, cable: Cable) -> None:
    fcntl.fcntl(rig.fds["disk0"], fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    cable.give(ata.WRITE, 9, 2)
    cable.feed(bytes(SECTOR))
    assert (cable.status(), cable.error()) == (READY | ERR, ABRT)
    assert cable.registers()[1] == 9
    assert rig.logs[0].startswith("disk0: ")  # the machine says whose line it is
    assert "Operation not permitted" in rig.logs[0]


# Flushes.


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    monkeypatch.setattr(os, "fdatasync", calls.append)
    return calls


@pytest.mark.parametrize("code", [ata.FLUSH, ata.FLUSH_EXT, ata.STANDBY, ata.SLEEP])
def test_busy_until_it_is_on_the_disk(
    rig: AtaRig, cable: Cable, synced: list[int], code: int
) -> None:
    cable.give(code)
    assert cable.status() & BSY
    assert not synced
    assert not rig.line()
    cable.put(COUNT, 77)
    cable.give(ata.SEEK)  # a drive that is busy hears nothing
    rig.settle()
    assert len(synced) == 1
    assert rig.line()
    assert cable.status() == READY


def test_without_a_write_cache_a_write_is_a_flush(
    rig: AtaRig, cable: Cable, synced: list[int]
) -> None:
    cable.give(ata.WRITE, 0, 1)
    cable.feed(bytes(SECTOR))
    assert not synced
    cable.ask(ata.SET_FEATURES, features=0x82)
    assert len(synced) == 1
    cable.give(ata.WRITE, 0, 2)
    cable.feed(bytes(SECTOR))
    assert len(synced) == 1
    cable.feed(bytes(SECTOR))
    assert len(synced) == 2
    assert cable.status() == READY


def test_after_a_flush_that_failed_all_fail(
    rig: AtaRig, cable: Cable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fails)
        assert cable.ask(ata.FLUSH) == READY | ERR
    assert cable.error() == ABRT
    assert cable.ask(ata.FLUSH) == READY | ERR
    assert "Input/output error" in rig.logs[0]


def test_sleep_of_the_machine_finishes_a_flush(
    rig: AtaRig, cable: Cable, synced: list[int]
) -> None:
    cable.give(ata.FLUSH)
    rig.replace(rig.snapshot())
    assert len(synced) == 1
    assert rig.line()
    assert cable.status() == READY


# Power (6.10).


def test_power_modes(cable: Cable) -> None:
    for code, mode in ((ata.IDLE, 0x80), (ata.STANDBY, 0x00), (0xE3, 0x80), (0xE2, 0x00)):
        assert cable.ask(code) == READY
        assert cable.ask(ata.CHECK_POWER) == READY
        assert cable.get(COUNT) == mode
    cable.ask(ata.VERIFY, 0, 1)
    cable.ask(ata.CHECK_POWER)
    assert cable.get(COUNT) == 0xFF
    cable.ask(ata.SLEEP)
    cable.put(COUNT, 3)
    cable.ask(ata.CHECK_POWER)
    assert cable.get(COUNT) == 0, "it sleeps"
    cable.control(SRST)
    cable.control(0)
    cable.ask(ata.CHECK_POWER)
    assert cable.get(COUNT) == 0xFF


# Resets, who answers, and what floats.

SIGNATURE = (1, 1, 0, 0)


def reset(cable: Cable) -> None:
    cable.control(SRST)
    assert cable.is_busy()
    cable.control(0)


def diagnose(cable: Cable) -> None:
    cable.select(1)
    cable.put(STATUS_COMMAND, ata.DIAGNOSTIC)


@pytest.mark.parametrize("how", [reset, diagnose])
def test_the_signature(how: Callable[[Cable], None]) -> None:
    rig = AtaRig(SECTORS, SECTORS)
    cable = Cable(rig)
    assert cable.registers() == SIGNATURE, "as after power-on"
    cable.ask(ata.READ_EXT, 7, 3, drive=1)
    cable.block()
    cable.select(0)
    for _ in range(2 if how is reset else 0):
        cable.ask(ata.READ, 7, 3)  # the first is read in part: a reset ends it
    cable.select(1)
    cable.control(SRST if how is reset else 0)
    cable.control(0)
    if how is diagnose:
        for drive in (1, 0):
            cable.select(drive)
            while cable.status() & DRQ:
                cable.block()
    how(cable)
    assert rig.line() == (how is diagnose)
    assert cable.get(DEVICE) == 0, "drive 0 is selected"
    for drive in (0, 1):
        cable.select(drive)
        assert cable.error() == 1
        assert cable.registers() == SIGNATURE
        assert cable.status() == READY
    rig.close()


def test_a_reset_ends_a_transfer(rig: AtaRig, cable: Cable) -> None:
    cable.give(ata.WRITE, 0, 2)
    cable.feed(b"x" * 100)
    reset(cable)
    assert cable.status() == READY
    cable.put(DATA, 0x1234, 2)
    assert cable.get(DATA, 2) == 0xFFFF
    assert rig.image() == pattern(SECTORS)
    cable.give(ata.READ, 5, 1)
    assert cable.take() == content(5, 1)


def test_drive_0_alone_answers_for_drive_1(cable: Cable) -> None:
    """9.16.1."""
    cable.select(1)
    cable.put(COUNT, 0x55)
    cable.put(LOW, 0xAA)
    assert (cable.get(COUNT), cable.get(LOW)) == (0x55, 0xAA)
    assert cable.get(DEVICE) == 0xF0
    assert (cable.status(), cable.alternate()) == (0, 0)
    cable.put(STATUS_COMMAND, ata.IDENTIFY)
    assert cable.status() == 0
    assert cable.get(DATA, 2) == 0xFFFF
    cable.select(0)
    assert cable.status() == READY


def test_drive_1_alone() -> None:
    """9.16.2: nobody answers for drive 0."""
    rig = AtaRig(0, SECTORS)
    cable = Cable(rig)
    assert (cable.status(), cable.alternate(), cable.get(COUNT)) == (0x7F, 0x7F, 0xFF)
    assert cable.ask(ata.IDENTIFY, drive=1) == READY | DRQ
    rig.close()


@pytest.mark.parametrize("decoded", [True, False])
def test_a_channel_without_drives_floats(decoded: bool) -> None:
    rig = AtaRig(8)
    cable = Cable(rig, 1)
    if not decoded:
        cable = Cable(rig, 0)
        rig.write_config(1, 0, 2)
    cable.give(ata.IDENTIFY)
    reset_ = (SRST, 0, NIEN, 0)
    for value in reset_:
        cable.control(value)
    status = 0x7F if decoded else 0xFF
    assert (cable.status(), cable.alternate()) == (status, status)
    assert [cable.get(offset) for offset in range(1, 7)] == [0xFF] * 6
    assert (cable.get(DATA, 2), cable.get(DATA, 4)) == (0xFFFF, 0xFFFF_FFFF)
    cable.put(DATA, 5, 2)
    assert not rig.line(cable.channel)
    rig.close()


def test_each_channel_can_be_switched_off() -> None:
    """Decode Enable, in the timing registers of the PIIX3."""
    rig = AtaRig(8, 0, 8)
    rig.write_config(0x10, 0, 2)
    assert Cable(rig, 0).status() == 0xFF
    assert Cable(rig, 1).status() == READY
    rig.write_config(0x10, 0x8000, 2)
    assert Cable(rig, 0).status() == READY
    rig.close()


def test_high_order_bytes(cable: Cable) -> None:
    """HOB shows what a register held before, until the next write (7.8)."""
    for value in (1, 2, 3):
        cable.put(COUNT, value)
    assert cable.get(COUNT) == 3
    cable.control(HOB)
    assert cable.get(COUNT) == 2
    cable.put(LOW, 9)
    assert cable.get(COUNT) == 3


def test_wide_accesses_are_bytes(cable: Cable) -> None:
    """All but those to Data, which is a register of 16 bits."""
    cable.put(COUNT, 0x0201, 2)
    assert (cable.get(COUNT), cable.get(LOW), cable.get(COUNT, 2)) == (1, 2, 0x0201)
    cable.put(4, 0xEC_E0_00_00, 4)  # the last of them is Command
    assert cable.status() == READY | DRQ
    data = bytes(cable.get(DATA) for _ in range(4)) + cable.block(4, SECTOR - 4)
    assert text(struct.unpack("<256H", data)[27:47]) == "JAILED-VMM ATA DISK"


def test_registers_are_locked_during_a_transfer(cable: Cable) -> None:
    cable.give(ata.READ, 5, 2)
    cable.put(COUNT, 9)
    cable.put(ERROR_FEATURES, 9)
    cable.put(STATUS_COMMAND, ata.IDENTIFY)
    assert cable.take() == content(5, 2)


def test_legacy_commands(rig: AtaRig, cable: Cable) -> None:
    for code in (0x10, 0x1F, 0x70, 0x7F):
        cable.give(code)
        assert rig.line()
        assert cable.status() == READY | (DSC & READY)
    assert cable.ask(0x70, SECTORS) == READY | ERR
    assert cable.error() == IDNF
    assert LBA & r.OBSOLETE == 0
