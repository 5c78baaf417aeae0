"""``guests``, ``devices`` and ``jail``: what there is, and what holds on this host."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from proxy.jail import Policy
    from vmm.config import DeviceConfig, MachineConfig


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


GENERAL_OPTIONS = (
    ("name", "TEXT", "a name that no other device has; the default is made of the model's"),
    ("addr", "number", "where its only bus region starts"),
    ("irq", "number", "the ISA interrupt line of its pin"),
    ("slot", "[BRIDGE:]DEVICE[.FUNCTION]", "its PCI slot; the default is the lowest that is free"),
    ("isolation", "jail|none", "none: no process of its own, all rights of this user"),
    ("dma", "shared|granted", "granted: of guest memory it gets its requests and nothing else"),
)


def devices(args: argparse.Namespace) -> int:
    """``python -m vmm devices``."""
    from dataclasses import asdict

    from devices import registry
    from devices.options import describe

    models = {name: registry.load(name) for name in sorted(registry.MODELS)}
    options = {name: describe(model.Options) for name, model in models.items()}
    if args.json:
        found = {
            name: {
                "summary": model.summary,
                "dma": model.dma,
                "grantable": model.grantable,
                "options": [asdict(each) for each in options[name]],
            }
            for name, model in models.items()
        }
        print(json.dumps(found))
        return 0
    for name, model in models.items():
        dma = "; does DMA" if model.dma else ""
        dma += ", dma=granted is possible" if model.grantable else ""
        print(f"{name}  {model.summary}{dma}")
        for each in options[name]:
            default = "" if not each.default else f" (default: {each.default})"
            needed = " (must be given)" if each.default is None else ""
            print(f"    {f'{each.name}={each.kind}':24}  {each.meaning}{default}{needed}")
    print("every model also takes")
    for option, kind, meaning in GENERAL_OPTIONS:
        print(f"    {f'{option}={kind}':24}  {meaning}")
    print("\nadd one with: python -m vmm boot --device MODEL[,OPTION=VALUE]...")
    return 0


def _policy(device: DeviceConfig) -> Policy:
    """What a device's process may ask of the kernel."""
    from devices import registry
    from devices.files import directories
    from proxy.jail import policy_for

    options = registry.parse_options(registry.load(device.model), device.options)
    policy = policy_for(device.model)
    return policy if all(directories(options).values()) else policy.reading()


def jail(args: argparse.Namespace) -> int:
    """``python -m vmm jail``."""
    from vmm.cli.given import Places
    from vmm.cli.shape import machine_config

    places = args.places or Places()
    with places.named():
        return _show_jail(args, machine_config(args, places))


def _show_jail(args: argparse.Namespace, config: MachineConfig) -> int:
    import msgspec

    from proxy.jail import JailMode, JailReport, report_data, report_table, rights_of
    from vmm.cli.output import clean
    from vmm.machine import Machine

    with Machine(config, jail=JailMode(args.jail)) as machine:
        parts = machine.parts
        reports = {
            proxy.name: msgspec.convert(proxy.jail_report, JailReport) for proxy in parts.proxies
        }
        rights = {
            proxy.name: rights_of(
                _policy(parts.wiring.attached[proxy.name].config),
                reports[proxy.name],
                parts.host_files.held.get(proxy.name, []),
                parts.memory.size if proxy.maps_memory else 0,
                proxy.granted_bytes,
            )
            for proxy in parts.proxies
        }
        if args.json:
            found = report_data(reports)
            for name, each in rights.items():
                found[name]["rights"] = each.data()
            print(json.dumps({"line": parts.jail_line, "devices": found}))
            return 0
        for line in report_table(reports):
            print(clean(line))
        for name, each in rights.items():
            print(f"\n{clean(name)} has")
            for line in each.lines():
                print(clean(line))
        if parts.jail_line:
            print(clean(parts.jail_line))
    return 0
