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
import bisect
import difflib
import re
import tomllib
from typing import Any

from devices.errors import UserError
from vmm.cli.files import read_file
from vmm.cli.given import WORDS, Given, Places, read_words
from vmm.cli.toml_lines import Lines

_LINE_FEED = "\n"
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
    config = f"config {path}"
    try:
        text = read_file(path, "config").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{config}: line {line} is not UTF-8 text") from error
    document = _parse(text, config)
    lines = Lines(text)
    actions = {name: action for action in parser._actions if (name := _name(action))}
    places = Places() if places is None else places
    places.file = config
    found: dict[str, Any] = {}
    for key, value in document.items():
        where = f"{config}: line {lines.of(key)}"
        action = actions.get(key)
        if action is None:
            near = difflib.get_close_matches(key, actions, 1)
            hint = f"; do you mean '{near[0]}'?" if near else f"; there are {', '.join(actions)}"
            raise UserError(f"{where}: there is no option '{key}'{hint}")
        if key in WORDS and isinstance(value, list):
            found[key] = [
                _given(action, each, config, lines, (key, index))
                for index, each in enumerate(value)
            ]
        elif key in WORDS and isinstance(value, dict):
            raise UserError(f"{where}: there may be several: write [[{key}]]")
        elif isinstance(action.default, list) and isinstance(value, list):
            stand = [lines.of(key, index) for index in range(len(value))]
            found[action.dest] = [
                _one(action, each, f"{config}: line {line}: {key}")
                for each, line in zip(value, stand, strict=True)
            ]
            places.add_option(key, found[action.dest], stand)
        else:
            found[action.dest] = _value(action, value, f"{where}: {key}")
            places.add_option(key, found[action.dest], [lines.of(key)])
    return found


_POSITION = re.compile(r" \(at (?:line (\d+), column (\d+)|end of document)\)")


def _parse(text: str, config: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = _POSITION.search(str(error))
        problem = _POSITION.sub("", str(error))
        if found is None or found[1] is None:
            at = f"line {max(text.rstrip().count(_LINE_FEED) + 1, 1)}, the last"
        else:
            at = f"line {found[1]}, column {found[2]}"
        raise UserError(f"{config}: {at}: {problem}") from error
    except RecursionError as error:
        lines = text.split(_LINE_FEED)
        deep = bisect.bisect_left(range(len(lines)), True, key=lambda n: _too_deep(lines[: n + 1]))
        raise UserError(
            f"{config}: line {deep + 1}: lists or tables are nested too deep"
        ) from error


def _too_deep(lines: list[str]) -> bool:
    try:
        tomllib.loads(_LINE_FEED.join(lines))
    except tomllib.TOMLDecodeError:
        return False
    except RecursionError:
        return True
    return False


def _given(
    action: argparse.Action, value: Any, config: str, lines: Lines, path: tuple[str, int]
) -> Given:
    """A device, disk or network card, as a table or in words."""
    key, line = path[0], lines.of(*path)
    if isinstance(value, dict):
        return Given(value, config, line, lines.within(*path))
    where = f"{config}: line {line}: {key}"
    if not isinstance(value, str):
        raise UserError(f"{where} is text or a table, not {_shown(value)}")
    return read_words(key, _one(action, value, where), config, line)


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
        raise UserError(f"{where} is a list, not {_shown(value)}")
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
