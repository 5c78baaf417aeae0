"""On which line of a TOML file each key and each element of a list stands; `tomllib` tells neither.

Only for text that `tomllib` has read: whatever is wrong was its to find. Lines count as there, by
line feeds alone. Source: TOML 1.0.0, sections "Comment", "Keys", "String", "Array of Tables".
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping

_TOKEN = re.compile(
    r"""\#[^\n]*                             # a comment
    |\"{3}(?:\\.|[^\\])*?\"{3,5}|'{3}.*?'{3,5}
    |"(?:\\.|[^"\\])*"|'[^']*'
    |[][{},.=\n]
    |[^][{},.=\n\s"'\#]+""",
    re.DOTALL | re.VERBOSE,
)
Path = tuple[str | int, ...]
"""Of a key, from the outside: names, and numbers of elements of lists."""


class Lines:
    """The lines of one file, from 1."""

    def __init__(self, text: str) -> None:
        self._found: dict[Path, int] = {}
        self._tokens = _tokens(text)
        self._token, self._line = "", 1
        self._next()
        self._read()

    def of(self, *path: str | int) -> int:
        """The line of a key, or of an element of a list: where what is nearest to it begins."""
        while path and path not in self._found:
            path = path[:-1]
        return self._found.get(path, 1)

    def within(self, *path: str | int) -> Mapping[str, int]:
        """The lines of the keys of a table."""
        return {
            str(found[-1]): line
            for found, line in self._found.items()
            if found[:-1] == path and isinstance(found[-1], str)
        }

    def _next(self) -> None:
        self._token, self._line = next(self._tokens, ("", self._line))

    def _read(self) -> None:
        table: Path = ()
        tables: dict[Path, int] = {}
        while self._token:
            if self._token == "\n":
                self._next()
            elif self._token == "[":
                line = self._line
                self._next()
                several = self._token == "["
                if several:
                    self._next()
                table = ()
                keys = self._key("]")
                for depth, key in enumerate(keys, 1):
                    table = (*table, key)
                    if several and depth == len(keys):
                        tables[table] = tables.get(table, -1) + 1
                        self._found.setdefault(table, line)
                    if table in tables:
                        table = (*table, tables[table])
                    self._found.setdefault(table, line)
                if several:
                    self._next()
            else:
                self._pair(table)

    def _pair(self, table: Path) -> None:
        line = self._line
        for key in self._key("="):
            table = (*table, key)
            self._found.setdefault(table, line)
        self._value(table)

    def _key(self, end: str) -> list[str]:
        """A dotted key and what comes behind it."""
        keys = []
        while self._token != end:
            if self._token[0] in "\"'":
                keys.append(str(tomllib.loads(f"key = {self._token}")["key"]))
            elif self._token != ".":
                keys.append(self._token)
            self._next()
        self._next()
        return keys

    def _value(self, path: Path) -> None:
        opened = self._token
        if opened not in ("[", "{"):
            while self._token not in ("", "\n", ",", "]", "}"):  # dates and fractions are several
                self._next()
            return
        self._next()
        index = 0
        while self._token not in ("]", "}"):
            if self._token in ("\n", ","):
                self._next()
            elif opened == "{":
                self._pair(path)
            else:
                self._found[(*path, index)] = self._line
                self._value((*path, index))
                index += 1
        self._next()


def _tokens(text: str) -> Iterator[tuple[str, int]]:
    line = 1
    for match in _TOKEN.finditer(text):
        if match[0][0] != "#":
            yield match[0], line
        line += match[0].count("\n")
