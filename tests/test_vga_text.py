"""The text screen: registers and rendering."""

from __future__ import annotations

import pytest
from fakes import FakeHost

from devices.bus import Bus, BusType
from devices.errors import DeviceError
from devices.platform.vga_text import COLUMNS, ROWS, TEXT_SIZE, VgaText, render


def cells(text: str, attribute: int = 7) -> bytes:
    return b"".join(bytes((code, attribute)) for code in text.encode("cp437"))


@pytest.fixture
def vga() -> VgaText:
    return VgaText(FakeHost())


@pytest.fixture
def io(vga: VgaText) -> Bus:
    bus = Bus(BusType.PIO, 0x10000)
    (region,) = vga.regions()
    claimed = region.range()
    assert claimed is not None
    bus.insert(claimed, vga, "vga")
    return bus


# Rendering.


def test_lines_are_where_they_belong_without_trailing_blanks() -> None:
    memory = bytearray(TEXT_SIZE)
    memory[: 2 * 5] = cells("Hello")
    last = 2 * COLUMNS * (ROWS - 1)
    memory[last : last + 2 * COLUMNS] = cells("x" * COLUMNS)
    screen = render(memory)
    assert screen.lines == ("Hello", *[""] * (ROWS - 2), "x" * COLUMNS)
    assert screen.cursor is None
    assert str(screen) == "\n".join(screen.lines)


def test_code_page_437_is_shown_as_the_adapter_draws_it() -> None:
    codes = bytes((0x01, 0x0D, 0x1F, 0x41, 0x7F, 0x80, 0xB3, 0xC9, 0xDB, 0xE1, 0xFE))
    memory = b"".join(bytes((code, 7)) for code in codes)
    assert render(memory).lines[0] == "☺♪▼A⌂Ç│╔█ß■"


def test_every_code_is_one_character_that_a_terminal_prints() -> None:
    memory = b"".join(bytes((code, 0)) for code in range(256))
    text = "".join(line.ljust(COLUMNS) for line in render(memory).lines)[:256]
    assert len(text) == 256
    assert all(character.isprintable() for character in text)
    assert {index for index, character in enumerate(text) if character == " "} == {0, 0x20, 0xFF}


def test_short_memory_is_blank_at_its_end() -> None:
    assert render(b"").lines == ("",) * ROWS
    assert render(b"A\x07B").lines[0] == "AB"


def test_scrolled_screen_wraps_at_the_end_of_the_memory() -> None:
    memory = bytearray(TEXT_SIZE)
    memory[:2] = cells("b")
    memory[TEXT_SIZE - 2 :] = cells("a")
    assert render(memory, TEXT_SIZE // 2 - 1).lines[0] == "ab"


@pytest.mark.parametrize(
    ("start", "cursor", "place"),
    [
        (0, 0, (0, 0)),
        (0, 81, (1, 1)),
        (0, COLUMNS * ROWS - 1, (24, 79)),
        (0, COLUMNS * ROWS, None),
        (80, 79, None),
        (80, 160, (1, 0)),
        (TEXT_SIZE // 2 - 80, 0, (1, 0)),
    ],
)
def test_cursor(start: int, cursor: int, place: tuple[int, int] | None) -> None:
    assert render(b"", start, cursor).cursor == place


# Registers.


def test_crtc_decides_what_is_shown(vga: VgaText, io: Bus) -> None:
    memory = bytearray(TEXT_SIZE)
    memory[160:164] = cells("ok")
    io.write(0x3D4, 2, 80 << 8 | 0x0D)
    io.write(0x3D4, 1, 0x0F)
    io.write(0x3D5, 1, 82)
    screen = vga.screen(memory)
    assert screen.lines[0] == "ok"
    assert screen.cursor == (0, 2)
    io.write(0x3D4, 2, 0x20 << 8 | 0x0A)
    assert vga.screen(memory).cursor is None


def test_a_position_of_two_bytes(vga: VgaText, io: Bus) -> None:
    for register, value in ((0x0E, 0x03), (0x0F, 0xE9)):
        io.write(0x3D4, 1, register)
        io.write(0x3D5, 1, value)
        assert io.read(0x3D5, 1) == value
    assert vga.screen(b"").cursor == divmod(0x3E9, COLUMNS)


def test_it_starts_in_mode_3(io: Bus) -> None:
    def crtc(index: int) -> int:
        io.write(0x3D4, 1, index)
        return io.read(0x3D5, 1)

    assert crtc(0x01) + 1 == COLUMNS
    assert (crtc(0x12) | (crtc(0x07) & 2) << 7) + 1 == 400
    assert crtc(0x09) & 0x1F == 15
    assert crtc(0x13) * 2 == COLUMNS
    assert io.read(0x3CC, 1) & 1


def test_waiting_for_either_phase_of_the_retrace_ends(io: Bus) -> None:
    seen = {io.read(0x3DA, 1) & 0x09 for _ in range(2)}
    assert seen == {0x00, 0x09}


def test_attribute_registers_take_index_and_data_by_turns(io: Bus) -> None:
    io.read(0x3DA, 1)
    for value in (0x10, 0x0C, 0x30, 0x0F):
        io.write(0x3C0, 1, value)
    io.read(0x3DA, 1)
    io.write(0x3C0, 1, 0x10)
    assert io.read(0x3C1, 1) == 0x0F
    io.read(0x3DA, 1)
    io.write(0x3C0, 1, 0x3F)
    io.write(0x3C0, 1, 0x55)
    assert io.read(0x3C1, 1) == 0


@pytest.mark.parametrize(("port", "count"), [(0x3C4, 5), (0x3CE, 9), (0x3D4, 25)])
def test_indexed_registers_keep_what_is_written(io: Bus, port: int, count: int) -> None:
    for index in range(256):
        io.write(port, 1, index)
        io.write(port + 1, 1, index ^ 0x5A)
    for index in range(256):
        io.write(port, 1, index)
        assert io.read(port, 1) == index
        assert io.read(port + 1, 1) == (index ^ 0x5A if index < count else 0)


def test_palette_is_written_and_read_in_threes(io: Bus) -> None:
    io.write(0x3C8, 1, 255)
    for value in (1, 2, 0xFF, 4):
        io.write(0x3C9, 1, value)
    io.write(0x3C7, 1, 255)
    assert [io.read(0x3C9, 1) for _ in range(4)] == [1, 2, 0x3F, 4]


def test_empty_ports_read_all_ones(io: Bus) -> None:
    for port in (0x3C3, 0x3D0, 0x3D6, 0x3DF):
        io.write(port, 1, 0)
        assert io.read(port, 1) == 0xFF


# State.


def test_state_is_kept_and_checked(vga: VgaText, io: Bus) -> None:
    io.write(0x3D4, 2, 0x1234)
    io.write(0x3C8, 1, 7)
    saved = vga.snapshot()
    fresh = VgaText(FakeHost())
    fresh.restore(saved)
    assert fresh.snapshot() == saved
    spoiled = [("crtc", "AAAA"), ("palette", ""), ("palette_read", 768), ("palette_write", -1)]
    for field, value in [*spoiled, ("status", 1)]:
        with pytest.raises(DeviceError):
            fresh.restore(saved | {field: value})
    assert fresh.snapshot() == saved
