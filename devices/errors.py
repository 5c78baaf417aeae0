"""The two kinds of error that are not bugs of the machine.

A third kind, the machine's own bugs, has no class here: those stay ordinary exceptions with a
traceback.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Subject:
    """What an error is about, so that whoever knows where that was written can say it.

    Attributes:
        option: as a user writes it, without dashes before it; "": the device as a whole.
        device: the name of the device that has the option, or its model where it has no name yet;
            "": it is an option of the command.
        index: which of its values, if an option of the command has several.
    """

    option: str = ""
    device: str = ""
    index: int = 0


class UserError(Exception):
    """Bad usage, configuration, image or snapshot: one clear line, exit code 2.

    Attributes:
        about: the options and devices that it is about; where several contradict each other, all.
    """

    def __init__(self, text: str = "", *about: Subject) -> None:
        super().__init__(text)
        self.about = about


@contextmanager
def concerning(*about: Subject) -> Iterator[None]:
    """What a `UserError` that is raised inside is about, unless it knows better.

    Raises:
        UserError: what was raised inside.
    """
    try:
        yield
    except UserError as error:
        error.about = error.about or about
        raise


class OptionError(ValueError):
    """Raised by a model's `Options`: values that cannot be.

    Attributes:
        options: their names.
    """

    def __init__(self, text: str, *options: str) -> None:
        super().__init__(text)
        self.options = options


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
