"""Every built guest, run to its end on a real CPU with real devices, against golden output."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from guest_rig import Rig, Run

import guests
from vmm.boot.options import Module


def run(name: str, **options: object) -> Run:
    with Rig() as rig:
        return rig.run(name, **options)  # type: ignore[arg-type]


def test_hello() -> None:
    assert run("hello") == Run("halt", "Hello from the guest!\n")


DEFAULT_OUTPUT = """\
Hello from the default guest!

Echo device at port 0xEC0:
  8 bits:  wrote 5a, read 5a
  16 bits: wrote beef, read beef
  32 bits: wrote cafef00d, read cafef00d

PCI bus 0:
  00:00.0 1234:0600 class 060000
  00:01.0 1234:c501 class ff0000 INTA#
    BAR 0: memory, 4 KiB at {bar0:08x}
    BAR 2: memory, 64 KiB at {bar2:016x}, 64-bit, prefetchable
    BAR 4: ports, 16 at {bar4:04x}
  2 functions

Goodbye.
"""


def bars(output: str) -> dict[str, int]:
    """The addresses that a scan printed: who places BARs first is not the guest's business."""
    found = {}
    for line in output.splitlines():
        if line.startswith("    BAR "):
            number = line[8]
            found[f"bar{number}"] = int(line.split(" at ")[1].split(",")[0], 16)
    return found


def test_default() -> None:
    result = run("default")
    assert result == Run("halt", DEFAULT_OUTPUT.format(**bars(result.output)))


def test_default_with_nothing_there() -> None:
    with Rig(echo=False, pci=False) as rig:
        result = rig.run("default")
    assert result.ending == "halt"
    assert "  nothing answers there\n" in result.output
    assert "  1 function\n" in result.output


def test_echo() -> None:
    result = run("echo")
    expected = "echo: every size at every offset\necho: 422 checks, all right\n"
    assert result == Run("exit", expected, 0)


def test_echo_notices_that_nothing_answers() -> None:
    with Rig(echo=False) as rig:
        result = rig.run("echo")
    assert (result.ending, result.exit_value) == ("exit", 1)
    assert "echo: port 0ec0 read 000000ff, expected " in result.output


def test_pci_scan() -> None:
    result = run("pci-scan")
    places = bars(result.output)
    assert result.ending == "halt"
    assert result.output.endswith(
        "  functions: 2\n"
        "Relocation:\n"
        f"  BAR 0: {places['bar0']:08x} -> f4000000, ok\n"
        "  memory decoding off and on, ok\n"
        f"  BAR 4: {places['bar4']:04x} -> d100, ok\n"
        f"  BAR 2: {places['bar2']:08x} -> f5000000, ok\n"
        "  BAR 2 above 4 GiB and back, ok\n"
    )


def test_pci_scan_without_a_function_to_move() -> None:
    with Rig(pci=False) as rig:
        result = rig.run("pci-scan")
    assert result.ending == "halt"
    assert result.output.endswith("No config-space function, nothing to relocate.\n")


def test_pci64() -> None:
    assert run("pci64") == Run("halt", "BAR 2: 00000000f6000000 -> 0000004000000000, ok\n")


GREETING = "Type a line and it comes back; 'quit' or Ctrl-D ends.\n"


@pytest.mark.parametrize("name", ["serial-echo", "serial-poll"])
@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_serial_dialogue(name: str, chunk: int) -> None:
    result = run(name, typed=b"hello\rxy\x7fz\n\nquitter\nquit\n", chunk=chunk)
    assert result.ending == "halt"
    assert result.output == (
        GREETING + "hello\nYou said: hello\n"
        "xy\b \bz\nYou said: xz\n"
        "\nYou said: \n"
        "quitter\nYou said: quitter\n"
        "quit\nGoodbye.\n"
    )


@pytest.mark.parametrize("name", ["serial-echo", "serial-poll"])
def test_serial_dialogue_ends_on_ctrl_d_and_bounds_its_line(name: str) -> None:
    result = run(name, typed=b"x" * 200 + b"\n\x04")
    assert result == Run("halt", f"{GREETING}{'x' * 78}\nYou said: {'x' * 78}\nGoodbye.\n")


def test_long_mode() -> None:
    assert run("long-mode") == Run(
        "halt",
        "long mode: RSP 0000000000090000\n"
        "arithmetic: ok\n"
        "#UD: taken and returned from\n"
        "#PF: taken and returned from, CR2 0000002000000008\n"
        "int 0x80: 40 + 2 = 42\n"
        "ring 3: int 0x80, SYSCALL and a forbidden access, ok\n"
        "long mode: done\n",
    )


def test_crash() -> None:
    result = run("crash")
    assert (result.ending, result.output) == ("shutdown", "About to crash.\n")
    assert "triple fault" in result.detail


def test_stress() -> None:
    result = run("stress")
    assert (result.ending, result.exit_value) == ("exit", 0), result.output
    lines = result.output.splitlines()
    assert lines[0] == "stress: 4000 rounds on echo and config-space"
    assert len(lines) == 10
    # The accesses are pseudo-random, the values written too: so is the sum of what was read.
    assert lines[-1] == "stress: done, 13199 values compared, sum 8f2fa2d0"


