"""pvpanic: what the guest writes, and what becomes of it."""

from __future__ import annotations

from fakes import FakeHost

from devices.pvpanic import PvPanic


def test_events() -> None:
    host = FakeHost()
    device = PvPanic(host)
    assert device.read_config(0) == 0x0011_1B36
    assert device.read_bar(0, 0, 1) == 3
    for offset, value in ((0, 0), (0, 4), (1, 1), (8, 1)):
        device.write_bar(0, offset, 1, value)
    assert host.calls == []
    device.write_bar(0, 0, 1, 2)
    assert host.count("request_exit") == 0
    assert host.count("log") == 1
    device.write_bar(0, 0, 1, 1)
    assert ("request_exit", 1) in host.calls
