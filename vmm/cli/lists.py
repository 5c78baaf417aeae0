"""``guests`` and ``jail``: what there is, and what holds on this host."""

from __future__ import annotations

import argparse
import json


def guests(args: argparse.Namespace) -> int:
    """``python -m vmm guests``."""
    from guests import GUESTS

    if args.json:
        print(json.dumps({name: guest.summary for name, guest in GUESTS.items()}))
        return 0
    width = max(map(len, GUESTS))
    for name, guest in GUESTS.items():
        print(f"{name:{width}}  {guest.summary}")
    print("\nboot one with: python -m vmm boot NAME")
    return 0


def jail(args: argparse.Namespace) -> int:
    """``python -m vmm jail``."""
    import msgspec

    from proxy.jail import JailMode, JailReport, report_data, report_table
    from vmm.cli.output import clean
    from vmm.config import MachineConfig, default_devices, parse_device
    from vmm.machine import Machine

    devices = [device for device in default_devices() if device.isolated]
    for text in args.device:
        devices.append(parse_device(text, [device.name for device in devices]))
    config = MachineConfig(1 << 20, tuple(devices))
    with Machine(config, jail=JailMode(args.jail)) as machine:
        parts = machine.parts
        reports = {
            proxy.name: msgspec.convert(proxy.jail_report, JailReport) for proxy in parts.proxies
        }
        if args.json:
            print(json.dumps({"line": parts.jail_line, "devices": report_data(reports)}))
            return 0
        for line in report_table(reports):
            print(clean(line))
        if parts.jail_line:
            print(clean(parts.jail_line))
    return 0
