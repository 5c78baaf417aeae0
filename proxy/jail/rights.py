"""What one device is permitted, for people: descriptors, system calls, memory, namespaces."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from proxy.jail.layers import JailReport, LayerState
from proxy.jail.plan import NAMESPACES
from proxy.jail.policy import COMMON, Policy, Rule

COMMON_CALLS = len({rule.syscall for rule in COMMON})


@dataclass(frozen=True)
class Rights:
    """The rights of one device.

    Attributes:
        descriptors: what is open in its process, beside /dev/null as 0, 1 and 2.
        system_calls: those beyond the common table, each with its conditions and its reason.
        guest_memory: bytes of it that are mapped there; 0 for a device without DMA.
        granted: bytes of the area in which it gets those of its requests; 0 without dma=granted.
        limits: resource limits as they were verified.
        namespaces: those that are its own.
    """

    descriptors: tuple[str, ...]
    system_calls: tuple[str, ...]
    guest_memory: int
    granted: int
    limits: str
    namespaces: tuple[str, ...]

    def lines(self) -> list[str]:
        """As text, a line for each."""
        memory = f"{self.guest_memory >> 20} MiB, read and write" if self.guest_memory else "none"
        if self.granted:
            memory += f"; its requests come in an area of {self.granted >> 20} MiB"
        calls = self.system_calls or ("none",)
        return [
            f"  descriptors   {', '.join(self.descriptors)}",
            f"  system calls  the common {COMMON_CALLS}; beyond them: {calls[0]}",
            *(f"                {call}" for call in calls[1:]),
            f"  guest memory  {memory}",
            f"  limits        {self.limits or 'none'}",
            f"  namespaces    {', '.join(self.namespaces) or 'none of its own'}",
        ]

    def data(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return {
            "descriptors": list(self.descriptors),
            "system_calls": list(self.system_calls),
            "guest_memory": self.guest_memory,
            "granted": self.granted,
            "limits": self.limits,
            "namespaces": list(self.namespaces),
        }


def rights_of(
    policy: Policy, report: JailReport, files: Iterable[str], guest_memory: int, granted: int = 0
) -> Rights:
    """The rights of a device.

    Args:
        policy: its model's.
        report: what its process found of its jail.
        files: the descriptors that it was given, in words.
        guest_memory: bytes of it that it maps.
        granted: bytes of the area of its grants.
    """
    descriptors = ["tube", "doorbell", *files]
    if guest_memory:
        descriptors.append("guest memory")
    if granted:
        descriptors.append("area of grants")
    found = {layer.name: layer for layer in report.layers}
    own = tuple(
        kind
        for layer, kind in NAMESPACES.items()
        if layer in found and found[layer].state is LayerState.ENFORCED
    )
    limits = found["rlimits"]
    return Rights(
        tuple(descriptors),
        tuple(_call(rule) for rule in policy.extra),
        guest_memory,
        granted,
        limits.detail if limits.state is LayerState.ENFORCED else "",
        own,
    )


def _call(rule: Rule) -> str:
    conditions = "".join(f", argument {arg.index} is {arg.value:#x}" for arg in rule.args)
    return f"{rule.syscall}{conditions} ({rule.reason})"
