"""``--config machine.toml`` and ``vmm devices``: every option has a place, a wrong one its line."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from cli_rig import run

from devices.errors import UserError
from devices.registry import MODELS
from vmm.cli import build_parser
from vmm.cli.given import Given
from vmm.cli.machine_file import read_defaults
from vmm.config import OF_ANY_FUNCTION

WHOLE = """
image = "echo"
mem = "64M"
load-addr = 0x7000
mode = 64
append = "console=ttyS0"
initrd = "initrd.gz"
kernel-entry = "pvh"
firmware = "rom"
clock = "virtual"
module = ["a,b", "c"]
no-default-devices = true
serial = "none"
timeout = 1.5
snapshot = "snap"
snapshot-at = "end"
snapshot-then = "quit"
snapshot-disks = "none"
json = true
debug-console = "stderr"
screen = true
screen-live = true
trace = "unclaimed"
symbols = "map"
stats = true
jail = "strict"
on-failure = "isolate"
deadline = 2
lane = "socket"

[[device]]
model = "echo"
name = "second"
addr = 0xF00

[[disk]]
file = "root.img"

[[net]]
link = "user"
forward = ["tcp:8080:80", "udp:53:53"]
"""


def boot_parser() -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = build_parser().parse_args(["boot"]).parser
    return parser


def read(tmp_path: Path, text: str) -> dict[str, Any]:
    path = tmp_path / "machine.toml"
    path.write_text(text)
    return read_defaults(str(path), boot_parser())


def test_every_option_has_a_place(tmp_path: Path) -> None:
    found = read(tmp_path, WHOLE)
    there = {a.dest for a in boot_parser()._actions} - {"help", "config"}
    assert set(found) == there, "an option that this test does not know: add it to WHOLE"
    assert found["load_addr"] == 0x7000
    assert (found["mode"], found["timeout"], found["deadline"]) == (64, 1.5, 2.0)
    assert found["module"] == ["a,b", "c"]
    (device,) = found["device"]
    assert isinstance(device, Given)
    assert device.values == {"model": "echo", "name": "second", "addr": 0xF00}
    assert found["disk"][0].values == {"file": "root.img"}
    assert found["net"][0].values == {"link": "user", "forward": ["tcp:8080:80", "udp:53:53"]}


@pytest.mark.parametrize(
    ("text", "line", "about"),
    [
        ('mem = "1M"\nmemm = "64M"\n', 2, "do you mean 'mem'"),
        ('\n\nmem = "abc"\n', 3, "'abc' is not a size"),
        ("mem = true\n", 1, "is text or a number"),
        ("image = 3\n", 1, "line 1: image is text, not 3"),
        ('module = ["a", 1.5]\n', 1, "line 1: module is text, not 1.5"),
        ("mem = 1979-05-27\n", 1, "line 1: mem is text or a number, not 1979-05-27"),
        ("mem = [1]\n", 1, "line 1: mem is text or a number, not a list"),
        ("serial = {a = 1}\n", 1, "line 1: serial is text or a number, not a table"),
        ("json = 'x'\n", 1, "line 1: json is true or false, not 'x'"),
        ("module = true\n", 1, "line 1: module is a list, not true"),
        ("snapshot_at = 1\n", 1, "no option 'snapshot_at'; do you mean 'snapshot-at'"),
        ("#\nmode = 48\n", 2, "'48' is none of 16, 32, 64"),
        ("stats = 1\n", 1, "is true or false"),
        ('append = """\nmem = 3\n"""\nclock = "fast"\n', 4, "'fast' is none of real, virtual"),
        ("deadline = 99999\n", 1, "more than 3600"),
        ('module = "a"\n', 1, "is a list"),
        ("config = 'other'\n", 1, "there is no option 'config'"),
        ('mem = "1M"\n[run]\nstats = true\n', 2, "there is no option 'run'"),
        ('mem = "1M"\nmem = "2M"\n', 2, "overwrite"),
        ("mem = \n", 1, "Invalid value"),
        ('mem = "1M"\n[net]\nlink = "user"\n', 2, r"there may be several: write \[\[net\]\]"),
        ('device.model = "rng"\n', 1, r"there may be several: write \[\[device\]\]"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(
    tmp_path: Path, text: str, line: int, about: str
) -> None:
    with pytest.raises(UserError, match=about) as caught:
        read(tmp_path, text)
    assert f"line {line}" in str(caught.value)


@pytest.mark.parametrize(
    ("device", "line", "about"),
    [
        ('name = "x"\n', 3, "needs a model"),
        ('model = "nothing"\n', 4, "unknown device model 'nothing'"),
        ('model = "echo"\nadr = 3\n', 5, "has no option 'adr'"),
        ('model = "echo"\nname = "x"\nbus = "isa"\n', 6, "bus=isa"),
        ('model = "echo"\nslot = "two"\n', 5, "slot=two is not [BRIDGE:]DEVICE"),
        ('model = "echo"\nirq = true\n', 5, "irq=True is not a number"),
        ('model = "echo"\nisolation = "some"\n', 5, "isolation is 'jail' or 'none'"),
        ('model = "rng"\nseed = "x"\n', 5, "option seed=x is not a whole number\n"),
        ('model = "rng"\nseed = 1.5\n', 5, "option seed=1.5 is not a whole number\n"),
        ('model = "rng"\nseed = [1]\n', 5, "option seed=[1] is not a whole number\n"),
        ('model = "balloon"\npages = -1\n', 5, "is not a whole number from 0 to 4294967295\n"),
        ('model = "blk"\npath = 5\n', 5, "option path=5 is not text\n"),
        ('model = "blk"\nreadonly = "x"\n', 5, "option readonly=x is not true or false\n"),
        ('model = "serial"\nport = "x"\n', 5, "is not one of com1, com2, com3, com4\n"),
        ('model = "config-space"\nrom = true\n', 5, "rom=true is not the name of a file\n"),
        ('model = "balloon"\ndma = "granted"\n', 5, "no more of guest memory"),
    ],
)
def test_so_it_is_of_devices(tmp_path: Path, device: str, line: int, about: str) -> None:
    path = tmp_path / "machine.toml"
    path.write_text('image = "echo"\n\n[[device]]\n' + device)
    status, _, err = run("boot", "--config", str(path))
    assert status == 2
    assert about in err.decode()
    assert f"line {line}: " in err.decode()
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "line", "about"),
    [
        ('[[disk]]\nfile = "no.img"', 3, "device 'disk': file=no.img: No such file"),
        ('[[disk]]\nif = "ide"\nfile = "no.img"', 4, "device 'ide': file=no.img: No such file"),
        ('[[device]]\nmodel = "9p"\npath = "no"', 4, "device '9p': path=no: No such file"),
        ('[[device]]\nmodel = "rng"\nslot = "br9:3"', 4, "slot=br9:3 is behind 'br9'"),
        ('device = ["x"]', 2, "unknown device model 'x'"),
        ('device = ["rng", "rng,seed"]', 2, "'seed' is not option=value\n"),
        ('device = [\n  "rng,slot=br9:3",\n]', 2, "slot=br9:3 is behind 'br9'"),
        ('disk = ["no.img"]', 2, "device 'disk': file=no.img: No such file"),
        ('disk = ["no.img,foo=1"]', 2, "a disk has no option 'foo'"),
        ('net = ["foo"]', 2, "link is user, pair:NAME or tap:NAME, not foo"),
        (
            '[[device]]\nmodel = "rng"\nname = "a"\n[[device]]\nmodel = "rng"\nname = "a"',
            *(7, "device 'a': another one has this name; give one of them a name="),
        ),
        ('disk = ["no.img"]\n[[net]]\nlink = "user"\nname = "disk"', 5, "has this name"),
        ('[[device]]\nmodel = "echo"\naddr = 0x10000', 4, "leaves the space of 0x10000"),
        ('[[device]]\nmodel = "rng"\n[[disk]]\nname = "d"\nfile = "no.img"', 6, "device 'd'"),
    ],
)
def test_so_it_is_of_what_building_the_machine_finds(
    tmp_path: Path, text: str, line: int, about: str
) -> None:
    config = tmp_path / "machine.toml"
    config.write_text(f'image = "hello"\n{text}\n')
    status, out, err = run("boot", "--config", str(config))
    assert (status, out) == (2, b"")
    assert f"config {config}: line {line}: " in err.decode()
    assert about in err.decode()
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "about"),
    [
        ('image = "nope"', "image nope: there is no such file"),
        ('serial = "file:/no/where"', "--serial file:/no/where: No such file"),
        ('initrd = "/no/file"', "initrd /no/file: No such file"),
        ('module = ["/no/file,text"]', "module /no/file: No such file"),
        ('snapshot-then = "quit"', "--snapshot-then quit: say when"),
    ],
)
def test_so_it_is_of_what_the_options_name(tmp_path: Path, text: str, about: str) -> None:
    config = tmp_path / "machine.toml"
    config.write_text(f"json = true\n{text}\n")
    status, out, err = run("boot", "--config", str(config))
    assert (status, out) == (2, b"")
    assert f"config {config}: line 2: {about}" in err.decode()
    assert len(err.splitlines()) == 1


def test_what_the_command_line_says_is_not_the_files_fault(tmp_path: Path) -> None:
    config = tmp_path / "machine.toml"
    config.write_text('image = "no"\n')
    _, _, err = run("boot", "nope", "--config", str(config))
    assert err.startswith(b"vmm: image nope: there is no such file"), err


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    assert read(tmp_path, '\ufeffmem = "1M"\n') == {"mem": "1M"}


def test_the_command_line_wins_and_adds(tmp_path: Path) -> None:
    path = tmp_path / "machine.toml"
    path.write_text(
        'image = "no such guest"\nserial = "none"\njson = true\n'
        '[[device]]\nmodel = "echo"\nname = "from-file"\naddr = 0xF00\n'
    )
    status, out, err = run(
        *("boot", "echo", "--config", str(path), "--device", "echo,addr=0xF10,name=from-line"),
        *("--stats", "--serial", "stdio"),
    )
    assert status == 1, err
    devices = json.loads(out)["stats"]["devices"]
    assert {"from-file", "from-line"} <= set(devices)
    assert "checks, all right" in json.loads(out)["output"]


@pytest.mark.parametrize("data", [b"\xff\xfe", b'mem = "1M"\n\xff'])
def test_what_is_no_text(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "machine.toml"
    path.write_bytes(data)
    status, _, err = run("boot", "--config", str(path))
    assert status == 2
    assert f"line {data.count(10) + 1} is not UTF-8".encode() in err


def test_the_example_of_the_documentation(tmp_path: Path) -> None:
    text = (Path(__file__).parent.parent / "docs" / "devices.md").read_text()
    found = read(tmp_path, text.partition("```toml\n")[2].partition("```")[0])
    assert found["mem"] == "256M"
    assert found["device"][0].values["addr"] == 0xF00


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    status, _, err = run("boot", "--config", str(tmp_path / "none.toml"))
    assert status == 2
    assert b"none.toml" in err
    assert len(err.splitlines()) == 1


# vmm devices, vmm jail.


def test_devices_lists_models_and_their_options() -> None:
    status, out, _ = run("devices", "--json")
    assert status == 0
    found = json.loads(out)
    assert set(found) == set(MODELS)
    for model, about in found.items():
        assert about["summary"], model
        for option in about["options"]:
            assert option["meaning"], f"{model}: say in its Options what {option['name']} means"
            assert option["kind"], model
    (bus,) = found["echo"]["options"]
    assert (bus["name"], bus["kind"], bus["default"]) == ("bus", "pio|mmio", "pio")
    status, out, _ = run("devices")
    assert status == 0
    for model in MODELS:
        assert f"\n{model}  " in f"\n{out.decode()}"
    defaults = {each["name"]: each["default"] for each in found["console"]["options"]}
    assert (defaults["columns"], defaults["rows"]) == ("80", "25")
    options = {each["name"]: each for each in found["config-space"]["options"]}
    assert (options["rom"]["kind"], options["rom"]["default"]) == ("FILE", "")
    assert options["vendor-id"]["default"] == "0x1234"


@pytest.mark.parametrize("option", ["device", "disk", "net"])
def test_help_names_the_options_of_any_function(option: str) -> None:
    (action,) = (action for action in boot_parser()._actions if action.dest == option)
    for name in OF_ANY_FUNCTION:
        assert f"{name}=" in str(action.help)


def test_jail_shows_what_each_device_has() -> None:
    status, out, _ = run("jail", "--json")
    assert status == 0
    rights = json.loads(out)["devices"]["echo"]["rights"]
    assert rights["descriptors"] == ["tube", "doorbell"]
    assert rights["system_calls"] == []
    assert rights["guest_memory"] == 0
    status, out, _ = run("jail")
    assert "\nserial has\n" in out.decode()
    assert "  guest memory  none" in out.decode()
