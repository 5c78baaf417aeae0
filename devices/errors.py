"""The two kinds of error that are not bugs of the machine.

A third kind, the machine's own bugs, has no class here: those stay ordinary exceptions with a
traceback.
"""

from __future__ import annotations


class UserError(Exception):
    """Bad usage, configuration, image or snapshot: one clear line, exit code 2."""


class DeviceError(Exception):
    """A device refused a request, for example a state that it cannot restore.

    The device itself is still there; `DeviceFailure` is what says that it is not.
    """

    def __init__(self, device: str, reason: str) -> None:
        super().__init__(f"device '{device}': {reason}")
        self.device = device
        self.reason = reason


class DeviceFailure(DeviceError):
    """A device that died, hung or broke the protocol; from now on it answers all-ones.

    Attributes:
        device: the device's configured name.
        reason: what happened, one line.
        doing: what the machine had asked of it, or "" when it was idle.
        given_up: whether it is not to blame: the machine was to end and did not wait for it.
    """

    def __init__(
        self, device: str, reason: str, doing: str = "", *, given_up: bool = False
    ) -> None:
        super().__init__(device, reason + (f" (during {doing})" if doing else ""))
        self.doing = doing
        self.given_up = given_up
