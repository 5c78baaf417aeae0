"""The disk benchmark's own driver; what it measures is not asserted."""

from __future__ import annotations

from devices.bus import BusType
from vmm.bench import disk


def test_it_reads_the_disk_both_ways() -> None:
    with disk.DiskBench(3) as bench:
        figures = bench.round()
        assert all(value > 0 for value in figures.values())
        assert {key.partition("_")[0] for key in figures} == {"shared", "granted", "ratio"}
        both = []
        for one in bench._disks.values():
            one.read(disk.BLOCK, [8])
            parts = one._machine.parts
            both.append(parts.memory.read(disk._DATA, disk.BLOCK))
            assert parts.buses[BusType.MMIO].unclaimed_reads == 0
        assert both[0] == both[1] != bytes(disk.BLOCK)
        assert [each._machine.parts.proxies[0].maps_memory for each in bench._disks.values()] == [
            True,
            False,
        ]
