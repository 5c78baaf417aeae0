"""The rooms and who may know whom, read from the code itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_KNOW = {
    "devices": {"devices"},
    "proxy": {"devices", "proxy"},
    "guests": {"guests"},
    "vmm": {"devices", "proxy", "guests", "vmm"},
}
ALONE = {
    "unicorn": "vmm/cpu/",
    "elftools": "vmm/boot/elf.py",
    "capstone": "vmm/cpu/report.py",
    "pyseccomp": "proxy/jail/filter.py",
}
LONGEST = 400


def _files() -> list[Path]:
    return [file for room in MAY_KNOW for file in sorted((ROOT / room).rglob("*.py"))]


def _imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield node.module or ""


@pytest.mark.parametrize("file", _files(), ids=lambda file: str(file.relative_to(ROOT)))
def test_arrows_never_point_back(file: Path) -> None:
    name = str(file.relative_to(ROOT))
    room = name.split("/", maxsplit=1)[0]
    for imported in _imports(file):
        head = imported.split(".")[0]
        if head in MAY_KNOW:
            assert head in MAY_KNOW[room], f"{name} imports {imported}"
        if head in ALONE:
            assert name.startswith(ALONE[head]), f"{name} imports {imported}"
        assert head not in ("pickle", "marshal", "shelve"), f"{name} imports {imported}"
    assert len(file.read_text().splitlines()) <= LONGEST, f"{name} is two rooms"


def test_the_rule_sees_something() -> None:
    assert len(_files()) > 40
    assert "unicorn" in set(_imports(ROOT / "vmm/cpu/library.py")) | {
        name.split(".")[0] for name in _imports(ROOT / "vmm/cpu/library.py")
    }
