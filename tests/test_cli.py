"""The command line as a user and a script meet it, in processes of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import guests

VMM = [sys.executable, "-m", "vmm"]


def run(
    *arguments: str, stdin: bytes | None = b"", cwd: Path | None = None
) -> subprocess.CompletedProcess[bytes]:
    """One command, with standard input from a pipe."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    return subprocess.run(
        [*VMM, *arguments],
        input=stdin,
        capture_output=True,
        timeout=100,
        check=False,
        cwd=cwd,
        env=environment,
    )


def test_the_default_guest_says_what_it_found() -> None:
    done = run("boot")
    assert done.returncode == 0, done.stderr
    assert done.stderr == b""
    text = done.stdout.decode()
    assert text.startswith("Hello from the default guest!\n")
    assert "Echo device at port 0xEC0:" in text
    assert "32 bits: wrote cafef00d, read cafef00d" in text
    assert "00:01.0 1234:c501 class ff0000 INTA#" in text


@pytest.mark.parametrize(
    ("guest", "status"),
    [("hello", 0), ("echo", 1), ("crash", 4), ("pci64", 0), ("multiboot", 0), ("elf64", 0)],
)
def test_exit_statuses_of_guests(guest: str, status: int) -> None:
    assert run("boot", guest, "--mem", "16M").returncode == status


def test_a_crash_is_reported_with_registers_and_the_instruction() -> None:
    done = run("boot", "crash")
    assert done.returncode == 4
    text = done.stderr.decode()
    assert "triple fault" in text
    assert "ud2" in text
    assert "Traceback" not in text


def test_json_is_one_object_and_nothing_else() -> None:
    done = run("boot", "echo", "--json", "--stats")
    assert done.stderr == b""
    values = json.loads(done.stdout)
    assert values["ending"] == "guest-exit"
    assert values["guest_value"] == 0
    assert values["status"] == done.returncode == 1
    assert "all right" in values["output"]
    assert values["stats"]["devices"]["echo"]["pio"]["reads"] > 0


def test_timeout(tmp_path: Path) -> None:
    done = run("boot", "counter", "--timeout", "0.5", "--mem", "16M")
    assert done.returncode == 8
    assert b"timeout" in done.stderr


def test_serial_to_a_file(tmp_path: Path) -> None:
    done = run("boot", "hello", "--serial", f"file:{tmp_path}/log")
    assert (done.returncode, done.stdout) == (0, b"")
    assert (tmp_path / "log").read_bytes() == b"Hello from the guest!\n"


def test_serial_to_nowhere() -> None:
    done = run("boot", "hello", "--serial", "none")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_piped_input_and_its_end() -> None:
    done = run("boot", "serial-echo", "--mem", "16M", stdin=b"first\rquit\r")
    assert done.returncode == 0
    assert b"You said: first" in done.stdout


def test_input_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "typed").write_bytes(b"from a file\rquit\r")
    with open(tmp_path / "typed", "rb") as typed:
        done = subprocess.run(
            [*VMM, "boot", "serial-poll"], stdin=typed, capture_output=True, timeout=60, check=False
        )
    assert done.returncode == 0
    assert b"You said: from a file" in done.stdout


@pytest.mark.parametrize("close", ["0<&-", "0</dev/null", "0<&- 1>&-", "0<&- 2>&-"])
def test_closed_descriptors(close: str) -> None:
    command = f"exec {' '.join(VMM)} boot hello {close}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, timeout=60, check=False)
    assert b"Traceback" not in done.stderr
    assert done.returncode == 0
    assert done.stdout == (b"" if "1>&-" in close else b"Hello from the guest!\n")


def test_a_reader_that_goes_away() -> None:
    command = f"{' '.join(VMM)} boot counter --timeout 20 | head -n 2"
    began = time.monotonic()
    done = subprocess.run(["sh", "-c", command], capture_output=True, timeout=60, check=False)
    assert done.stdout == b"counter 1\ncounter 2\n"
    assert b"Traceback" not in done.stderr
    assert time.monotonic() - began < 19  # it ended because of the pipe, not of the time-out


