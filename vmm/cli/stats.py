"""Where accesses and time went: ``--stats`` and the escape menu's status."""

from __future__ import annotations

import dataclasses
import os
import time
from typing import Any

from vmm.machine import Machine


def stats_values(machine: Machine) -> dict[str, Any]:
    """All statistics of a machine as plain values."""
    parts = machine.parts
    devices: dict[str, Any] = {}
    for kind, bus in parts.buses.items():
        for name, stats in bus.stats().items():
            devices.setdefault(name, {})[str(kind)] = {
                "reads": stats.reads,
                "writes": stats.writes,
                "read_us": round(stats.read_ns / 1000, 3),
                "write_us": round(stats.write_ns / 1000, 3),
            }
    for proxy in parts.proxies:
        devices.setdefault(proxy.name, {})["process"] = {
            "pid": proxy.pid,
            "failed": None if proxy.failed is None else str(proxy.failed),
            **dataclasses.asdict(proxy.stats()),
        }
    return {
        "seconds": _seconds(machine),
        "vcpu": {
            "executed_bytes": parts.cpu.executed if parts.cpu.counts else None,
            **dataclasses.asdict(parts.vcpu.stats),
        },
        "placement": parts.placement.describe(),
        "unclaimed": {
            name: {"reads": space.unclaimed_reads, "writes": space.unclaimed_writes}
            for name, space in parts.spaces().items()
        },
        "pci_problems": parts.pci.problems(),
        "devices": devices,
    }


def _seconds(machine: Machine) -> dict[str, Any]:
    """Where the time went: nothing is counted twice, so it adds up."""
    parts = machine.parts
    vcpu, traps = parts.vcpu.stats, parts.cpu.traps
    devices: dict[str, float] = {}
    for bus in parts.buses.values():
        for name, stats in bus.stats().items():
            devices[name] = devices.get(name, 0.0) + (stats.read_ns + stats.write_ns) / 1e9
    exceptions = traps.ns / 1e9
    in_engine = vcpu.executing - exceptions - sum(devices.values())
    return {
        "start_up": round(_age() - vcpu.total, 6),
        "engine": round(max(in_engine, 0.0), 6),
        "exceptions": round(exceptions, 6),
        "exceptions_count": traps.count,
        "devices": {name: round(value, 6) for name, value in devices.items() if value},
        "idle": round(vcpu.idle, 6),
        "machine": round(max(vcpu.total - vcpu.executing - vcpu.idle, 0.0), 6),
    }


def _age() -> float:
    """Seconds since this process started (proc(5), field 22 of stat)."""
    with open("/proc/self/stat") as file:
        started = int(file.read().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")


def stats_lines(values: dict[str, Any]) -> list[str]:
    """The same for people."""
    vcpu, spent = values["vcpu"], values["seconds"]
    busiest = sorted(spent["devices"].items(), key=lambda item: -item[1])
    executed = (
        "" if vcpu["executed_bytes"] is None else f"{vcpu['executed_bytes']:,} bytes of code in "
    )
    lines = [
        f"time: start-up and end {spent['start_up']:.3f} s, engine {spent['engine']:.3f} s, "
        f"exceptions {spent['exceptions']:.3f} s "
        f"({spent['exceptions_count']} in Python, the others are in the engine's time), "
        f"devices {sum(spent['devices'].values()):.3f} s, idle {spent['idle']:.3f} s, "
        f"the machine's loop {spent['machine']:.3f} s",
        *(
            [f"time in devices: {', '.join(f'{name} {used:.3f} s' for name, used in busiest)}"]
            if busiest
            else []
        ),
        f"vcpu: {executed}{vcpu['slices']} slices, "
        f"{vcpu['interrupts']} interrupts, idle {vcpu['idle']:.3f} s",
        f"placement: {values['placement']}",
    ]
    for kind, counts in values["unclaimed"].items():
        if counts["reads"] or counts["writes"]:
            lines.append(f"unclaimed {kind}: {counts['reads']} reads, {counts['writes']} writes")
    lines += [f"pci: {problem}" for problem in values["pci_problems"]]
    for name, device in values["devices"].items():
        parts = [
            f"{kind} {_count(device[kind], 'read')}, {_count(device[kind], 'write')}"
            for kind in ("pio", "mmio")
            if kind in device
        ]
        process = device.get("process")
        if process is not None:
            told = ", ".join(
                f"{key.replace('_', ' ')} {value}"
                for key, value in process.items()
                if value and key != "failed"
            )
            parts.append(f"process: {told}")
            if process["failed"]:
                parts.append(f"FAILED: {process['failed']}")
        lines.append(f"{name}: " + "; ".join(parts))
    return lines


def _count(stats: dict[str, Any], what: str) -> str:
    number, spent = stats[f"{what}s"], stats[f"{what}_us"]
    each = f" ({spent / number:.1f} us each)" if number and spent else ""
    return f"{number} {what}s{each}"


def status_lines(machine: Machine, seconds: float) -> list[str]:
    """What the escape menu's status shows."""
    state = "suspended" if machine.suspended else "running"
    failed = [proxy.name for proxy in machine.parts.proxies if proxy.failed is not None]
    head = f"{state} for {seconds:.1f} s" + (f"; failed: {', '.join(failed)}" if failed else "")
    return [head, *stats_lines(stats_values(machine))]
