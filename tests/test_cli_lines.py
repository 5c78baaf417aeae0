"""Whatever is wrong in a machine file is said in one line, with the line where it stands.

One table has every error that a file can cause, found while it is read, while the machine is built
or while the guest is loaded; the numbers are those of the lines that must be named.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_rig import run
from hypothesis import given
from hypothesis import strategies as st

from vmm.cli import main
from vmm.cli.toml_lines import Lines

RNG = '[[device]]\nmodel = "rng"\n'
ECHO = '[[device]]\nmodel = "echo"\naddr = 0xF00\n'
COM2 = '[[device]]\nmodel = "serial"\nport = "com2"\n'
BLK = '[[device]]\nmodel = "blk"\n'
IDE = '[[disk]]\nif = "ide"\nfile = "disk"\n'
LONG = "x" * 100

READING = [
    # The file itself.
    ("mem = ", 1, "column 7: Invalid value"),
    ('mem = "1M"\n\n[[device', 3, "column 9: Expected ']]'"),
    ('mem = "1M"\nappend = """x\n', 2, "Unterminated string"),
    ('mem = "1M"\nmem = "2M"', 2, "Cannot overwrite a value"),
    ('mem = "1M"\nappend = ' + "[" * 9000 + "]" * 9000, 2, "nested too deep"),
    # Keys.
    ('mem = "1M"\nmemm = "64M"', 2, "no option 'memm'; do you mean 'mem'?"),
    ("snapshot_at = 1", 1, "no option 'snapshot_at'; do you mean 'snapshot-at'"),
    ("config = 'other'", 1, "there is no option 'config'"),
    ('mem = "1M"\n[run]\nstats = true', 2, "there is no option 'run'; there are image, "),
    ('mem = "1M"\n[net]\nlink = "user"', 2, "there may be several: write [[net]]"),
    ('device.model = "rng"', 1, "there may be several: write [[device]]"),
    # Values of the wrong kind.
    ("mem = true", 1, "mem is text or a number, not true"),
    ("mem = [1]", 1, "mem is text or a number, not a list"),
    ("mem.x = 1", 1, "mem is text or a number, not a table"),
    ("mem = 1979-05-27", 1, "mem is text or a number, not 1979-05-27"),
    ("image = 3", 1, "image is text, not 3"),
    ("json = 'x'", 1, "json is true or false, not 'x'"),
    ("module = true", 1, "module is a list, not true"),
    ('module = "a"', 1, "module is a list, not 'a'"),
    ('module = [\n"a",\n1.5]', 3, "module is text, not 1.5"),
    ("device = [3]", 1, "device is text or a table, not 3"),
    ("net = true", 1, "net is a list, not true"),
    # Values out of range.
    ('\n\nmem = "abc"', 3, "'abc' is not a size; write for example 64M"),
    ("#\nmode = 48", 2, "'48' is none of 16, 32, 64"),
    ('append = """\nmem = 3\n"""\nclock = "fast"', 4, "'fast' is none of real, virtual"),
    ("deadline = 99999", 1, "more than 3600 seconds"),
    ("timeout = 0", 1, "not a number of seconds above zero"),
    ("timeout = nan", 1, "not a number of seconds above zero"),
    ('load-addr = "here"', 1, "'here' is not a number"),
    # However it is written.
    ('"mem" = "abc"', 1, "is not a size"),
    ("  'mem'  = 'abc'", 1, "is not a size"),
    ("append = '''a'''  # '''\nmem = 'abc'", 2, "is not a size"),
    ('[[ "device" ]]\n"model" = "nothing"', 2, "unknown device model 'nothing'"),
    ('device = [\n {model = "rng"},\n {model = "nothing"},\n]', 3, "unknown device model"),
    ('[[device]]\nmodel = "rng"\n[device.x]\ny = 1', 3, "has no option 'x'"),
]
DEVICES = [
    ('[[device]]\nname = "x"', 1, "a device needs a model, for example"),
    ("[[device]]\nmodel = 3", 2, "a device needs a model, for example"),
    ("[[device]]\nmodel = 3", 2, "; 3 is no text"),
    ('[[device]]\nname = "x"\nmodle = "rng"', 3, "; it has 'modle'"),
    ('device = ["x"]', 1, "unknown device model 'x'; there are 9p, "),
    ('[[device]]\nmodel = "no.such:Thing"', 2, "cannot be loaded: No module named 'no'"),
    ('device = ["rng",\n"rng,seed"]', 2, "'seed' is not option=value\n"),
    ('[[device]]\nmodel = "echo"\nadr = 3', 3, "has no option 'adr'; it has bus"),
    ('[[device]]\nmodel = "echo"\nname = "x"\nbus = "isa"', 4, "bus=isa is not one of pio, mmio"),
    (f"{RNG}seed = 'x'", 3, "option seed=x is not a whole number\n"),
    (f"{RNG}seed = 1.5", 3, "option seed=1.5 is not a whole number\n"),
    (f"{RNG}seed = [1]", 3, "option seed=[1] is not a whole number\n"),
    ('[[device]]\nmodel = "balloon"\npages = -1', 3, "a whole number from 0 to 4294967295\n"),
    ('[[device]]\nmodel = "serial"\nport = "x"', 3, "is not one of com1, com2, com3, com4\n"),
    ('[[device]]\nmodel = "config-space"\nrom = true', 3, "is not the name of a file\n"),
    ('[[device]]\nmodel = "config-space"\nrom = "no"', 3, "rom=no: No such file"),
    ('[[device]]\nmodel = "config-space"\nram-size = 5000', 3, "is a power of two"),
    ('[[device]]\nmodel = "config-space"\nvendor_id = 0xffff', 3, "there is no function"),
    ('[[device]]\nmodel = "console"\nlog = "/no/x"', 3, "log=/no/x: No such file"),
    (BLK, 1, "path=FILE is needed"),
    (f"{BLK}path = 5", 3, "option path=5 is not text\n"),
    (f'{BLK}readonly = "x"', 3, "option readonly=x is not true or false\n"),
    (f'{BLK}path = "disk"\nserial = "{LONG}"', 4, "serial is at most 20"),
    ('[[device]]\nmodel = "9p"\npath = "no"', 3, "path=no: No such file"),
    ('[[device]]\nmodel = "9p"\npath = "disk"', 3, "path=disk: is not a directory"),
    (f'[[device]]\nmodel = "9p"\npath = "."\ntag = "{LONG}"', 4, "tag is 1 to"),
    ('[[device]]\nmodel = "vsock"\npath = "/no/where"', 3, "path=/no/where: No such file"),
    ('[[device]]\nmodel = "vsock"\npath = "v"\ncid = 1', 4, "cid is 3 to 0xfffffffe"),
    # What is the same for all of them.
    (f'{RNG}name = "Ä"', 3, "device name 'Ä': use 1 to 32 of a-z"),
    (f"{RNG}name = 3", 3, "device name '3': use 1 to 32 of a-z"),
    (f'{RNG}name = "pic"', 3, "the name of a part of the board; give it another name="),
    (f'{RNG}name = "serial"', 3, "another one has this name; give one of them a name="),
    (f'{RNG}name = "a"\n{RNG}name = "a"', (3, 6), "another one has this name"),
    ('disk = [\n"disk"]\n[[net]]\nlink = "user"\nname = "disk"', (2, 5), "has this name"),
    (f"{ECHO}{ECHO}", (3, 6), "overlaps 'echo-2' at 0xf00-0xf07; give it another addr="),
    (f"{COM2}{COM2}", (1, 4), "overlaps 'serial-2' at 0x2f8-0x2ff"),
    ('[[device]]\nmodel = "echo"', 1, "overlaps 'echo' at 0xec0-0xec7"),
    ('[[device]]\nmodel = "echo"\naddr = 0x10000', 3, "leaves the space of 0x10000"),
    ('[[device]]\nmodel = "echo"\naddr = -1', 3, "addr=-0x1 is no 64-bit address"),
    ('[[device]]\nmodel = "echo"\naddr = "x"', 3, "addr=x is not a number"),
    ('[[device]]\nmodel = "echo"\nbus = "mmio"\naddr = 0x1000', 4, "overlaps RAM at 0x0"),
    (f"{RNG}addr = 0xF00", 3, "no single bus region for addr= to move"),
    (f"{RNG}slot = 5\n{RNG}slot = 5", (3, 6), "slot 5 is taken by 'rng'"),
    (f"{RNG}slot = 32", 3, "slot=32 is not from 1 to 31"),
    (f'{RNG}slot = "two"', 3, "slot=two is not [BRIDGE:]DEVICE[.FUNCTION]"),
    (f"{RNG}slot = 3.1", 3, 'slot=3.1 is no slot; write a number, or text such as "3.1"'),
    (f'{RNG}slot = "br9:3"', 3, "slot=br9:3 is behind 'br9', which is no bridge"),
    ('device = [\n  "rng,slot=br9:3",\n]', 2, "slot=br9:3 is behind 'br9'"),
    (f'{RNG}slot = "5.1"', 3, "slot 5.1 needs a function 0 beside it"),
    (f"{ECHO}slot = 4", 4, "is no PCI function: it takes no slot="),
    (RNG * 32, 61, "all 31 PCI slots are taken"),
    (f"{RNG}irq = 4", 3, "is a PCI function: it takes no irq="),
    (f"{ECHO}irq = 2", 4, "irq=2 is not a line from 0 to 15 without 2"),
    (f"{ECHO}irq = true", 4, "irq=True is not a number"),
    (f'{RNG}isolation = "some"', 3, "isolation is 'jail' or 'none', not 'some'"),
    (f'{RNG}dma = "x"', 3, "dma is one of shared, granted, not 'x'"),
    ('[[device]]\nmodel = "balloon"\ndma = "granted"', 3, "no more of guest memory"),
    (f'{RNG}dma = "granted"\nisolation = "none"', (3, 4), "which isolation=none takes away"),
]
DISKS = [
    ("[[disk]]\nreadonly = true", 1, "a disk needs a 'file'"),
    ("[[disk]]\nif = 'ide'\nfile = 3", 3, "a disk needs a 'file'"),
    ('[[disk]]\nfile = "no"', 2, "device 'disk': file=no: No such file"),
    ('[[disk]]\nif = "ide"\nfile = "no"', 3, "device 'ide': file=no: No such file"),
    ('disk = ["no"]', 1, "device 'disk': file=no: No such file"),
    ('disk = ["disk,foo=1"]', 1, "a disk has no option 'foo'; it has file"),
    ('[[disk]]\nfile = "odd"', 2, "has 1000 bytes, which is no multiple of 512; cut it or"),
    ('[[disk]]\nfile = "empty"', 2, "file=empty: is empty; make it larger"),
    ('[[disk]]\nfile = "."', 2, "file=.: Is a directory"),
    ('[[disk]]\nfile = "a\\u0000b"', 2, "embedded null byte"),
    ('[[disk]]\nfile = "disk"\n[[disk]]\nfile = "disk"', (2, 4), "is given twice"),
    (IDE * 5, 14, "if=ide has room for 4 disks; give it if=virtio"),
    (f'{IDE}[[disk]]\nfile = "no"\nif = "ide"', 5, "device 'ide': file=no: No such file"),
    (f"{IDE}queues = 2", 4, "'queues' is for if=virtio alone"),
    (f'{IDE}[[disk]]\nif = "ide"\nserial = "{LONG}"\nfile = "disk"', 6, "serial is at most 20"),
    ('[[disk]]\nif = "scsi"\nfile = "disk"', 2, "if=scsi is not one of virtio, ide"),
    ('[[disk]]\nfile = "disk"\nqueues = 0', 3, "queues is 1 to 16"),
    (f'{RNG}[[disk]]\nname = "d"\nfile = "no"', 5, "device 'd'"),
]
NETS = [
    ('[[net]]\nmac = "52:54:00:12:34:56"', 1, "a network card needs a 'link': user, pair:NAME"),
    ('net = ["foo"]', 1, "link is user, pair:NAME or tap:NAME, not foo"),
    (f'[[net]]\nlink = "tap:{LONG}"', 2, "has more than 15 characters"),
    ('[[net]]\nlink = "tap:lo"', 2, "device 'net': link=tap:lo: "),
    ('[[net]]\nlink = "user"\nmac = "x"', 3, "mac is six bytes in hexadecimal"),
    ('[[net]]\nlink = "user"\nforward = ["x"]', 3, "forward=x: write tcp:8080:80"),
    ('[[net]]\nlink = "user"\nforward = ["tcp:99999:80"]', 3, "99999 is no port"),
    ('[[net]]\nlink = "pair:x"\nforward = ["tcp:80:80"]', (2, 3), "forward= is for link=user"),
    ('[[net]]\nlink = "user"\nfoo = 1', 3, "a network card has no option 'foo'; it has link"),
]
MACHINE = [
    ('json = true\nmem = "1K"', 2, "give a multiple of 4K from 1M to 64G"),
    ('json = true\nmem = "1000G"', 2, "give a multiple of 4K from 1M to 64G"),
    ('image = "nope"', 1, "there is no such file, and no built-in guest of that name"),
    ('json = true\nimage = ""', 2, "the name of the image is empty"),
    ('json = true\nimage = "empty"', 2, "empty: the file is empty"),
    ('json = true\nimage = "."', 2, "is a directory, and a file is wanted"),
    ('json = true\nimage = "zipped"', 2, "compressed with gzip; run gunzip on it first"),
    ('json = true\nimage = "elf"', 2, "a truncated ELF file"),
    ('image = "flat"\njson = true\nmem = "1M"', (1, 3), "lies outside RAM (0x0-0xfffff)"),
    ('image = "flat"\nload-addr = 0xF0000000', (1, 2), "lies outside RAM"),
    ('image = "flat"\nload-addr = -1', (1, 2), "lies outside RAM"),
    ('image = "flat"\nload-addr = 0x200000\nmode = 16', (1, 2, 3), "does not fit below 1 MiB"),
    ('image = "elf"\njson = true\nmode = 32', (1, 3), "--mode is for flat binaries"),
    ('initrd = "nope"', 1, "initrd nope: No such file"),
    ('image = "flat"\ninitrd = "disk"', (1, 2), "takes no initrd; only Linux"),
    ('append = "x"', 1, "takes no command line; only Linux"),
    ('image = "flat"\nappend = "x"', (1, 2), "takes no command line; only Linux"),
    ('image = "flat"\nmodule = ["disk"]', (1, 2), "takes no modules; only Multiboot"),
    ('module = [\n"disk",\n"nope,text"]', 3, "module nope: No such file"),
    ('image = "flat"\nkernel-entry = "pvh"', (1, 2), "--kernel-entry is for Linux"),
    ('firmware = "nope"', 1, "firmware nope: No such file"),
    ('firmware = "odd"', 1, "a firmware ROM of 1000 bytes: it must have a multiple of 64 KiB"),
    ('firmware = "rom"\nimage = "flat"', (1, 2), "--firmware starts by itself: give no image"),
    # How it runs.
    ('serial = "foo"', 1, "--serial foo: give stdio, file:PATH or none"),
    ('serial = "file:/no/where"', 1, "--serial file:/no/where: No such file"),
    ('debug-console = "foo"', 1, "--debug-console foo: give stderr, file:PATH or none"),
    ('debug-console = "file:/no/where"', 1, "--debug-console file:/no/where: No such file"),
    ('symbols = "nope"', 1, "symbols nope: No such file"),
    ('symbols = "odd"', 1, "symbols odd: line 1 is not 'address type name'"),
    ('snapshot = "odd"', 1, "exists and is not a snapshot; name another place"),
    ('json = true\nsnapshot-then = "quit"', 2, "--snapshot-then quit: say when"),
    ("json = true\nsnapshot-at = -1", 2, "--snapshot-at -1: not a time that can come"),
    ('json = true\nsnapshot-at = "text:"', 2, "the text to wait for is empty"),
]
TABLE = [*READING, *DEVICES, *DISKS, *NETS, *MACHINE]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """Where the command runs: files of every kind."""
    for name, data in {
        "disk": bytes(1024),
        "odd": b"no\n" * 333 + b"\n",
        "empty": b"",
        "flat": b"\xf4",
        "zipped": b"\x1f\x8b\x08" + bytes(100),
        "elf": b"\x7fELF\1\1\1",
        "rom": bytes(64 << 10),
    }.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


