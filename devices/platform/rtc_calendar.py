"""The time-of-day registers of an MC146818A as bytes, and the seconds that they mean.

Registers in the order of `TIME`: seconds, minutes, hours, day of the week, day, month, year
(MC146818A data sheet, "Address Map" and table 3), and the century, which a PC keeps in its RAM.

Guest values that are no time are taken as the nearest that is: the chip itself would count on from
them in a way that its data sheet leaves open.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

DAY = 86_400
_CYCLE_DAYS, _CYCLE_YEARS = 146_097, 400
"""The Gregorian calendar repeats itself after so many days."""
_EPOCH = 719_468
"""Days from 0000-03-01 to 1970-01-01."""
PM = 0x80
"""In the hours register of 12-hour mode."""


def days_from_date(year: int, month: int, day: int) -> int:
    """Days since 1970-01-01, in the proleptic Gregorian calendar."""
    year -= month <= 2
    # Years begin in March here, so that the leap day is the last of its year.
    months = (month + 9) % 12
    return (
        year * 365
        + year // 4
        - year // 100
        + year // 400
        + (153 * months + 2) // 5
        + day
        - 1
        - _EPOCH
    )


def date_from_days(days: int) -> tuple[int, int, int]:
    """Year, month and day; the inverse of `days_from_date`."""
    cycle, days = divmod(days + _EPOCH, _CYCLE_DAYS)
    year = (days - days // 1460 + days // 36_524 - days // 146_096) // 365
    days -= year * 365 + year // 4 - year // 100
    months = (5 * days + 2) // 153
    day = days - (153 * months + 2) // 5 + 1
    month = (months + 2) % 12 + 1
    return cycle * _CYCLE_YEARS + year + (month <= 2), month, day


class Format:
    """How the registers say numbers: the bits DM and 24/12 of register B.

    Args:
        binary: binary, else BCD.
        hours24: 0..23, else 1..12 with PM in bit 7.
    """

    __slots__ = ("binary", "hours24")

    def __init__(self, binary: bool, hours24: bool) -> None:
        self.binary = binary
        self.hours24 = hours24

    def number(self, byte: int) -> int:
        return byte if self.binary else (byte >> 4) * 10 + (byte & 0xF)

    def byte(self, number: int) -> int:
        return number if self.binary else number // 10 << 4 | number % 10

    def hour(self, byte: int) -> int:
        """The hour, 0..23 if the byte is one."""
        if self.hours24:
            return self.number(byte)
        return self.number(byte & ~PM) % 12 + (12 if byte & PM else 0)

    def hour_byte(self, hour: int) -> int:
        if self.hours24:
            return self.byte(hour)
        return self.byte(hour % 12 or 12) | (PM if hour >= 12 else 0)

    def encode(self, seconds: int, weekday: int) -> list[int]:
        """The eight registers.

        Args:
            seconds: since 1970.
            weekday: what the day-of-week counter is ahead of the calendar's, 0..6.
        """
        days, second = divmod(seconds, DAY)
        year, month, day = date_from_days(days)
        return [
            self.byte(second % 60),
            self.byte(second // 60 % 60),
            self.hour_byte(second // 3600),
            (days + 4 + weekday) % 7 + 1,  # 1970-01-01 was a Thursday, day 5
            self.byte(day),
            self.byte(month),
            self.byte(year % 100),
            self.byte(year // 100 % 100),
        ]

    def decode(self, registers: Sequence[int]) -> tuple[int, int]:
        """What `encode` was given; the nearest time if the registers say none."""
        number = self.number
        second, minute = min(number(registers[0]), 59), min(number(registers[1]), 59)
        hour = min(self.hour(registers[2]), 23)
        month = min(max(number(registers[5]), 1), 12)
        year = min(number(registers[7]), 99) * 100 + min(number(registers[6]), 99)
        first = days_from_date(year, month, 1)
        length = days_from_date(year + month // 12, month % 12 + 1, 1) - first
        days = first + min(max(number(registers[4]), 1), length) - 1
        weekday = (registers[3] - 1 - (days + 4)) % 7
        return days * DAY + hour * 3600 + minute * 60 + second, weekday

    def alarm_after(self, second: int, alarm: Sequence[int]) -> int | None:
        """Seconds from `second` of a day until the alarm matches next, 1..86400.

        Args:
            alarm: seconds, minutes, hours; bytes from 0xC0 up match anything ("Alarm Bytes").

        Returns:
            None: no time of day matches.
        """
        seconds = _matches(alarm[0], 60, self.byte)
        minutes = _matches(alarm[1], 60, self.byte)
        hours = _matches(alarm[2], 24, self.hour_byte)
        if not (seconds and minutes and hours):
            return None
        for hour in (*hours, *(hour + 24 for hour in hours)):
            if hour * 3600 + 3599 <= second:
                continue
            for minute in minutes:
                start = hour * 3600 + minute * 60
                if start + 59 <= second:
                    continue
                for each in seconds:
                    if start + each > second:
                        return start + each - second
        return None


def _matches(byte: int, count: int, encode: Callable[[int], int]) -> Sequence[int]:
    if byte >= 0xC0:
        return range(count)
    return [value for value in range(count) if encode(value) == byte]
