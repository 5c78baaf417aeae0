"""What a user gave for a device, disk or network card, in words or as a table of a machine file.

``echo,addr=0xF00`` and ``[[device]]`` with its keys come to the same; only what messages say of
their place differs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from devices.errors import Subject, UserError
from vmm.config import split_options, switches


@dataclass(frozen=True)
class Given:
    """One device, disk or network card.

    Attributes:
        values: by option; the first word has the key that `WORDS` says.
        place: "--disk a.img" or "config machine.toml".
        line: of the machine file where it begins; 0: it is from the command line.
        lines: of its keys.
    """

    values: Mapping[str, Any]
    place: str
    line: int = 0
    lines: Mapping[str, int] = field(default_factory=dict)

    def line_of(self, key: str) -> int:
        """Where an option stands, or the whole if it does not."""
        wanted = key.replace("_", "-")
        lines = (line for name, line in self.lines.items() if name.replace("_", "-") == wanted)
        return next(lines, self.line)

    def error(
        self, problem: UserError | str, *keys: str, written: Mapping[str, str] | None = None
    ) -> UserError:
        """The problem with its place before it.

        Args:
            keys: what it is about; by default what the problem says itself.
            written: by option of the model, what the user calls it.
        """
        text, written = as_written(str(problem), written or {}), written or {}
        if not keys and isinstance(problem, UserError):
            keys = tuple(written.get(each.option, each.option) for each in problem.about)
        lines = {self.line_of(key) for key in keys} or {self.line}
        return UserError(f"{self.place}: {_at(lines)}{text}")


def _at(lines: Iterable[int]) -> str:
    """ "line 3: ", "lines 3 and 7: "; "" if there are none (0 is none)."""
    numbers = [str(line) for line in sorted(set(lines) - {0})]
    if len(numbers) < 2:
        return f"line {numbers[0]}: " if numbers else ""
    return f"lines {', '.join(numbers[:-1])} and {numbers[-1]}: "


@dataclass(frozen=True)
class Words:
    """How it is written in one word.

    Attributes:
        first: the key of what comes first.
        several, alone: see `split_options`; of a device it is up to the model what may stand alone.
    """

    first: str
    several: str = ""
    alone: tuple[str, ...] = ()


WORDS = {
    "device": Words("model"),
    "disk": Words("file", alone=("readonly", "direct")),
    "net": Words("link", several="forward"),
}
"""By option; in a machine file these may be tables, too."""
_COMMAS = " (a value with a comma has its place in a machine file, see --config)"


def read_words(option: str, text: str, place: str = "", line: int = 0) -> Given:
    """Take ``FIRST[,option=value]...`` apart.

    Args:
        option: which of `WORDS`.
        place, line: of the machine file that it is in, if it is.

    Raises:
        UserError: it is not of that form.
    """
    words = WORDS[option]
    given = Given({}, place or f"--{option} {text}", line)
    try:
        alone = switches(text) if option == "device" else words.alone
        first, values = split_options(text, words.several, alone)
        if words.first in values:
            raise UserError(f"option '{words.first}' is given twice")
    except UserError as error:
        raise given.error(f"{error}{'' if line else _COMMAS}") from error
    return Given({words.first: first, **values}, given.place, line)


def as_written(problem: str, written: Mapping[str, str]) -> str:
    """The problem in the user's words.

    Args:
        written: by option of the model, what the user calls it.
    """
    for option, word in written.items():
        problem = re.sub(rf"\b{option}(?==| is )", word, problem)
    return problem


@dataclass
class Places:
    """Where each device and option of a machine was given, so that what is found out later says it.

    Attributes:
        file: "config machine.toml"; "" if there is none.
    """

    file: str = ""
    _devices: dict[str, list[tuple[Given, Mapping[str, str]]]] = field(default_factory=dict)
    _options: dict[str, tuple[Any, Sequence[int]]] = field(default_factory=dict)

    def add(self, given: Given, device: str, written: Mapping[str, str] | None = None) -> None:
        """Note what a device comes from; that may be several.

        Args:
            written: by option of the model, what the user calls it there.
        """
        self._devices.setdefault(device, []).append((given, written or {}))

    def add_option(self, option: str, value: Any, lines: Sequence[int]) -> None:
        """Note an option of the machine file, with its line or those of its values."""
        self._options[option] = (value, lines)

    def drop_overridden(self, values: Mapping[str, Any]) -> None:
        """Forget the options that the command line gave other values: by name, "_" for "-"."""
        for option, (value, _) in list(self._options.items()):
            if not isinstance(value, list) and values.get(option.replace("-", "_")) != value:
                del self._options[option]

    @contextmanager
    def named(self) -> Iterator[None]:
        """Have messages speak as the user did, with file and lines if there is a file.

        Raises:
            UserError: what was raised inside.
        """
        try:
            yield
        except UserError as error:
            text = str(error)
            lines: set[int] = set()
            for number, subject in enumerate(error.about):
                for given, written in self._given(subject):
                    lines.add(given.line_of(written.get(subject.option, subject.option)))
                    text = text if number else as_written(text, written)
                lines.add(self._line_of(subject))
            at = _at(lines)
            error.args = (f"{self.file}: {at}{text}" if at else text,)
            raise

    def _given(self, subject: Subject) -> list[tuple[Given, Mapping[str, str]]]:
        """Of a device that was given in several places, those that have such an option."""
        found = self._devices.get(subject.device, [])
        return [each for each in found if subject.option in each[1]] or found

    def _line_of(self, subject: Subject) -> int:
        _, lines = self._options.get(subject.option, (None, ()))
        if subject.device or not lines:
            return 0
        return lines[min(subject.index, len(lines) - 1)]
