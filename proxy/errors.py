"""Who erred: the peer (`ProtocolFault`) or the caller on this side (`Misuse`).

Bad configuration and refusals are `UserError` and `DeviceError` of `devices.errors`. A fault of a
child never leaves this room as an exception: it becomes that device's `DeviceFailure`.
"""

from __future__ import annotations


class ProtocolFault(Exception):
    """The peer sent what it must not: malformed, oversized, or not now."""


class TubeClosed(Exception):
    """The peer's end of the tube is gone."""


class Misuse(RuntimeError):
    """A caller in this process asked for what the session's state does not allow."""