Boot = Callable[..., tuple[int, str]]


@pytest.fixture
def boot(here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Boot:
    """The command, in this process, with a machine file of some text: status, standard error."""
    monkeypatch.chdir(here)

    def boot(text: str | bytes, *arguments: str) -> tuple[int, str]:
        Path("machine.toml").write_bytes(text.encode() if isinstance(text, str) else text)
        status = main(["boot", "--config", "machine.toml", *arguments])
        out, err = capfd.readouterr()
        assert out == ""
        return status, err

    return boot


def at(*lines: int) -> str:
    """How messages name these lines."""
    words = f"lines {', '.join(map(str, lines[:-1]))} and {lines[-1]}"
    return f"vmm: config machine.toml: {words if lines[1:] else f'line {lines[0]}'}"


@pytest.mark.parametrize(
    ("text", "lines", "about"), TABLE, ids=[about.strip()[:40] for _, _, about in TABLE]
)
def test_what_is_wrong_is_named_with_its_line(
    boot: Boot, text: str, lines: int | tuple[int, ...], about: str
) -> None:
    status, err = boot(text + "\n")
    assert status == 2
    assert about in err
    named = at(*((lines,) if isinstance(lines, int) else lines))
    assert err.startswith((f"{named}: ", f"{named}, "))
    assert err.count("config machine.toml") == err.count("\n") == 1, err


@pytest.mark.parametrize("data", [b"\xff\xfe", b'mem = "1M"\n\xff'])
def test_what_is_no_text(boot: Boot, data: bytes) -> None:
    assert boot(data) == (2, f"{at(data.count(10) + 1)} is not UTF-8 text\n")


@pytest.mark.parametrize(
    ("path", "problem"), [("no", "No such file or directory"), (".", "is a directory")]
)
def test_what_is_no_file(here: Path, path: str, problem: str) -> None:
    status, _, err = run("boot", "--config", path, cwd=here)
    assert status == 2
    assert err.decode().startswith(f"vmm: config {path}: {problem}")
    assert err.count(b"\n") == 1


@pytest.mark.parametrize("text", ["", "# nothing\n"])
def test_a_file_that_says_nothing_is_right(here: Path, text: str) -> None:
    (here / "machine.toml").write_text(text)
    status, out, err = run("boot", "--config", "machine.toml", cwd=here)
    assert (status, err) == (0, b"")
    assert b"Goodbye" in out


def test_a_jail_that_cannot_be_had_keeps_its_status(boot: Boot) -> None:
    status, err = boot(f'jail = "strict"\n{RNG}isolation = "none"\n')
    assert status == 10
    assert err.startswith(f"{at(1, 4)}: --jail=strict cannot be had")
    assert err.count("\n") == 1


def test_a_name_in_the_text_is_no_place(boot: Boot) -> None:
    """Lines come from what an error is about, not from the words in it."""
    status, err = boot(f'{RNG}seed = 1\nname = "seed"\naddr = 5\n')
    assert (status, err.startswith(at(5))) == (2, True), err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--device", "rng,slot=32"), "--device rng,slot=32: device 'rng-2': slot=32 is not"),
        (("--device", "rng,addr=1"), "device 'rng-2' has no single bus region"),
        (("--device", "rng,name=x,slot=9"), "config machine.toml: line 4: device 'x': slot 9 is"),
        (("--disk", "no"), "device 'disk': file=no: No such file"),
        (("--disk", "no,if=ide"), "device 'ide': file=no: No such file"),
        (("--mem", "1K"), "guest memory of 1024 bytes"),
        (("--module", "nope"), "module nope: No such file"),
        (("--serial", "x"), "--serial x: give stdio"),
        (("nope",), "image nope: there is no such file"),
    ],
)
def test_what_the_command_line_says_is_not_the_files_fault(
    boot: Boot, arguments: tuple[str, ...], said: str
) -> None:
    text = f'mem = "16M"\n{RNG}slot = 9\n'
    status, err = boot(text, *arguments)
    assert (status, err.startswith(f"vmm: {said}")) == (2, True), err


