"""Device start and memory, snapshot and restore, and what an idle machine costs."""

from __future__ import annotations

import os
import random
import tempfile
from pathlib import Path
from time import perf_counter, process_time

from proxy.device import ProxyDevice
from vmm.machine import Machine

TOUCHED = 8 << 20
IDLE_SECONDS = 2.0


def device_start() -> dict[str, float]:
    """One more jailed echo device in a running machine: milliseconds until it is active, MiB."""
    with Machine(memory="16M") as machine:
        machine.boot("hello")
        machine.run()
        parts = machine.parts
        began = perf_counter()
        proxy = ProxyDevice(parts.warden.spawn("measured", "echo", {}), parts.wiring)
        took = perf_counter() - began
        try:
            private = _private_bytes(proxy.pid)
        finally:
            proxy.shutdown()
    return {"start_ms": took * 1e3, "private_mib": private / (1 << 20)}


def _private_bytes(pid: int) -> float:
    """Memory that this process shares with nobody; NaN where the host does not tell us."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except PermissionError:
        return float("nan")
    return 1024.0 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def snapshot_and_restore() -> dict[str, float]:
    """A 128 MiB guest with 8 MiB of incompressible data: milliseconds to save and to restore."""
    with tempfile.TemporaryDirectory(prefix="vmm-bench-") as place:
        saved = Path(place) / "snapshot"
        with Machine(memory="128M") as machine:
            machine.boot("counter")
            machine.run(until="counter 1\n", timeout=30)
            machine.parts.memory.write(64 << 20, random.Random(1).randbytes(TOUCHED))
            began = perf_counter()
            machine.snapshot(saved)
            save = perf_counter() - began
        disk = sum(file.stat().st_blocks * 512 for file in saved.rglob("*"))
        began = perf_counter()
        restored = Machine.restore(saved)
        restore = perf_counter() - began
        restored.close()
    return {"save_ms": save * 1e3, "restore_ms": restore * 1e3, "disk_mib": disk / (1 << 20)}


def idle_cpu() -> float:
    """Percent of one CPU that a machine and its device processes use while the guest waits."""
    with Machine(memory="16M") as machine:
        machine.boot("serial-echo")
        machine.run(timeout=0.5)
        pids = [proxy.pid for proxy in machine.parts.proxies]
        before = process_time() + sum(map(_cpu_seconds, pids))
        machine.run(timeout=IDLE_SECONDS)
        after = process_time() + sum(map(_cpu_seconds, pids))
    return (after - before) / IDLE_SECONDS * 100


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
