"""Where accesses and time went: ``--stats`` and the escape menu's status."""

from __future__ import annotations

import dataclasses
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
        "vcpu": {"executed_bytes": parts.cpu.executed, **dataclasses.asdict(parts.vcpu.stats)},
        "placement": parts.placement.describe(),
        "unclaimed": {
            str(kind): {"reads": bus.unclaimed_reads, "writes": bus.unclaimed_writes}
            for kind, bus in parts.buses.items()
        },
        "pci_problems": parts.pci.problems(),
        "devices": devices,
    }


def stats_lines(values: dict[str, Any]) -> list[str]:
    """The same for people."""
    vcpu = values["vcpu"]
    lines = [
        f"vcpu: {vcpu['executed_bytes']:,} bytes of code in {vcpu['slices']} slices, "
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
    number, time = stats[f"{what}s"], stats[f"{what}_us"]
    each = f" ({time / number:.1f} us each)" if number and time else ""
    return f"{number} {what}s{each}"


def status_lines(machine: Machine, seconds: float) -> list[str]:
    """What the escape menu's status shows."""
    state = "suspended" if machine.suspended else "running"
    failed = [proxy.name for proxy in machine.parts.proxies if proxy.failed is not None]
    head = f"{state} for {seconds:.1f} s" + (f"; failed: {', '.join(failed)}" if failed else "")
    return [head, *stats_lines(stats_values(machine))]
