"""Where output goes when its reader stalls, is full or was never there."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cli_rig import FLOOD, READ_E00, VMM, environment, faulty, finish, run, start

from vmm.cli.output import HIGH, LINE, Outputs, clean


@pytest.fixture
def flood(tmp_path: Path) -> str:
    """A guest that prints for ever."""
    (tmp_path / "flood.bin").write_bytes(FLOOD)
    return str(tmp_path / "flood.bin")


@pytest.fixture
def stalled() -> Iterator[int]:
    """The writing end of a pipe that is full and that nobody reads."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    for size in (4096, 1):
        try:
            while True:
                os.write(writer, bytes(size))
        except BlockingIOError:
            pass
    os.set_blocking(writer, True)
    yield writer
    os.close(reader)
    os.close(writer)


# A reader that stalls.


@pytest.fixture
def narrow() -> Iterator[tuple[int, int]]:
    """The ends of a pipe that a guest has soon filled; the test closes the writing one."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    yield reader, writer
    os.close(reader)


def read_all(reader: int) -> bytes:
    with os.fdopen(reader, "rb", closefd=False) as file:
        return file.read()


def test_the_time_out_comes_although_nobody_reads(flood: str, stalled: int) -> None:
    status, _, err = run("boot", flood, "--timeout", "1", stdout=stalled)
    assert status == 8
    assert b"the guest ran for 1 s" in err
    assert b"dropped" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_come_although_nobody_reads(
    flood: str, stalled: int, number: signal.Signals
) -> None:
    process = start("boot", flood, stdout=stalled)
    time.sleep(1.5)
    process.send_signal(number)
    assert finish(process, 20)[0] == 130


def test_an_interrupt_does_not_wait_for_who_should_read_the_result(
    flood: str, stalled: int
) -> None:
    process = start("boot", flood, "--json", stdout=stalled)
    time.sleep(1.5)
    process.send_signal(signal.SIGTERM)
    assert finish(process, 20)[0] == 130


def test_the_time_out_comes_although_nobody_reads_the_log(tmp_path: Path, stalled: int) -> None:
    (tmp_path / "e9.bin").write_bytes(bytes.fromhex("66bae900b041eeebfd"))
    process = start(
        *("boot", f"{tmp_path}/e9.bin", "--debug-console", "stderr", "--timeout", "1"),
        stderr=stalled,
    )
    assert finish(process, 20)[0] == 8


LETTERS = bytes.fromhex(
    # mov dx, 0x3f8; mov ecx, 150000; l: mov al, cl; and al, 0x1f; or al, 0x60; out dx, al;
    # dec ecx; jnz l; hlt
    "66baf803 b9f0490200 88c8 241f 0c60 ee 49 75f6 f4"
)


def test_the_guest_waits_for_its_reader(flood: str, narrow: tuple[int, int]) -> None:
    """It is stopped, not let run on with its output thrown away or piled up."""
    reader, writer = narrow
    process = start("boot", flood, stdout=writer)
    os.close(writer)
    assert os.read(reader, 1) == b"A"
    time.sleep(3)  # for several times as much
    process.send_signal(signal.SIGTERM)
    out = read_all(reader)
    assert finish(process)[0] == 130
    assert set(out) == set(b"A")
    assert len(out) < 2 * HIGH


def test_a_slow_reader_gets_everything(tmp_path: Path, narrow: tuple[int, int]) -> None:
    """The guest is stopped in the middle, and goes on when there is room."""
    reader, writer = narrow
    image = tmp_path / "letters.bin"
    image.write_bytes(LETTERS)
    process = start("boot", str(image), stdout=writer)
    os.close(writer)
    out = os.read(reader, 4096)
    time.sleep(2.5)
    out += read_all(reader)
    assert finish(process)[0] == 0
    assert out == bytes(n & 0x1F | 0x60 for n in range(150_000, 0, -1))


def test_standard_output_that_does_not_block(flood: str, narrow: tuple[int, int]) -> None:
    reader, writer = narrow
    os.set_blocking(writer, False)
    process = start("boot", flood, "--timeout", "3", stdout=writer)
    os.close(writer)
    time.sleep(1.5)
    assert len(read_all(reader)) > 1 << 14
    assert finish(process)[0] == 8


# Places that take nothing.


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["boot", "hello", "--json"], 2),
        (["boot", "hello"], 2),
        (["jail"], 2),
        (["guests"], 2),
    ],
)
def test_full_standard_output(arguments: list[str], status: int) -> None:
    with open("/dev/full", "wb") as full:
        got, _, err = run(*arguments, stdout=full)
    assert got == status
    assert err.count(b"\n") == 1, err
    assert b"No space left" in err


@pytest.mark.parametrize("arguments", [["boot", "hello", "--stats"], ["boot", "hello"]])
def test_full_standard_error(arguments: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        got, out, _ = run(*arguments, stderr=full)
    assert (got, out) == (0, b"Hello from the guest!\n")


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("boot default >&-", 0),
        ("boot default <&- >&- 2>&-", 0),
        ("boot counter 2>&- --timeout 1", 8),
        ("boot no-such-file 2>&-", 2),
        ("fly 2>&-", 2),
        ("boot hello --json >&-", 0),
        ("jail >&-", 0),
    ],
)
def test_closed_descriptors(command: str, status: int) -> None:
    done = subprocess.run(
        ["sh", "-c", f"exec {' '.join(VMM)} {command}"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        check=False,
        env=environment(),
    )
    assert done.returncode == status, done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_no_machine_descriptor_takes_a_standard_number(tmp_path: Path, closed: int) -> None:
    printed = tmp_path / "printed"
    process = start(
        *("boot", "counter", "--timeout", "60", "--serial", f"file:{printed}"),
        preexec_fn=lambda: os.close(closed),
    )
    try:
        while process.poll() is None and not (printed.exists() and printed.stat().st_size):
            time.sleep(0.05)
        assert os.readlink(f"/proc/{process.pid}/fd/{closed}") == "/dev/null"
    finally:
        process.terminate()
        finish(process)


# Text of devices is no terminal control.


def test_what_is_printed_for_people_is_clean() -> None:
    assert clean("a\x1b[31mb\r\nc\x07\u202e\udcffd") == "a?[31mb??c???d"
    assert clean("one\ttwo") == "one     two"
    assert clean("grün ✓") == "grün ✓"
    long = clean("z" * 5000)
    assert len(long) <= LINE
    assert long.endswith("...")


def test_devices_cannot_write_escape_sequences(tmp_path: Path) -> None:
    (tmp_path / "read.bin").write_bytes(READ_E00)
    status, _, err = run(
        *("boot", f"{tmp_path}/read.bin", "--device", "faulty:Escapes", "--timeout", "20"),
        env=faulty(tmp_path),
    )
    assert status == 6
    assert b"boo" in err
    assert b"two" in err
    assert b"\x1b" not in err
    assert b"\x07" not in err
    assert not [line for line in err.split(b"\r\n") if line.startswith(b"vmm: three")]
    assert max(map(len, err.splitlines())) < LINE + 100


# The queue itself.


@pytest.fixture
def outputs() -> Iterator[tuple[Outputs, Callable[[], int]]]:
    calls: list[None] = []
    made = Outputs(lambda: calls.append(None))
    yield made, lambda: len(calls)
    made.close()


def test_the_queue_is_bounded(
    outputs: tuple[Outputs, Callable[[], int]], stalled: int, tmp_path: Path
) -> None:
    queue, _ = outputs
    assert not queue.full
    while not queue.write(stalled, bytes(4096)):
        pass
    assert queue.full
    assert queue.pending() <= 1 << 20
    for _ in range(40):
        queue.write(stalled, bytes(1 << 20))
    assert queue.pending() <= 20 << 20
    assert not queue.drain(0.05)
    with open(tmp_path / "other", "wb") as other:
        queue.write(other.fileno(), b"another place has its own queue")
        assert queue.drain(10, other.fileno())
    assert (tmp_path / "other").read_bytes() == b"another place has its own queue"


def test_room_again_wakes_the_machine(outputs: tuple[Outputs, Callable[[], int]]) -> None:
    queue, woken = outputs
    reader, writer = os.pipe()
    while not queue.write(writer, bytes(4096)):
        pass

    def read() -> None:
        while os.read(reader, 1 << 16):
            pass

    thread = threading.Thread(target=read)
    thread.start()
    assert queue.drain(30)
    assert not queue.full
    assert woken()
    os.close(writer)
    thread.join()
    os.close(reader)


def test_a_broken_pipe_is_told_and_no_more_is_kept(
    outputs: tuple[Outputs, Callable[[], int]],
) -> None:
    queue, woken = outputs
    reader, writer = os.pipe()
    os.close(reader)
    queue.write(writer, b"x")
    assert queue.drain(10)
    assert isinstance(queue.failure(writer), BrokenPipeError)
    assert woken()
    assert not queue.write(writer, bytes(1 << 20))
    assert queue.pending() == 0
    os.close(writer)
