"""Which layers this host permits, decided once; every device then gets exactly those or none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from devices.errors import Subject, UserError
from proxy.jail.layers import BY_NAME, LAYERS
from proxy.jail.policy import Scope

NAMESPACES: Final[Mapping[str, str]] = {
    "userns": "user",
    "pidns": "pid",
    "mountns": "mnt",
    "netns": "net",
    "ipcns": "ipc",
    "utsns": "uts",
}
"""The namespace layers, and the name of each in /proc/self/ns."""


class JailMode(StrEnum):
    """How much jail is asked for.

    AUTO: all that the host permits, and never less than the floor. STRICT: all or nothing.
    OFF: none, for debugging.
    """

    AUTO = "auto"
    STRICT = "strict"
    OFF = "off"


class JailUnavailable(UserError):
    """The jail that was asked for cannot be had on this host.

    Attributes:
        missing: the short names of the layers that are not there.
        exit_status: what the command line makes of it.
    """

    exit_status = 10

    def __init__(self, message: str, missing: tuple[str, ...], *about: Subject) -> None:
        super().__init__(message, Subject("jail"), *about)
        self.missing = missing


class JailError(Exception):
    """A layer that the plan promises could not be put up, or did not hold when it was tried.

    The device's process must end: it is never run with less than the plan says.
    """

    def __init__(self, layer: str, reason: str) -> None:
        super().__init__(f"jail layer {layer}: {reason}")
        self.layer = layer
        self.reason = reason


@dataclass(frozen=True)
class JailPlan:
    """What every device of this machine gets.

    Attributes:
        mode: what was asked for.
        missing: the layers that cannot be had, and why.
        landlock_abi: the version of Landlock to use; 0 if it is missing.
        host_namespaces: inode of each namespace of the machine, to be told apart from.
    """

    mode: JailMode
    missing: Mapping[str, str] = field(default_factory=dict)
    landlock_abi: int = 0
    host_namespaces: Mapping[str, int] = field(default_factory=dict)

    def has(self, layer: str) -> bool:
        """Will this layer be put up?"""
        return self.mode is not JailMode.OFF and layer not in self.missing

    def scopes(self) -> frozenset[Scope]:
        """Which conditional lines of the policies hold."""
        scopes = {Scope.EMPTY_ROOT if self.has("root") else Scope.HOST_ROOT}
        if self.has("pidns"):
            scopes.add(Scope.OWN_PIDS)
        return frozenset(scopes)

    def one_line(self) -> str:
        """What a user must be told at start: "" if every layer is there."""
        if self.mode is JailMode.OFF:
            return "jail: OFF (--jail=off): devices run with all the rights of this user"
        if not self.missing:
            return ""
        return f"jail: not available on this host: {self._reasons()} (the other layers hold)"

    def _reasons(self) -> str:
        """The missing layers, those of one reason together."""
        by_reason: dict[str, list[str]] = {}
        for layer in LAYERS:
            if layer.name in self.missing:
                by_reason.setdefault(self.missing[layer.name], []).append(layer.name)
        return "; ".join(f"{', '.join(names)} ({why})" for why, names in by_reason.items())

    def check(self) -> None:
        """Refuse a plan that gives less than its mode promises.

        Raises:
            JailUnavailable: one line with each missing layer, the reason and the mend.
        """
        if self.mode is JailMode.OFF:
            return
        needed = [layer.name for layer in LAYERS if layer.floor]
        if "root" in self.missing:
            needed.append("landlock")
        if self.mode is JailMode.STRICT:
            needed = [layer.name for layer in LAYERS]
        lacking = tuple(name for name in needed if name in self.missing)
        if not lacking:
            return
        mends = dict.fromkeys(BY_NAME[name].mend for name in lacking if BY_NAME[name].mend)
        if "landlock" in lacking and self.mode is JailMode.AUTO:
            mends |= {BY_NAME["root"].mend: None}
        what = "--jail=strict" if self.mode is JailMode.STRICT else "the floor of the jail"
        reasons = JailPlan(self.mode, {n: self.missing[n] for n in lacking})._reasons()
        mend = "; or ".join(mends) or "use --jail=off for debugging only"
        raise JailUnavailable(
            f"{what} cannot be had on this host: missing {reasons}. To mend: {mend}", lacking
        )
