"""``--config machine.toml``: every option of ``boot`` has a place in a file.

    image = "vmlinuz"
    mem = "256M"
    append = "console=ttyS0"
    no-default-devices = true

    [[device]]
    model = "echo"
    addr = 0xF00

    [[disk]]
    file = "root.img"

    [[net]]
    link = "user"
    forward = ["tcp:8080:80"]

A key is an option's name without the dashes; ``image`` is the guest. What may be repeated on the
command line is a list; devices, disks and network cards are tables or texts. The command line wins
over the file, and adds to its lists. Paths are meant as on the command line.
"""

from __future__ import annotations

import argparse
import difflib
import re
import tomllib
from typing import Any

from devices.errors import UserError
from vmm.cli.files import read_file
from vmm.cli.given import WORDS, Given, Places, read_words

_HEADER = re.compile(r"\s*\[+\s*\"?([\w-]+)")
_KEY = re.compile(r"\s*\"?([\w-]+)\"?\s*[.=]")
_NOT_IN_A_FILE = ("help", "config")


def read_defaults(
    path: str, parser: argparse.ArgumentParser, places: Places | None = None
) -> dict[str, Any]:
    """What the file says, as defaults for the parser of ``boot``.

    Args:
        places: is told where each option's value stands, for what is found wrong with it later.

    Raises:
        UserError: it cannot be read, is no TOML, or an option is wrong: with the line's number.
    """
    try:
        text = read_file(path, "config").decode("utf-8-sig")
        document = tomllib.loads(text)
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"config {path}: line {line} is not UTF-8 text") from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"config {path}: {error}") from error
    lines = _Lines(text)
    actions = {name: action for action in parser._actions if (name := _name(action))}
    places = Places() if places is None else places
    found: dict[str, Any] = {}
    for key, value in document.items():
        where = f"config {path}: line {lines.of(key)}"
        action = actions.get(key)
        if action is None:
            near = difflib.get_close_matches(key, actions, 1)
            hint = f"; do you mean '{near[0]}'?" if near else f"; there are {', '.join(actions)}"
            raise UserError(f"{where}: there is no option '{key}'{hint}")
        named = f"{where}: {key}"
        if key in WORDS and isinstance(value, list):
            place = f"config {path}"
            found[key] = [
                Given(each, place, lines.of(key, index), lines.within(key, index))
                if isinstance(each, dict)
                else read_words(key, _one(action, each, named), place, lines.of(key))
                for index, each in enumerate(value)
            ]
        elif key in WORDS and isinstance(value, dict):
            raise UserError(f"{where}: there may be several: write [[{key}]]")
        else:
            made = found[action.dest] = _value(action, value, named)
            given = Given({}, f"config {path}", lines.of(key))
            for each in made if isinstance(made, list) else [made]:
                first = str(each).partition(",")[0] if key == "module" else each
                places.add(given, f"{key} {first}: ")
                places.add(given, f"--{key} {first}: ")
    return found


def _name(action: argparse.Action) -> str:
    """The option as a key; "" if it has no place in a file."""
    name = action.option_strings[-1].lstrip("-") if action.option_strings else action.dest
    return "" if name in _NOT_IN_A_FILE else name


def _value(action: argparse.Action, value: Any, where: str) -> Any:
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UserError(f"{where} is true or false, not {_shown(value)}")
        return value
    if isinstance(action.default, list):
        if not isinstance(value, list):
            raise UserError(f"{where} is a list, not {_shown(value)}")
        return [_one(action, each, where) for each in value]
    return _one(action, value, where)


def _one(action: argparse.Action, value: Any, where: str) -> Any:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise UserError(f"{where} is text or a number, not {_shown(value)}")
    if action.type is None and not isinstance(value, str):
        raise UserError(f"{where} is text, not {_shown(value)}")
    text = str(value)
    try:
        made = action.type(text) if callable(action.type) else text
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise UserError(f"{where}: {error}") from error
    if action.choices is not None and made not in action.choices:
        known = ", ".join(map(str, action.choices))
        raise UserError(f"{where}: {text!r} is none of {known}")
    return made


def _shown(value: Any) -> str:
    """As it stands in the file, or what it is."""
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "a table"
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, str) else str(value)


class _Lines:
    """On which line each key stands; `tomllib` does not tell."""

    def __init__(self, text: str) -> None:
        self._found: dict[tuple[str, int], int] = {}
        seen: dict[str, int] = {}
        inside: dict[str, int] | None = None
        self._within: dict[tuple[str, int], dict[str, int]] = {}
        quote = ""
        for number, line in enumerate(text.splitlines(), 1):
            if not quote:
                header = _HEADER.match(line)
                key = _KEY.match(line)
                if header:
                    name = header[1]
                    index = seen.get(name, -1) + 1
                    seen[name] = index
                    self._found.setdefault((name, index), number)
                    inside = self._within.setdefault((name, index), {})
                elif key and inside is not None:
                    inside.setdefault(key[1], number)
                elif key:
                    self._found.setdefault((key[1], 0), number)
            for mark in ('"""', "'''"):
                if line.count(mark) % 2 and quote in ("", mark):
                    quote = "" if quote else mark

    def of(self, key: str, index: int = 0) -> int:
        """The line of a key, or of the table that is number `index` of its name."""
        return self._found.get((key, index)) or self._found.get((key, 0)) or 1

    def within(self, key: str, index: int) -> dict[str, int]:
        """The lines of the keys of such a table."""
        return self._within.get((key, index), {})
