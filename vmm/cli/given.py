"""What a user gave for a device, disk or network card, in words or as a table of a machine file.

``echo,addr=0xF00`` and ``[[device]]`` with its keys come to the same; only what messages say of
their place differs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from devices.errors import UserError
from vmm.config import split_options


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

    def where(self, problem: str) -> str:
        """Its place, as near to what a message is about as it can be known."""
        if not self.line:
            return self.place
        # The model comes last: messages about other keys name it, too.
        for key in sorted(self.lines, key=lambda key: key == "model"):
            if re.search(rf"'{key}'|\b{key}(=| )", problem):
                return f"{self.place}: line {self.lines[key]}"
        return f"{self.place}: line {self.line}"

    def error(self, problem: object) -> UserError:
        """The problem with its place before it."""
        text = str(problem)
        return UserError(f"{self.where(text)}: {text}")


@dataclass(frozen=True)
class Words:
    """How it is written in one word.

    Attributes:
        first: the key of what comes first.
        several, alone: see `split_options`.
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
        first, values = split_options(text, words.several, words.alone)
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
    """Where each device of a machine was given, so that what is found out later says it, too."""

    _found: list[tuple[str, Given, Mapping[str, str]]] = field(default_factory=list)

    def add(self, given: Given, beginning: str, written: Mapping[str, str] | None = None) -> None:
        """Note one.

        Args:
            beginning: of the messages about it.
            written: see `as_written`.
        """
        self._found.append((beginning, given, written or {}))

    @contextmanager
    def named(self) -> Iterator[None]:
        """Have messages speak as the user did, with file and line if there is one.

        Raises:
            UserError: what was raised inside.
        """
        try:
            yield
        except UserError as error:
            text = str(error)
            for beginning, given, written in reversed(self._found):
                if text.startswith(beginning):
                    text = as_written(text, written)
                    raise (given.error(text) if given.line else UserError(text)) from error
            raise
