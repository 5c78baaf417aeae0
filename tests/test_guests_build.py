"""The committed images are what the committed sources assemble to."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import guests

SOURCES = Path(guests.__file__).parent
NASM = shutil.which("nasm")
MAKE = shutil.which("make")


def images() -> list[Path]:
    return [path for path in SOURCES.iterdir() if path.suffix in (".bin", ".elf")]


@pytest.mark.skipif(
    NASM is None or MAKE is None,
    reason="NOT CHECKED: that the images in guests/ match their sources; nasm and make are needed",
)
def test_a_rebuild_gives_the_same_bytes(tmp_path: Path) -> None:
    # By another path and with another directory for the result: neither may get into an image.
    copy = tmp_path / "elsewhere"
    shutil.copytree(SOURCES, copy, ignore=shutil.ignore_patterns("*.bin", "*.elf", "*.py*"))
    out = tmp_path / "out"
    out.mkdir()
    assert MAKE is not None
    subprocess.run([MAKE, "-s", "-C", copy, f"OUT={out}"], check=True, timeout=100)
    built = {path.name: path.read_bytes() for path in out.iterdir()}
    committed = {
        path.name: path.read_bytes()
        for path in SOURCES.iterdir()
        if path.suffix in (".bin", ".elf")
    }
    assert sorted(built) == sorted(committed)
    assert [name for name in built if built[name] != committed[name]] == []


def test_the_table_names_every_image_and_every_source() -> None:
    files = {guest.file for guest in guests.GUESTS.values()}
    assert files == {path.name for path in images()}
    stems = {Path(name).stem for name in files}
    assert stems == set(guests.GUESTS)
    assert stems == {path.stem for path in SOURCES.glob("*.asm")}
    assert all(guest.summary for guest in guests.GUESTS.values())


def test_patched_parameters_lie_where_the_sources_say() -> None:
    defaults = {
        "stress": {"rounds": 4000},
        "spin": {"rounds": 5000000},
        "counter": {"limit": 0, "delay": 50000000},
        "disk-code": {"sectors": 32},
    }
    parameters = {n: g.parameters for n, g in guests.GUESTS.items() if g.parameters}
    assert parameters == {name: tuple(values) for name, values in defaults.items()}
    for name, values in defaults.items():
        assert guests.patched(name, **values) == guests.image(name)
        changed = guests.patched(name, **{key: value ^ 1 for key, value in values.items()})
        differing = [i for i, byte in enumerate(changed) if byte != guests.image(name)[i]]
        assert differing == [4 + 4 * i for i in range(len(values))]
    with pytest.raises(ValueError, match="rounds"):
        guests.patched("hello", rounds=1)