@pytest.mark.parametrize("arguments", ["devices", "demo isolation", "demo suspend"])
def test_a_reader_that_goes_away_is_no_failure(arguments: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [*VMM, *arguments.split()],
            stdout=writer,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_it_in_order(number: signal.Signals) -> None:
    process = subprocess.Popen(
        [*VMM, "boot", "counter", "--mem", "16M"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"counter 1\n"
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert children
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert not any(Path(f"/proc/{child}").exists() for child in children)


def test_killed_hard_it_leaves_no_process_behind() -> None:
    process = subprocess.Popen(
        [*VMM, "boot", "counter", "--mem", "16M"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"counter 1\n"
    family = _descendants(process.pid)
    assert len(family) >= 4  # the warden and three devices
    process.kill()
    process.communicate(timeout=30)
    for _ in range(300):
        if not any(Path(f"/proc/{pid}").exists() for pid in family):
            return
        time.sleep(0.01)
    pytest.fail(f"still there: {[pid for pid in family if Path(f'/proc/{pid}').exists()]}")


def _descendants(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return []
    return [int(c) for c in children] + [d for c in children for d in _descendants(int(c))]


# Snapshot and restore.


@pytest.mark.parametrize("when", ["counter 4\n", "text:counter 4\n", "0.05", "0.05s"])
def test_snapshot_at_and_restore(tmp_path: Path, when: str) -> None:
    image = tmp_path / "counter.bin"
    image.write_bytes(guests.patched("counter", limit=20, delay=20_000_000))
    saved = str(tmp_path / "saved")
    first = run(
        "boot",
        str(image),
        "--snapshot",
        saved,
        "--snapshot-at",
        when,
        "--snapshot-then",
        "quit",
        "--mem",
        "16M",
    )
    assert first.returncode == 0, first.stderr
    assert b"snapshot written" in first.stderr
    second = run("restore", saved)
    assert second.returncode == 0, second.stderr
    assert first.stdout + second.stdout == b"".join(b"counter %d\n" % n for n in range(1, 21))


def test_snapshot_and_go_on(tmp_path: Path) -> None:
    image = tmp_path / "counter.bin"
    image.write_bytes(guests.patched("counter", limit=20, delay=1_000_000))
    done = run("boot", str(image), "--snapshot", "s", "--snapshot-at", "counter 7", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout == b"".join(b"counter %d\n" % n for n in range(1, 21))
    again = run("restore", "s", cwd=tmp_path)
    assert done.stdout.endswith(again.stdout)
    assert again.stdout.endswith(b"counter 20\n")


@pytest.mark.parametrize("then", ["continue", "quit"])
def test_a_snapshot_that_fails(tmp_path: Path, then: str) -> None:
    """The guest runs on, if it was to; that something is missing is said at the end, too."""
    image = tmp_path / "counter.bin"
    image.write_bytes(guests.patched("counter", limit=40, delay=20_000_000))
    options = ["--snapshot", "s", "--snapshot-at", "counter 20", "--snapshot-then", then]
    with subprocess.Popen(
        [*VMM, "boot", str(image), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"counter 1\n"
        (tmp_path / "s").write_text("in the way")
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert b"exists and is not a snapshot" in errors.splitlines()[-1]
    assert (b"no snapshot, the guest runs on: " in errors) == (then == "continue")
    assert output.endswith(b"counter 40\n") == (then == "continue")
    assert (tmp_path / "s").read_text() == "in the way"


def test_snapshot_at_the_end(tmp_path: Path) -> None:
    done = run("boot", "hello", "--snapshot", "s", "--snapshot-at", "end", cwd=tmp_path)
    assert done.returncode == 0
    assert run("restore", "s", cwd=tmp_path).returncode == 0


# Wrong inputs: one line, what and where, status 2.


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["boot", "no-such-file"], "no-such-file"),
        (["boot", "."], "directory"),
        (["boot", "hello", "--mem", "lots"], "'lots' is not a size"),
        (["boot", "hello", "--mem", "12345"], "memory"),
        (["boot", "hello", "--load-addr", "0x100000000000"], "0x100000000000"),
        (["boot", "hello", "--mode", "17"], "--mode"),
        (["boot", "hello", "--device", "flux"], "unknown device model 'flux'"),
        (["boot", "hello", "--serial", "tcp:1"], "--serial tcp:1"),
        (["boot", "hello", "--serial", "file:/no/where"], "/no/where"),
        (["boot", "hello", "--timeout", "-1"], "--timeout"),
        (["boot", "hello", "--timeout", "soon"], "--timeout"),
        (["boot", "hello", "--module", "/no/file"], "/no/file"),
        (["boot", "hello", "--snapshot-at", "nan"], "--snapshot-at nan"),
        (["boot", "hello", "--frobnicate"], "--frobnicate"),
        (["restore", "/no/where"], "/no/where"),
        (["restore", ""], "directory: its name is empty"),
        (["boot", "hello", "--initrd", "/no/file"], "initrd /no/file"),
        (["bench", "--linux", "/no/where"], "/no/where"),
        (["demo", "nothing"], "no demo 'nothing'"),
        (["fly"], "fly"),
        ([], "COMMAND"),
    ],
)
def test_wrong_usage(arguments: list[str], complaint: str) -> None:
    done = run(*arguments)
    text = done.stderr.decode()
    assert done.returncode == 2, text
    assert len(text.strip().splitlines()) == 1, text
    assert complaint in text
    assert "Traceback" not in text
    assert done.stdout == b""


def test_unrecognized_arguments_lead_to_the_help_of_their_command() -> None:
    done = run("boot", "hello", "--frobnicate")
    assert b"unrecognized arguments: --frobnicate (see python -m vmm boot --help)" in done.stderr
    assert b"(see python -m vmm --help)" in run("--frobnicate", "boot").stderr


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "empty"),
        (b"\x7fELF", "ELF"),
        (b"\x7fELF" + bytes(200), "ELF"),
        (guests.image("elf64")[:100], "ELF"),
        (b"\x1f\x8b\x08" + bytes(50), "gzip"),
    ],
)
def test_images_that_are_none(tmp_path: Path, content: bytes, complaint: str) -> None:
    (tmp_path / "image").write_bytes(content)
    done = run("boot", str(tmp_path / "image"))
    assert done.returncode == 2
    text = done.stderr.decode()
    assert len(text.strip().splitlines()) == 1, text
    assert complaint.lower() in text.lower()


@pytest.mark.parametrize(
    "arguments", [["--help"], ["boot", "--help"], ["restore", "--help"], ["bench", "--help"]]
)
def test_help_teaches(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 0
    assert len(done.stdout) > 250
    if arguments == ["--help"]:
        assert b"exit status" in done.stdout


def test_guests_list() -> None:
    assert json.loads(run("guests", "--json").stdout).keys() == guests.GUESTS.keys()
    assert b"counter" in run("guests").stdout


def test_jail_table_and_json() -> None:
    table = run("jail").stdout.decode()
    assert "seccomp" in table
    assert "config-space" in table
    values = json.loads(run("jail", "--json").stdout)
    assert values["devices"]["serial"]["layers"]["seccomp"]["state"] == "enforced"


def test_no_jail_says_so_at_every_start() -> None:
    done = run("boot", "hello", "--jail", "off")
    assert done.returncode == 0
    assert b"OFF" in done.stderr


def test_more_devices(tmp_path: Path) -> None:
    done = run("boot", "default", "--device", "config-space,slot=9", "--device", "echo,addr=0xF00")
    assert b"00:09.0" in done.stdout
    bare = run("boot", "hello", "--no-default-devices")
    assert (bare.returncode, bare.stdout) == (0, b"")


def test_multiboot_command_line_and_module(tmp_path: Path) -> None:
    (tmp_path / "module").write_bytes(b"text of the module\n")
    done = run(
        "boot", "multiboot", "--append", "colour=blue", "--module", f"{tmp_path}/module,first"
    )
    assert b"colour=blue" in done.stdout
    assert b"first" in done.stdout
    assert b"text of the module" in done.stdout


@pytest.mark.parametrize(
    ("code", "line"),
    [
        ("c5f458c2", "unsupported instruction: vaddps ymm0, ymm1, ymm2, which needs AVX;"),
        ("0f0b", "the guest asked for this exception itself: ud2"),
        ("b800000020ffe0", "fetch from device memory"),  # mov eax, 0x20000000; jmp eax
        ("66bac00eb85a000000ee eca100000020 0f0b", "write pio 0xec0,  8 bits: 0x5a (echo)"),
        ("66bac00eb85a000000ee eca100000020 0f0b", "read  pio 0xec0,  8 bits: 0x5a (echo)"),
        ("a100000020 0f0b", "read  mmio 0x20000000, 32 bits: 0xffffffff (nobody answers there)"),
    ],
)
def test_a_crash_is_explained(tmp_path: Path, code: str, line: str) -> None:
    (tmp_path / "crash.bin").write_bytes(bytes.fromhex(code))
    done = run("boot", str(tmp_path / "crash.bin"))
    assert done.returncode == 4
    assert line in done.stderr.decode()


def test_symbols_of_a_crash_come_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "crash.bin").write_bytes(b"\x90\x0f\x0b")
    (tmp_path / "System.map").write_text("00100000 T start\n00100001 t trap\n")
    done = run("boot", str(tmp_path / "crash.bin"), "--symbols", str(tmp_path / "System.map"))
    assert done.returncode == 4
    assert b", at 0x100001 <trap>" in done.stderr


def test_a_kernel_that_gave_up_is_named(tmp_path: Path) -> None:
    """Whatever it is: its last words on the console are Linux's, and then it resets the machine."""
    code = bytes.fromhex("be17001000 66baf803 ac 84c0 7403 ee ebf8 66ba6400 b0fe ee")
    (tmp_path / "panic.bin").write_bytes(code + b"Kernel panic - not syncing: Oh \x1b no!\r\n\0")
    done = run("boot", str(tmp_path / "panic.bin"))
    assert done.returncode == 12
    assert done.stderr == b"vmm: reset: kernel panic: Oh ? no!\r\n"


def test_statistics_say_where_the_time_went(tmp_path: Path) -> None:
    """A guest that computes, uses a device, raises an exception and sleeps; the parts add up."""
    began = time.monotonic()
    done = run("boot", "default", "--stats", "--json")
    wall = time.monotonic() - began
    spent = json.loads(done.stdout)["stats"]["seconds"]
    assert {"serial", "echo"} <= spent["devices"].keys()
    numbers = [value for name, value in spent.items() if isinstance(value, float)]
    assert min(numbers) >= 0.0
    assert spent["start_up"] > 0.0
    total = sum(numbers) + sum(spent["devices"].values())
    assert total <= wall + 0.1  # the process's start is known to a hundredth of a second
    text = run("boot", "default", "--stats").stderr
    assert b"vmm: time: start-up and end " in text
    assert b"vmm: time in devices: " in text


def test_an_empty_firmware_is_named(tmp_path: Path) -> None:
    rom = tmp_path / "bios.rom"
    rom.touch()
    done = run("boot", "--firmware", str(rom))
    assert done.returncode == 2
    assert done.stderr.decode().splitlines() == [f"vmm: firmware {rom}: the file is empty"]
