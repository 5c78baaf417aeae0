"""The debug-exit port."""

from __future__ import annotations

import pytest
from fakes import FakeHost

from devices.bus import BusType
from devices.debug_exit import DebugExit


def test_region_is_that_of_isa_debug_exit() -> None:
    (region,) = DebugExit(FakeHost()).regions()
    assert (region.bus, region.start, region.length) == (BusType.PIO, 0xF4, 4)


@pytest.mark.parametrize(
    ("offset", "size", "value"),
    [(0, 1, 0), (0, 1, 0xFF), (3, 1, 7), (0, 2, 0xBEEF), (2, 2, 1), (0, 4, 0xDEAD_BEEF)],
)
def test_write_asks_for_exit_with_the_value(offset: int, size: int, value: int) -> None:
    host = FakeHost()
    DebugExit(host).write(offset, size, value)
    assert host.calls == [("request_exit", value)]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_read_gives_zero_and_asks_for_nothing(size: int) -> None:
    host = FakeHost()
    assert DebugExit(host).read(0, size) == 0
    assert host.calls == []
