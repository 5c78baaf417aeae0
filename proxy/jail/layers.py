"""The layers of the jail: what each is for, and what a report says of each.

The names are the short words that reports, tables and error lines use; the order is that of the
table, which is nearly the order in which the child takes them on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final


class LayerState(StrEnum):
    """Does a layer hold? `MISSING`: it could not be had here. `OFF`: the jail is off."""

    ENFORCED = "enforced"
    MISSING = "missing"
    OFF = "off"


@dataclass(frozen=True)
class Layer:
    """One layer.

    Attributes:
        name: the short word.
        summary: one line: what it takes from the device.
        floor: it needs no privilege, so the machine never starts without it.
        mend: what the owner of the host can do if it is missing.
    """

    name: str
    summary: str
    floor: bool = False
    mend: str = ""


_USERNS_MEND: Final = (
    "allow user namespaces: sysctl user.max_user_namespaces > 0, and where they exist "
    "kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0; "
    "in a container, let its seccomp profile pass clone and unshare; do not start in a chroot"
)

LAYERS: Final[tuple[Layer, ...]] = (
    Layer("fds", "no descriptors but those it was given; 0, 1 and 2 are /dev/null", floor=True),
    Layer("session", "no controlling terminal, no signals from its keyboard", floor=True),
    Layer("userns", "a user namespace of its own: no capability over the host", mend=_USERNS_MEND),
    Layer("pidns", "a process namespace: sees and signals no process", mend=_USERNS_MEND),
    Layer("mountns", "a mount namespace: its mounts are its own", mend=_USERNS_MEND),
    Layer("netns", "a network namespace: no interface, no route", mend=_USERNS_MEND),
    Layer("ipcns", "an IPC namespace: no System V or POSIX queues of others", mend=_USERNS_MEND),
    Layer("utsns", "a UTS namespace: cannot rename the host", mend=_USERNS_MEND),
    Layer(
        "root",
        "an empty read-only root directory, or the one that it shares; no other file is there",
        mend=_USERNS_MEND,
    ),
    Layer(
        "uid",
        "never root: started by root, it is a user who owns nothing, or what it shares",
        mend="start the machine as an ordinary user, or give it CAP_SETUID and CAP_SETGID",
    ),
    Layer("rlimits", "small limits: descriptors, processes, memory, files, cores", floor=True),
    Layer("nnp", "no_new_privs: nothing that it runs can gain privileges", floor=True),
    Layer(
        "landlock",
        "no file but of what it shares, TCP port, foreign signal, abstract socket is reached",
        mend="use a kernel 5.13 or later with landlock in its lsm= list",
    ),
    Layer("caps", "no capability in any set", floor=True),
    Layer("seccomp", "only the system calls of its policy", floor=True),
    Layer(
        "notify",
        "a forbidden system call is reported by name before the device is killed",
        mend="use a kernel 5.0 or later; some containers forbid seccomp listeners",
    ),
    Layer("pdeath", "it dies with the process that started it; it cannot be inspected", floor=True),
)
"""All layers, in the order of the tables."""

BY_NAME: Final[Mapping[str, Layer]] = {layer.name: layer for layer in LAYERS}
"""The layers by their short names."""


def layers() -> tuple[Layer, ...]:
    """All layers, in the order of the tables."""
    return LAYERS


@dataclass
class LayerReport:
    """What was found of one layer, from inside.

    Attributes:
        name: the layer's short name.
        state: whether it holds.
        detail: what was tried or seen, or why it is missing; "" if there is nothing to say.
    """

    name: str
    state: LayerState
    detail: str = ""


@dataclass
class JailReport:
    """What a device's process found of its own jail, after it was up.

    Attributes:
        mode: auto, strict or off.
        layers: one report for each layer, in the order of `LAYERS`.
        microseconds: what entering and checking cost.
    """

    mode: str
    layers: list[LayerReport] = field(default_factory=list)
    microseconds: int = 0

    def state(self, name: str) -> LayerState:
        """The state of one layer. Raises KeyError."""
        for layer in self.layers:
            if layer.name == name:
                return layer.state
        raise KeyError(name)


_MARKS: Final = {LayerState.ENFORCED: "yes", LayerState.MISSING: "NO", LayerState.OFF: "off"}


def report_table(reports: Mapping[str, JailReport]) -> list[str]:
    """The table of `vmm jail` as lines of text: a row for each layer, a column for each device.

    Below it stand the details of what is missing and what each layer is for.
    """
    devices = list(reports)
    width = max(len(layer.name) for layer in LAYERS)
    widths = [max(len(device), 3) for device in devices]
    lines = [
        _row("layer", devices, width, widths, "what it takes from the device"),
        _row("-" * width, ["-" * w for w in widths], width, widths, "-" * 29),
    ]
    for layer in LAYERS:
        marks = [_MARKS[reports[device].state(layer.name)] for device in devices]
        lines.append(_row(layer.name, marks, width, widths, layer.summary))
    lines.extend(_details(reports))
    return lines


def report_data(reports: Mapping[str, JailReport]) -> dict[str, Any]:
    """The same as plain values for JSON: device -> layer -> {state, detail}."""
    return {
        device: {
            "mode": report.mode,
            "microseconds": report.microseconds,
            "layers": {
                layer.name: {"state": layer.state.value, "detail": layer.detail}
                for layer in report.layers
            },
        }
        for device, report in reports.items()
    }


def _row(name: str, cells: Sequence[str], width: int, widths: Sequence[int], summary: str) -> str:
    columns = "  ".join(cell.center(w) for cell, w in zip(cells, widths, strict=True))
    return f"{name:<{width}}  {columns}  {summary}".rstrip()


def _details(reports: Mapping[str, JailReport]) -> list[str]:
    found: dict[str, list[str]] = {}
    for device, report in reports.items():
        for layer in report.layers:
            if layer.state is LayerState.MISSING:
                found.setdefault(f"{layer.name}: {layer.detail}", []).append(device)
    return [f"missing {what} ({', '.join(devices)})" for what, devices in found.items()]
