"""A driver for the ATA controller, over the library's API and without a CPU."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from typing import Any

from virtio_driver import LocalRig

from devices.ata.controller import Ata
from devices.ata.registers import (
    BSY,
    COMMANDS,
    COUNT,
    DATA,
    DEV,
    DEVICE,
    DRQ,
    ERR,
    ERROR_FEATURES,
    HIGH,
    LBA,
    LOW,
    MID,
    NIEN,
    SECTOR,
    STATUS_COMMAND,
)

BUS_MASTERS = 0
"""The index of its region; those of the channels follow, two for each."""
IO_AND_MASTER = 0b101

READ, READ_EXT, READ_MULTIPLE, READ_MULTIPLE_EXT = 0x20, 0x24, 0xC4, 0x29
WRITE, WRITE_EXT, WRITE_MULTIPLE, WRITE_MULTIPLE_EXT = 0x30, 0x34, 0xC5, 0x39
READ_DMA, READ_DMA_EXT, WRITE_DMA, WRITE_DMA_EXT = 0xC8, 0x25, 0xCA, 0x35
VERIFY, VERIFY_EXT, SEEK, DIAGNOSTIC, INITIALIZE, SET_MULTIPLE = 0x40, 0x42, 0x70, 0x90, 0x91, 0xC6
FLUSH, FLUSH_EXT, IDENTIFY, IDENTIFY_PACKET, SET_FEATURES = 0xE7, 0xEA, 0xEC, 0xA1, 0xEF
STANDBY, IDLE, CHECK_POWER, SLEEP = 0xE0, 0xE1, 0xE5, 0xE6

Program = Callable[["Cable"], Any]


def pattern(sectors: int, seed: int = 0) -> bytes:
    """Bytes of which each sector is different."""
    return b"".join(struct.pack("<II", seed, number) * (SECTOR // 8) for number in range(sectors))


class AtaRig(LocalRig):
    """The controller in this process, with images in memory.

    Args:
        sectors: of each of the four disks; 0: none.
        options: of the controller.
    """

    def __init__(self, *sectors: int, ram: int = 1 << 20, **options: Any) -> None:
        fds = {}
        for number, count in enumerate(sectors):
            if count:
                fds[f"disk{number}"] = fd = os.memfd_create("disk", os.MFD_ALLOW_SEALING)
                os.truncate(fd, count * SECTOR)
        self.fds = fds
        super().__init__(Ata, {**dict.fromkeys(fds, "image"), **options}, fds, ram)
        self.write_config(1, IO_AND_MASTER, 2)

    def access(self, region: int, offset: int, size: int) -> int:
        handler = self.device.handlers()[region]
        return self.host.turns.reader(handler.read)(offset, size)

    def store(self, region: int, offset: int, size: int, value: int) -> None:
        handler, synced = self.device.handlers()[region], self.device.regions()[region].synced
        if synced:
            self.host.turns.write(handler.write, offset, size, value)
        else:
            handler.write(offset, size, value)

    def image(self, number: int = 0) -> bytes:
        return os.pread(self.fds[f"disk{number}"], 1 << 30, 0)

    def fill(self, data: bytes, number: int = 0) -> None:
        os.pwrite(self.fds[f"disk{number}"], data, 0)

    def line(self, channel: int = 0) -> bool:
        return self.host.lines.get(channel, False)

    def close(self) -> None:
        self.device.close()
        for fd in self.fds.values():
            os.close(fd)


class Cable:
    """A driver of one channel.

    Args:
        rig: a rig, or anything with its `access`, `store` and `settle`.
    """

    def __init__(self, rig: Any, channel: int = 0) -> None:
        self.rig = rig
        self.channel = channel
        self.regions = 1 + 2 * channel, 2 + 2 * channel

    def get(self, offset: int, size: int = 1) -> int:
        value: int = self.rig.access(self.regions[0], offset, size)
        return value

    def put(self, offset: int, value: int, size: int = 1) -> None:
        self.rig.store(self.regions[0], offset, size, value)

    def control(self, value: int) -> None:
        self.rig.store(self.regions[1], 0, 1, value)

    def alternate(self) -> int:
        value: int = self.rig.access(self.regions[1], 0, 1)
        return value

    def select(self, drive: int, bits: int = LBA) -> None:
        self.put(DEVICE, 0xA0 | bits | (DEV if drive else 0))

    def status(self) -> int:
        return self.get(STATUS_COMMAND)

    def give(
        self,
        code: int,
        sector: int = 0,
        count: int = 0,
        *,
        features: int = 0,
        drive: int = 0,
    ) -> None:
        """Write the registers of a command, the last one too."""
        ext = code in COMMANDS and COMMANDS[code].ext
        self.select(drive, LBA | (0 if ext else sector >> 24 & 0xF))
        if ext:
            for offset, value in (
                (COUNT, count >> 8),
                (LOW, sector >> 24),
                (MID, sector >> 32),
                (HIGH, sector >> 40),
            ):
                self.put(offset, value & 0xFF)
        self.put(ERROR_FEATURES, features)
        for offset, value in ((COUNT, count), (LOW, sector), (MID, sector >> 8)):
            self.put(offset, value & 0xFF)
        self.put(HIGH, sector >> 16 & 0xFF)
        self.put(STATUS_COMMAND, code)

    def ask(self, code: int, *arguments: int, **how: Any) -> int:
        """Give a command and wait for it: its Status."""
        self.give(code, *arguments, **how)
        self.rig.settle()
        return self.status()

    def error(self) -> int:
        return self.get(ERROR_FEATURES)

    def take(self, size: int = 2) -> bytes:
        """Read blocks as long as the drive has some."""
        data = bytearray()
        while (status := self.status()) & DRQ and not status & ERR:
            data += self.block(size)
        return bytes(data)

    def block(self, size: int = 2, length: int = SECTOR) -> bytes:
        return b"".join(
            self.get(DATA, size).to_bytes(size, "little") for _ in range(length // size)
        )

    def feed(self, data: bytes, size: int = 2) -> None:
        """Write as much as the drive takes."""
        for start in range(0, len(data), size):
            self.put(DATA, int.from_bytes(data[start : start + size], "little"), size)
        self.rig.settle()

    def registers(self) -> tuple[int, ...]:
        return tuple(self.get(offset) for offset in (COUNT, LOW, MID, HIGH))

    def quiet(self) -> None:
        """No interrupts."""
        self.control(NIEN)

    # Bus master.

    def master(self, offset: int, size: int = 1) -> int:
        value: int = self.rig.access(BUS_MASTERS, 8 * self.channel + offset, size)
        return value

    def set_master(self, offset: int, value: int, size: int = 1) -> None:
        self.rig.store(BUS_MASTERS, 8 * self.channel + offset, size, value)

    def table(self, at: int, regions: Sequence[tuple[int, int]]) -> None:
        """A table of (address, length) in guest memory, and where it is."""
        data = b"".join(
            struct.pack("<II", address, length & 0xFFFF | (number == len(regions) - 1) << 31)
            for number, (address, length) in enumerate(regions)
        )
        self.rig.ram[at : at + len(data)] = data
        self.set_master(4, at, 4)

    def is_busy(self) -> bool:
        return bool(self.alternate() & BSY)
