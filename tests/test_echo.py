"""The echo device."""

from __future__ import annotations

import pytest
from fakes import FakeHost

from devices.echo import Echo
from devices.errors import DeviceError


@pytest.fixture
def echo() -> Echo:
    return Echo(FakeHost())


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_reads_back_what_was_written_at_every_offset(echo: Echo, size: int) -> None:
    for offset in range(8 - size + 1):
        value = int.from_bytes(bytes(range(0xA0 + offset, 0xA0 + offset + size)), "little")
        echo.write(offset, size, value)
        assert echo.read(offset, size) == value


def test_a_write_changes_only_its_own_bytes(echo: Echo) -> None:
    echo.write(0, 8, 0x8877665544332211)
    echo.write(2, 2, 0xAABB)
    assert echo.read(0, 8) == 0x88776655AABB2211


def test_bytes_are_little_endian(echo: Echo) -> None:
    echo.write(0, 4, 0x44332211)
    assert [echo.read(offset, 1) for offset in range(4)] == [0x11, 0x22, 0x33, 0x44]


def test_snapshot_carries_the_register_to_another_device(echo: Echo) -> None:
    echo.write(0, 8, 0x0123456789ABCDEF)
    twin = Echo(FakeHost())
    twin.restore(echo.snapshot())
    assert twin.read(0, 8) == 0x0123456789ABCDEF


def test_a_register_of_another_size_is_refused(echo: Echo) -> None:
    echo.write(0, 8, 5)
    with pytest.raises(DeviceError, match="8 bytes"):
        echo.restore({"data": "AAAA"})
    assert echo.read(0, 8) == 5
