"""The bus master of the ATA controller: transfers, tables that are wrong, and its registers."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import ata_rig as ata
import pytest
from ata_rig import AtaRig, Cable, pattern
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.ata.bus_master import ACTIVE, ERROR, INTERRUPT, SLICE, START, TO_MEMORY
from devices.ata.registers import ABRT, BSY, ERR, READY, SECTOR, SRST, UNC

SECTORS = 3000
TABLE, BUFFER = 0x1000, 0x10_0000
RAM = 4 << 20
COMMAND, STATUS, TABLE_REGISTER = 0, 2, 4


@pytest.fixture
def rig() -> Iterator[AtaRig]:
    made = AtaRig(SECTORS, ram=RAM)
    made.fill(pattern(SECTORS))
    yield made
    made.close()


@pytest.fixture
def cable(rig: AtaRig) -> Cable:
    return Cable(rig)


def content(first: int, count: int) -> bytes:
    return pattern(SECTORS)[first * SECTOR : (first + count) * SECTOR]


def start(cable: Cable, direction: int) -> None:
    cable.set_master(COMMAND, direction)
    cable.set_master(STATUS, ERROR | INTERRUPT)
    cable.set_master(COMMAND, direction | START)


def test_a_read(rig: AtaRig, cable: Cable) -> None:
    cable.table(TABLE, [(BUFFER, 3 * SECTOR)])
    cable.give(ata.READ_DMA, 5, 3)
    assert cable.is_busy()
    assert not rig.line()
    start(cable, TO_MEMORY)
    assert rig.line()
    assert cable.master(STATUS) == INTERRUPT, "the table is used up: inactive"
    assert rig.ram[BUFFER : BUFFER + 3 * SECTOR] == content(5, 3)
    assert ("wrote_pages", BUFFER >> 12, 1) in rig.host.calls
    assert cable.status() == READY
    assert not rig.line()
    assert cable.master(STATUS) == INTERRUPT, "until it is cleared"
    cable.set_master(COMMAND, 0)
    cable.set_master(STATUS, INTERRUPT)
    assert cable.master(STATUS) == 0


def test_a_write(rig: AtaRig, cable: Cable) -> None:
    data = pattern(3, seed=7)
    rig.ram[BUFFER : BUFFER + len(data)] = data
    cable.table(TABLE, [(BUFFER, SECTOR), (BUFFER + SECTOR, 2 * SECTOR)])
    cable.give(ata.WRITE_DMA, 5, 3)
    start(cable, 0)
    assert rig.line()
    assert cable.master(STATUS) == INTERRUPT
    assert rig.image()[5 * SECTOR : 8 * SECTOR] == data
    assert rig.host.count("wrote_pages") == 0


def test_the_command_may_come_last(rig: AtaRig, cable: Cable) -> None:
    """A write of the command is no turn: the transfer comes with the next one."""
    cable.table(TABLE, [(BUFFER, SECTOR)])
    start(cable, TO_MEMORY)
    assert cable.master(STATUS) == ACTIVE
    cable.give(ata.READ_DMA_EXT, 9, 1)
    assert cable.is_busy()
    rig.settle()
    assert rig.ram[BUFFER : BUFFER + SECTOR] == content(9, 1)
    assert cable.master(STATUS) == INTERRUPT


def test_a_long_transfer_takes_several_turns(rig: AtaRig, cable: Cable) -> None:
    assert 2500 * SECTOR > 2 * SLICE
    length = 2500 * SECTOR
    cable.table(
        TABLE, [(BUFFER + at, min(1 << 16, length - at)) for at in range(0, length, 1 << 16)]
    )
    cable.give(ata.READ_DMA_EXT, 100, 2500)
    start(cable, TO_MEMORY)
    turns = 0
    while cable.is_busy():
        assert not rig.line()
        rig.host.turns.take()
        turns += 1
    assert turns == 2
    assert rig.ram[BUFFER : BUFFER + length] == content(100, 2500)
    assert cable.master(STATUS) == INTERRUPT


def test_a_transfer_goes_on_in_another_machine(rig: AtaRig, cable: Cable) -> None:
    length = 2500 * SECTOR
    cable.table(
        TABLE, [(BUFFER + at, min(1 << 16, length - at)) for at in range(0, length, 1 << 16)]
    )
    cable.give(ata.READ_DMA_EXT, 100, 2500)
    start(cable, TO_MEMORY)
    rig.replace(rig.snapshot())
    assert rig.line()
    assert rig.ram[BUFFER : BUFFER + length] == content(100, 2500)
    assert (cable.master(STATUS), cable.status()) == (INTERRUPT, READY)


def test_table_larger_than_the_transfer(rig: AtaRig, cable: Cable) -> None:
    """Interrupt and Active: the drive has ended, the table not."""
    cable.table(TABLE, [(BUFFER, 4 * SECTOR)])
    cable.give(ata.READ_DMA, 5, 3)
    start(cable, TO_MEMORY)
    assert cable.master(STATUS) == INTERRUPT | ACTIVE
    assert rig.ram[BUFFER + 3 * SECTOR : BUFFER + 4 * SECTOR] == bytes(SECTOR)
    cable.set_master(COMMAND, 0)
    assert cable.master(STATUS) == INTERRUPT


def test_table_smaller_than_the_transfer(rig: AtaRig, cable: Cable) -> None:
    """Neither: the drive waits for ever, until a reset."""
    cable.table(TABLE, [(BUFFER, 2 * SECTOR + 100)])
    cable.give(ata.READ_DMA, 5, 3)
    start(cable, TO_MEMORY)
    rig.settle()
    assert cable.master(STATUS) == 0
    assert cable.is_busy()
    assert rig.ram[BUFFER : BUFFER + 2 * SECTOR + 100] == content(5, 3)[: 2 * SECTOR + 100]
    # A second table goes on where the first ended.
    cable.table(TABLE, [(BUFFER, SECTOR - 100)])
    cable.set_master(COMMAND, TO_MEMORY | START)
    assert cable.master(STATUS) == 0, "Start was set all the time: nothing begins"
    start(cable, TO_MEMORY)
    assert cable.status() == READY
    assert rig.ram[BUFFER : BUFFER + SECTOR - 100] == content(7, 1)[100:]


@pytest.mark.parametrize(
    ("table", "regions"),
    [
        (RAM, []),
        (RAM - 4, []),
        (0xFFFF_FFFC, []),
        (TABLE, [(RAM, SECTOR)]),
        (TABLE, [(RAM - 2, SECTOR)]),
        (TABLE, [(0xFFFF_FFFE, 0)]),
        (TABLE, [(BUFFER, 2), (RAM, SECTOR)]),
    ],
)
@pytest.mark.parametrize("direction", [0, TO_MEMORY])
def test_what_is_outside_ram(
    rig: AtaRig, cable: Cable, table: int, regions: list[tuple[int, int]], direction: int
) -> None:
    if regions:
        cable.table(table, regions)
    else:
        cable.set_master(TABLE_REGISTER, table, 4)
    cable.give(ata.READ_DMA if direction else ata.WRITE_DMA, 5, 3)
    start(cable, direction)
    rig.settle()
    assert cable.master(STATUS) == ERROR
    assert cable.is_busy()
    assert rig.image() == pattern(SECTORS)
    cable.control(SRST)
    cable.control(0)
    assert cable.status() == READY
    cable.set_master(STATUS, ERROR)
    assert cable.master(STATUS) == 0


def test_the_wrong_direction_moves_nothing(rig: AtaRig, cable: Cable) -> None:
    cable.table(TABLE, [(BUFFER, SECTOR)])
    cable.give(ata.WRITE_DMA, 5, 1)
    start(cable, TO_MEMORY)
    rig.settle()
    assert cable.is_busy()
    assert rig.image() == pattern(SECTORS)


def test_without_bus_mastering_it_waits(rig: AtaRig, cable: Cable) -> None:
    rig.write_config(1, 0b001, 2)
    cable.table(TABLE, [(BUFFER, SECTOR)])
    cable.give(ata.READ_DMA, 5, 1)
    start(cable, TO_MEMORY)
    rig.settle()
    assert cable.is_busy()
    assert not any(rig.ram[BUFFER : BUFFER + SECTOR])
    rig.write_config(1, ata.IO_AND_MASTER, 2)
    rig.settle()
    assert cable.status() == READY
    assert rig.ram[BUFFER : BUFFER + SECTOR] == content(5, 1)


def test_errors_of_the_file(rig: AtaRig, cable: Cable) -> None:
    os.truncate(rig.fds["disk0"], 6 * SECTOR)
    cable.table(TABLE, [(BUFFER, 3 * SECTOR)])
    cable.give(ata.READ_DMA, 5, 3)
    start(cable, TO_MEMORY)
    assert rig.line()
    assert (cable.status(), cable.error()) == (READY | ERR, UNC)
    cable.set_master(COMMAND, 0)
    os.close(rig.fds["disk0"])
    rig.fds["disk0"] = os.open(os.devnull, os.O_RDONLY)  # takes the number, and cannot be written
    cable.give(ata.WRITE_DMA, 5, 3)
    start(cable, 0)
    assert (cable.status(), cable.error()) == (READY | ERR, ABRT)


def test_stopping_ends_it(rig: AtaRig, cable: Cable) -> None:
    cable.table(TABLE, [(BUFFER, SECTOR)])
    start(cable, TO_MEMORY)
    cable.set_master(COMMAND, TO_MEMORY)
    cable.give(ata.READ_DMA, 5, 1)
    rig.settle()
    assert cable.is_busy()
    assert not any(rig.ram[BUFFER : BUFFER + SECTOR])


def test_registers(rig: AtaRig) -> None:
    first, second = Cable(rig, 0), Cable(rig, 1)
    first.set_master(TABLE_REGISTER, 0x1234_5677, 4)
    second.set_master(TABLE_REGISTER, 0xFFFF_FFFF, 4)
    assert first.master(TABLE_REGISTER, 4) == 0x1234_5674
    assert second.master(TABLE_REGISTER, 4) == 0xFFFF_FFFC
    first.set_master(COMMAND, 0xFE)
    assert first.master(COMMAND) == TO_MEMORY
    first.set_master(STATUS, 0xFF)
    assert first.master(STATUS) == 0x60, "drive bits for the driver's own use"
    assert (first.master(1), first.master(3)) == (0, 0)
    first.set_master(COMMAND, TO_MEMORY | START)
    first.set_master(TABLE_REGISTER, 0, 4)
    first.set_master(COMMAND, START)
    assert first.master(TABLE_REGISTER, 4) == 0x1234_5674, "not while it is active"
    assert first.master(COMMAND) == TO_MEMORY | START


pieces = st.lists(
    st.tuples(st.integers(0, RAM - BUFFER - (1 << 16)), st.integers(1, 1 << 15)), max_size=40
)


@given(pieces, st.integers(0, SECTORS - 256), st.integers(1, 256), st.integers())
@settings(max_examples=60, deadline=None)
def test_any_table_moves_what_it_says(
    table: list[tuple[int, int]], first: int, count: int, seed: int
) -> None:
    """Writes out of pieces that may overlap; reads back into one that does not."""
    left, regions = count * SECTOR, []
    for offset, words in table:
        length = min(2 * words, left)
        if length:
            regions.append((BUFFER + offset // 2 * 2, length))
            left -= length
    while left:
        length = min(left, 1 << 16)
        regions.append((BUFFER, length))
        left -= length
    rig = AtaRig(SECTORS, ram=RAM)
    cable = Cable(rig)
    rig.ram[BUFFER:] = random.Random(seed).randbytes(RAM - BUFFER)
    expected = b"".join(bytes(rig.ram[at : at + length]) for at, length in regions)
    cable.table(TABLE, regions)
    cable.give(ata.WRITE_DMA_EXT, first, count)
    start(cable, 0)
    rig.settle()
    assert (cable.status(), cable.master(STATUS)) == (READY, INTERRUPT)
    cable.set_master(COMMAND, 0)
    assert rig.image()[first * SECTOR : (first + count) * SECTOR] == expected
    cable.table(TABLE, [(BUFFER + at, SECTOR) for at in range(0, count * SECTOR, SECTOR)])
    cable.give(ata.READ_DMA_EXT, first, count)
    start(cable, TO_MEMORY)
    rig.settle()
    assert rig.ram[BUFFER : BUFFER + count * SECTOR] == expected
    assert not cable.status() & (BSY | ERR)
    rig.close()


def test_the_smallest_regions(rig: AtaRig, cable: Cable) -> None:
    """More of them than one turn takes."""
    regions = [(BUFFER + 4 * n, 2) for n in range(2 * 256)]
    cable.table(TABLE, regions)
    cable.give(ata.READ_DMA, 5, 2)
    start(cable, TO_MEMORY)
    rig.settle()
    assert cable.status() == READY
    moved = b"".join(bytes(rig.ram[at : at + 2]) for at, _ in regions)
    assert moved == content(5, 2)