def test_stress_twice_on_the_same_devices() -> None:
    with Rig() as rig:
        rig.run("stress", image=guests.patched("stress", rounds=500))
        rig.exit_value = None
        result = rig.run("stress", image=guests.patched("stress", rounds=500))
    assert (result.ending, result.exit_value) == ("exit", 0), result.output


def test_stress_on_echo_only() -> None:
    with Rig(pci=False) as rig:
        result = rig.run("stress", image=guests.patched("stress", rounds=200))
    assert (result.ending, result.exit_value) == ("exit", 0), result.output
    assert result.output.startswith("stress: 200 rounds on echo only\n")
    assert "200 values compared" in result.output


def test_stress_notices_one_wrong_bit() -> None:
    with Rig() as rig:
        entry = rig.ports.find(0xEC0)
        assert entry is not None
        right, reads = entry.read, iter(range(100))
        entry.read = lambda offset, size: right(offset, size) ^ (next(reads) == 20)
        result = rig.run("stress")
    assert (result.ending, result.exit_value) == ("exit", 1)
    assert "stress: mismatch at 00000ec" in result.output


def test_counter() -> None:
    result = run("counter", image=guests.patched("counter", limit=12, delay=5))
    assert result == Run("halt", "".join(f"counter {n}\n" for n in range(1, 13)))


def test_spin() -> None:
    with Rig() as rig:
        result = rig.run("spin", image=guests.patched("spin", rounds=1000))
        checksum = rig.cpu.get_state().gpr[0]
    assert result == Run("halt", "")
    assert checksum == spin_checksum(1000)


def spin_checksum(rounds: int) -> int:
    """What the guest computes, written anew from its description."""
    mask, value, table = 0xFFFF_FFFF, 0x9E3779B9, [0] * 1024
    for left in range(rounds, 0, -1):
        value ^= value << 13 & mask
        value ^= value >> 17
        value ^= value << 5 & mask
        slot = left & 0x3FF
        table[slot] = table[slot] + value & mask
        value = value + table[slot] & mask
        value = (value << 7 | value >> 25) & mask
    return value


def test_multiboot() -> None:
    modules = (Module(b"first\0module", "one"), Module(b"", ""), Module(b"z" * 5000, "three 3"))
    result = run("multiboot", cmdline="root=none  quiet", modules=modules)
    assert result == Run(
        "halt",
        "Started by: jailed-vmm\n"
        "Command line: root=none  quiet\n"
        "Memory: 639 KiB low, 64512 KiB high\n"
        "Memory map:\n"
        "  0000000000000000 + 000000000009fc00 usable\n"
        "  000000000009fc00 + 0000000000060400 reserved\n"
        "  0000000000100000 + 0000000003f00000 usable\n"
        "Modules: 3\n"
        "  00102000 + 12 'one': first.module\n"
        "  00103000 + 0 '': \n"
        f"  00104000 + 5000 'three 3': {'z' * 60}\n",
    )


def test_multiboot_guest_refuses_another_loader() -> None:
    with Rig() as rig:
        state = _state_of("multiboot", rig)
        state.gpr[0] = 1
        rig.cpu.set_state(state)
        rig.cpu.run(1 << 20)
    assert rig.exit_value == 1
    assert rig.output == "Not started by a Multiboot loader: EAX is 00000001\n"


def _state_of(name: str, rig: Rig):  # type: ignore[no-untyped-def]
    from vmm.boot.loader import load
    from vmm.boot.options import BootOptions

    return load(rig.memory, guests.image(name), BootOptions()).state


def test_elf_guests() -> None:
    assert run("elf32") == Run("halt", "elf32: segments in place, bss is zero\n")
    assert run("elf64") == Run(
        "halt", "elf64: segments in place, bss is zero, stack at 0000000000090000\n"
    )
    assert run("elf32-high").output.startswith("elf32-high: running at c0100")


@pytest.mark.parametrize("name", ["elf32", "elf64"])
def test_elf_guests_find_bss_that_was_dirty(name: str) -> None:
    with Rig() as rig:
        rig.memory.write(0x300000, b"\xa5" * 0x30000)
        assert rig.run(name).ending == "halt"


@pytest.mark.parametrize("name", ["elf32", "elf64"])
def test_elf_guests_notice_what_is_wrong(name: str) -> None:
    """They are only worth running if they can fail: here their data segment is another."""
    image = bytearray(guests.image(name))
    mark = struct.pack("<I", 0x600DDA7A)
    image[image.rindex(mark)] ^= 1
    result = run(name, image=bytes(image))
    assert (result.ending, result.exit_value) == ("exit", 1)
    assert "WRONG: data segment" in result.output


def test_every_guest_is_run() -> None:
    """Here, or there if it needs a whole machine; by name, so that a new guest is not forgotten."""
    here = Path(__file__)
    files = here, *map(here.with_name, ("test_x2apic_guest.py", "test_disk_code.py"))
    source = "".join(file.read_text(encoding="utf-8") for file in files)
    assert [name for name in guests.GUESTS if f'"{name}"' not in source] == []