@pytest.mark.skipif(os.geteuid() != 0, reason="what root has no device may have, and root is not")
def test_what_belongs_to_root(here: Path, boot: Boot) -> None:
    (here / "mine").mkdir(mode=0o700)
    status, err = boot('[[device]]\nmodel = "9p"\npath = "mine"\n')
    assert (status, err.startswith(at(3))) == (2, True), err


# The lines of keys and elements.

TEXT = '''\
a = 1 # b = 2
"c d" = [ # [[
  "x, y", 'z]',
  [1,
   2], {e = 3, f.g = [4, 5]},
]
when = 1979-05-27 07:32:00
h.i = """
[[no]]
\\"""" # the end
[t]
k = """"
k = 1"""
l = 0.5
[[u]]
[[u]]
m = {}
[[u.v]]
n = true
[u."w.x"]
o = []
'''


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (("a",), 1),
        (("b",), 1),
        (("c d",), 2),
        (("c d", 0), 3),
        (("c d", 1), 3),
        (("c d", 2), 4),
        (("c d", 2, 1), 5),
        (("c d", 3, "f", "g", 1), 5),
        (("c d", 4), 2),
        (("when",), 7),
        (("h", "i"), 8),
        (("t",), 11),
        (("t", "k"), 12),
        (("t", "l"), 14),
        (("u", 0), 15),
        (("u", 1), 16),
        (("u", 1, "m"), 17),
        (("u", 1, "v", 0, "n"), 19),
        (("u", 1, "w.x", "o"), 21),
    ],
)
def test_lines(path: tuple[str | int, ...], line: int) -> None:
    assert Lines(TEXT).of(*path) == line


SCALARS = ("1", "-0.5", "true", "07:32:00", "1979-05-27", '"a]\\""', "'#'", '""', "[]", "{}")
LONG_TEXTS = ('"""\n]"""', "'''\n\n'''", '"""\\\n"""')
values = st.recursive(
    st.sampled_from(SCALARS + LONG_TEXTS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda each: "[\n" + "\n, # ]\n".join(each) + "\n]"),
        st.lists(inner, max_size=3).map(lambda each: "[" + ",".join(each) + "]"),
    ),
    max_leaves=8,
)


@given(st.lists(st.tuples(st.sampled_from(["", "[[t]]\n", "\n", "# [\n"]), values), max_size=6))
def test_lines_of_any_file(pairs: list[tuple[str, str]]) -> None:
    text, expected, tables = "", {}, -1
    for number, (before, value) in enumerate(pairs):
        text += before
        tables += before.startswith("[[")
        path = (f"key{number}",) if tables < 0 else ("t", tables, f"key{number}")
        expected[path] = text.count("\n") + 1
        text += f"key{number} = {value}\n"
    lines = Lines(text)
    assert {path: lines.of(*path) for path in expected} == expected, text
