"""One ATA drive: what it does besides moving sectors.

Source: ATA/ATAPI-6, chapter 8; see `registers`.
"""

from __future__ import annotations

from devices.ata.drive_state import MULTIPLES, Phase, Power
from devices.ata.identify import (
    MWDMA_MODES,
    PIO_MODES,
    UDMA_MODES,
    Geometry,
    Settings,
    identify,
)
from devices.ata.registers import ABRT, DRQ, HEAD, READY, UNC, Command
from devices.ata.transfers import Transfers

_MODES = {0: 1, 1: PIO_MODES, 4: MWDMA_MODES, 8: UDMA_MODES}
"""SET FEATURES, table 45: kinds of transfer modes and the last of each."""


class Drive(Transfers):
    """One drive; its arguments are those of `Transfers`."""

    def _identify(self, _: Command) -> None:
        state = self.state
        cylinders = min(state.capacity // (state.heads * state.sectors), 0xFFFF)
        settings = Settings(
            Geometry(cylinders, state.heads, state.sectors),
            state.multiple,
            state.mode,
            state.write_cache,
            state.look_ahead,
        )
        state.buffer = bytearray(identify(state.capacity, self._serial, settings))
        state.phase = Phase.IN
        state.status, state.interrupt = READY | DRQ, True

    def _verify(self, command: Command) -> None:
        count = self._sector_count(command)
        sector = self._address(command, count)
        if sector is None:
            return
        self.state.power = Power.ACTIVE
        try:
            self.medium.verify(sector, count)
        except OSError as error:
            self.medium.tell(error)
            self._fail(UNC, sector)
        else:
            self._done()

    def _seek(self, command: Command) -> None:
        if self._address(command, 1) is not None:
            self._done()

    def _initialize(self, _: Command) -> None:
        state = self.state
        if not state.count & 0xFF:
            self._fail(ABRT)
            return
        state.heads, state.sectors = (state.device & HEAD) + 1, state.count & 0xFF
        self._done()

    def _set_multiple(self, _: Command) -> None:
        wanted = self.state.count & 0xFF
        if wanted not in MULTIPLES:
            self._fail(ABRT)
            return
        self.state.multiple = wanted
        self._done()

    def _set_features(self, _: Command) -> None:
        """8.46."""
        state = self.state
        match state.features & 0xFF:
            case 0x02:
                state.write_cache = True
            case 0x82:
                state.write_cache = False
                self._flush()
                return
            case 0x03:
                mode = state.count & 0xFF
                if mode & 7 > _MODES.get(mode >> 3, -1):
                    self._fail(ABRT)
                    return
                state.mode = mode
            case 0x55 | 0xAA as code:
                state.look_ahead = code == 0xAA
            case 0x66 | 0xCC:
                pass  # settings outlive a software reset in any case
            case _:
                self._fail(ABRT)
                return
        self._done()

    def _stand_by(self, _: Command) -> None:
        """The timer of the form without IMMEDIATE never runs out: nothing is gained by it."""
        self.state.power = Power.STANDBY
        self._flush()

    def _idle(self, _: Command) -> None:
        self.state.power = Power.IDLE
        self._done()

    def _check_power(self, _: Command) -> None:
        """8.7."""
        mode = {Power.STANDBY: 0x00, Power.IDLE: 0x80}.get(self.state.power, 0xFF)
        self.state.count = mode
        self._done()

    def _fall_asleep(self, _: Command) -> None:
        self.state.power = Power.SLEEP
        self._flush()
