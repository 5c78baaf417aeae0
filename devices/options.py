"""What a model's options are, for people: names, kinds, defaults and meanings."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import re
import types
import typing
from dataclasses import dataclass
from typing import Any

import msgspec

from devices.files import HostFile, HostLink

_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    bytes: "the name of a file",
}
_ENTRY = re.compile(r"(\w+(?:, \w+)*): (.*)")


@dataclass(frozen=True)
class OptionInfo:
    """One option of a model.

    Attributes:
        name: as a user writes it.
        kind: what may be written: "number", "pio|mmio", "FILE".
        default: as a user would write it; None if it must be given.
        meaning: one line; "" if the model does not say.
    """

    name: str
    kind: str
    default: str | None
    meaning: str


def describe(options: type) -> list[OptionInfo]:
    """The options of a model's `Options`, in order.

    Their meanings stand in its docstring, in a section ``Attributes:``.
    """
    hints = typing.get_type_hints(options, include_extras=True)
    meanings = _meanings(inspect.getdoc(options) or "")
    found = []
    for each in dataclasses.fields(options):
        default = each.default
        if default is dataclasses.MISSING and each.default_factory is not dataclasses.MISSING:
            default = each.default_factory()
        found.append(
            OptionInfo(
                each.name.replace("_", "-"),
                _kind(hints[each.name]),
                None if default is dataclasses.MISSING else _written(default),
                meanings.get(each.name, ""),
            )
        )
    return found


def _meanings(doc: str) -> dict[str, str]:
    found: dict[str, str] = {}
    names: list[str] = []
    _, _, section = doc.partition("Attributes:\n")
    for line in section.splitlines():
        entry = _ENTRY.fullmatch(line.strip())
        if line and not line.startswith(" "):
            break
        if entry and line.startswith("    ") and not line.startswith("     "):
            names = entry[1].split(", ")
            found |= dict.fromkeys(names, entry[2])
        else:
            found |= {name: f"{found[name]} {line.strip()}".strip() for name in names}
    return {name: text.removesuffix(".") for name, text in found.items()}


def _kind(hint: Any) -> str:
    origin, notes = typing.get_origin(hint), getattr(hint, "__metadata__", ())
    for note in notes:
        if isinstance(note, HostFile):
            return "DIRECTORY" if note.directory else "FILE"
        if isinstance(note, HostLink):
            return "SOCKET" if note.kind == "sockets" else "user|pair:NAME|tap:NAME"
        if isinstance(note, msgspec.Meta) and note.ge is not None and note.le is not None:
            return f"{note.ge}..{note.le:#x}" if note.le > 9 else f"{note.ge}..{note.le}"
    if notes:
        return _kind(typing.get_args(hint)[0])
    if origin is typing.Literal:
        return "|".join(map(_written, typing.get_args(hint)))
    if origin in (typing.Union, types.UnionType):
        return "|".join(_kind(each) for each in typing.get_args(hint) if each is not type(None))
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return "|".join(_written(each) for each in hint)
    return {bool: "true|false", int: "number", float: "number", bytes: "FILE"}.get(hint, "TEXT")


def wanted(hint: Any) -> str:
    """What may be written for an option of this type, in words: "a whole number"; "" if there are
    no words for it."""
    origin, notes = typing.get_origin(hint), getattr(hint, "__metadata__", ())
    if notes:
        words = wanted(typing.get_args(hint)[0])
        for note in notes:
            if isinstance(note, msgspec.Meta) and note.ge is not None and note.le is not None:
                words = f"{words} from {note.ge} to {note.le}"
        return words
    if origin in (typing.Union, types.UnionType):
        kinds = [wanted(each) for each in typing.get_args(hint) if each is not type(None)]
        return " or ".join(kinds) if all(kinds) else ""
    if origin is typing.Literal or (isinstance(hint, type) and issubclass(hint, enum.Enum)):
        return f"one of {_kind(hint).replace('|', ', ')}"
    return _WORDS.get(hint, "")


def _written(value: Any) -> str:
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and value > 0xFF:  # an identifier or a size
        return f"{value:#x}"
    return "" if value is None or isinstance(value, bytes) else str(value)
