"""A session's states, and which message may follow in which; no IO.

`AFTER` is the whole contract as one table: a command that a state has no entry for is an error,
by the machine if its end says so, a protocol fault if the child's end sees it. A command changes
the state when it is done; one that was refused changes nothing.
"""

from __future__ import annotations

import enum

from proxy import messages as m
from proxy.errors import Misuse, ProtocolFault


class State(enum.Enum):
    """Where a device process is in its life."""

    NEW = "not activated"
    ACTIVE = "active"
    ASLEEP = "asleep"
    DESTROYED = "destroyed"
    CLOSED = "shut down"


_KEEP_ACTIVE: tuple[type[m.Message], ...] = (
    m.Read,
    m.Write,
    m.SyncedWrite,
    m.TakeAhead,
    m.ReadConfig,
    m.WriteConfig,
    m.InitPciConfigMapping,
    m.MapGuestMemory,
    m.MapGrants,
    m.ReadVirtualConfig,
    m.WriteVirtualConfig,
    m.GetRanges,
    m.Snapshot,
    m.Restore,
    m.Wake,
    m.Sync,
    m.Input,
    m.Adjust,
    m.LaneOpen,
    m.LaneClose,
)
_KEEP_ASLEEP: tuple[type[m.Message], ...] = (
    m.Sleep,
    m.Snapshot,
    m.Restore,
    m.GetRanges,
    m.ReadConfig,
    m.InitPciConfigMapping,
    m.LaneClose,
)
_KEEP_DESTROYED: tuple[type[m.Message], ...] = (
    m.Read,
    m.Write,
    m.SyncedWrite,
    m.TakeAhead,
    m.ReadConfig,
    m.WriteConfig,
    m.ReadVirtualConfig,
    m.WriteVirtualConfig,
    m.GetRanges,
    m.Sync,
    m.DestroyDevice,
    m.LaneClose,
)

AFTER: dict[tuple[State, type[m.Message]], State] = {
    (State.NEW, m.Activate): State.ACTIVE,
    **{(State.ACTIVE, each): State.ACTIVE for each in _KEEP_ACTIVE},
    (State.ACTIVE, m.Sleep): State.ASLEEP,
    (State.ACTIVE, m.DestroyDevice): State.DESTROYED,
    (State.ACTIVE, m.Shutdown): State.CLOSED,
    **{(State.ASLEEP, each): State.ASLEEP for each in _KEEP_ASLEEP},
    (State.ASLEEP, m.Wake): State.ACTIVE,
    (State.ASLEEP, m.DestroyDevice): State.DESTROYED,
    (State.ASLEEP, m.Shutdown): State.CLOSED,
    **{(State.DESTROYED, each): State.DESTROYED for each in _KEEP_DESTROYED},
    (State.DESTROYED, m.Shutdown): State.CLOSED,
}

SPONTANEOUS = frozenset({State.ACTIVE, State.DESTROYED})
"""States in which a child may speak while no command of it is unanswered.

Asleep is not among them: that is what makes a snapshot complete.
"""


class MachineSession:
    """The machine's end: it asks, and judges what comes back."""

    def __init__(self) -> None:
        self.state = State.NEW
        self.awaiting: type[m.Message] | None = None

    def command(self, kind: type[m.Message]) -> None:
        """A command of this kind is about to be sent.

        Raises:
            Misuse: not in this state, or an earlier one is still unanswered.
        """
        after = AFTER.get((self.state, kind))
        if after is None:
            raise Misuse(f"{kind.__name__} is not for a device that is {self.state.value}")
        if self.awaiting is not None:
            raise Misuse(f"{kind.__name__} while {self.awaiting.__name__} is unanswered")
        if kind.reply is None:
            self.state = after
        else:
            self.awaiting = kind

    def received(self, kind: type[m.Message]) -> bool:
        """A message of this kind came from the child; True if it answers the command.

        Raises:
            ProtocolFault: it must not come now.
        """
        if kind.opcode >= 0x80:
            if kind is m.LastWords:
                return False
            if self.awaiting is None and self.state not in SPONTANEOUS:
                raise ProtocolFault(f"{kind.__name__} while it is {self.state.value}")
            return False
        asked = self.awaiting
        if asked is None:
            raise ProtocolFault(f"{kind.__name__} that nobody asked for")
        if kind is asked.reply:
            self.state = AFTER[self.state, asked]
        elif not (kind is m.Refused and asked.refusable):
            raise ProtocolFault(f"{kind.__name__} as the answer to {asked.__name__}")
        self.awaiting = None
        return True


class ChildSession:
    """The child's end: it is asked, and refuses to be asked out of turn."""

    def __init__(self) -> None:
        self.state = State.NEW

    def command(self, kind: type[m.Message]) -> None:
        """A command of this kind arrived.

        Raises:
            ProtocolFault: not in this state; among others a second `Activate`.
        """
        if (self.state, kind) not in AFTER:
            raise ProtocolFault(f"{kind.__name__} for a device that is {self.state.value}")

    def done(self, kind: type[m.Message]) -> None:
        """It was carried out, not refused."""
        self.state = AFTER[self.state, kind]
