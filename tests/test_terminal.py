"""The terminal: raw mode, the escape menu, and giving the terminal back as it was."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from cli_rig import FLOOD, environment, faulty, run
from hypothesis import given
from hypothesis import strategies as st

from vmm.terminal import ESCAPE, EscapeParser


def test_keys_are_split() -> None:
    parser = EscapeParser()
    assert parser.feed(b"ab\x01xcd") == [("input", b"ab"), ("menu", b"x"), ("input", b"cd")]
    assert parser.feed(b"\x01") == []
    assert parser.feed(b"\x01e") == [("input", b"\x01e")]


def test_a_line_is_typed() -> None:
    parser = EscapeParser()
    found = parser.feed(b"x\x01aab\x7f\x00\xffc\rd\x01x")
    assert b"".join(data for kind, data in found if kind == "echo") == b"ab\b \bc\r\n"
    assert [part for part in found if part[0] != "echo"] == [
        *(("input", b"x"), ("menu", b"a"), ("line", b"ac"), ("input", b"d"), ("menu", b"x"))
    ]
    for cancel in (b"\x03", b"\x04", b"\x1b"):
        assert parser.feed(b"\x01aab" + cancel)[-1] == ("line", b"")
    assert parser.feed(b"\x01a\x7f" + b"y" * 300 + b"\r")[-1] == ("line", b"y" * 200)


@given(st.lists(st.binary(max_size=5), max_size=6))
def test_how_keys_are_cut_makes_no_difference(parts: list[bytes]) -> None:
    def flat(found: list[tuple[str, bytes]]) -> list[tuple[str, int]]:
        return [(kind, byte) for kind, data in found for byte in data]

    whole = flat(EscapeParser().feed(b"".join(parts)))
    parser = EscapeParser()
    assert [item for part in parts for item in flat(parser.feed(part))] == whole


class Screen:
    """A command on a pseudo-terminal."""

    def __init__(self, *arguments: str, cwd: Path, env: Mapping[str, str] | None = None) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(cwd)
            os.environ.update(environment() if env is None else env)
            os.execv(sys.executable, [sys.executable, "-m", "vmm", *arguments])
        self.seen = b""

    def type(self, data: bytes) -> None:
        """All of `data`, at the pace at which it is read."""
        while data:
            assert select.select([], [self.fd], [], 60)[1], f"nobody takes {data[:20]!r}"
            data = data[os.write(self.fd, data[:256]) :]

    def expect(self, pattern: bytes, timeout: float = 60) -> bytes:
        """Wait until `pattern` is on the screen; what stood before it is forgotten."""
        end = time.monotonic() + timeout
        while True:
            match = re.search(pattern, self.seen)
            if match:
                self.seen = self.seen[match.end() :]
                return match[0]
            assert time.monotonic() < end, f"{pattern!r} did not come, but {self.seen!r}"
            if select.select([self.fd], [], [], 1)[0]:
                try:
                    self.seen += os.read(self.fd, 4096)
                except OSError:
                    assert re.search(pattern, self.seen), f"ended with {self.seen!r}"

    def end(self) -> int:
        """Wait for the end; its exit status."""
        with contextlib.suppress(OSError):
            while os.read(self.fd, 4096):
                pass
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return os.waitstatus_to_exitcode(status)

    def modes(self) -> list[object]:
        return termios.tcgetattr(self.fd)

    def close(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.fd)


@contextlib.contextmanager
def screen(*arguments: str, cwd: Path, env: Mapping[str, str] | None = None) -> Iterator[Screen]:
    opened = Screen(*arguments, cwd=cwd, env=env)
    try:
        yield opened
    finally:
        opened.close()


def test_typing_and_leaving(tmp_path: Path) -> None:
    with screen("boot", "serial-echo", "--mem", "16M", cwd=tmp_path) as s:
        before = s.modes()
        s.expect(b"\n")
        s.type(b"hello\r")
        s.expect(b"You said: hello")
        assert not s.modes()[3] & termios.ICANON  # type: ignore[operator]
        s.type(b"\x03")  # Ctrl-C is a key for the guest
        s.type(b"quit\r")
        s.expect(b"You said: ")
        s.type(b"quit\r")
        assert s.end() == 0
        assert s.modes() == before


def test_menu(tmp_path: Path) -> None:
    with screen("boot", "counter", "--mem", "16M", cwd=tmp_path) as s:
        before = s.modes()
        s.expect(b"counter 2\r\n")
        s.type(b"\x01h")
        s.expect(b"Ctrl-A x")
        s.type(b"\x01s")
        s.expect(b"suspended")
        s.seen = b""
        assert not select.select([s.fd], [], [], 1.0)[0]  # nothing counts while it sleeps
        s.type(b"\x01i")
        s.expect(b"suspended for")
        s.type(b"\x01w")
        s.expect(b"snapshot written to vmm-snapshot")
        s.type(b"\x01s")
        s.expect(b"resumed")
        s.expect(b"counter \\d+\r\n")
        s.type(b"\x01x")
        assert s.end() == 0
        assert s.modes() == before
    with screen("restore", "vmm-snapshot", cwd=tmp_path) as s:
        s.expect(b"counter \\d+\r\n")
        s.type(b"\x01x")
        assert s.end() == 0


def test_the_guests_console_has_the_size_of_the_terminal(tmp_path: Path) -> None:
    """From the start, and after each change of it (SIGWINCH)."""

    def resize(columns: int, rows: int) -> None:
        fcntl.ioctl(s.fd, termios.TIOCSWINSZ, struct.pack("<HHHH", rows, columns, 0, 0))

    def size() -> tuple[int, int]:
        s.type(b"\x01w")
        s.expect(b"snapshot written to vmm-snapshot;")
        saved = json.loads((tmp_path / "vmm-snapshot" / "devices" / "serial.json").read_text())
        return saved["columns"], saved["rows"]

    devices = ["--no-default-devices", "--device", "console,name=serial"]
    with screen("boot", "counter", "--mem", "16M", *devices, cwd=tmp_path) as s:
        for columns, rows in ((132, 43), (80, 24)):
            resize(columns, rows)
            end = time.monotonic() + 60
            while size() != (columns, rows):
                assert time.monotonic() < end
        s.type(b"\x01x")
        assert s.end() == 0


def test_a_device_is_adjusted(tmp_path: Path) -> None:
    devices = ["--no-default-devices", "--device", "balloon", "--device", "serial"]
    with screen("boot", "counter", "--mem", "16M", *devices, cwd=tmp_path) as s:
        s.expect(b"counter 1\r\n")
        s.type(b"\x01aballoon,pages=77\r")
        s.expect(b"vmm: adjust DEVICE,OPTION=VALUE: ")
        s.expect(b"vmm: adjusted: balloon,pages=77\r")
        for typed, answer in (
            (b"\r", b"nothing was adjusted"),
            (b"balloon\r", b"not adjusted: write DEVICE,OPTION=VALUE"),
            (b"none,pages=1\r", b"not adjusted: there is no device 'none'"),
            (b"balloon,pages=x\r", b"option pages=x is not a whole number"),
            (b"serial,port=com2\r", b"option 'port' cannot be changed while it runs"),
        ):
            s.type(b"\x01a" + typed)
            s.expect(b"vmm: .*" + answer)
        s.type(b"\x01w")
        s.expect(b"snapshot written to vmm-snapshot;")
        saved = json.loads((tmp_path / "vmm-snapshot" / "devices" / "balloon.json").read_text())
        assert saved["wanted"] == 77
        s.type(b"\x01x")
        assert s.end() == 0


def test_escape_twice_sends_it_to_the_guest(tmp_path: Path) -> None:
    with screen("boot", "serial-echo", "--mem", "16M", cwd=tmp_path) as s:
        s.expect(b"\n")
        s.type(bytes([ESCAPE, ESCAPE]) + b"z\r")
        s.expect(b"You said: \x01z")
        s.type(b"\x01x")
        assert s.end() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_terminal_is_given_back_after_a_signal(tmp_path: Path, number: signal.Signals) -> None:
    with screen("boot", "counter", "--mem", "16M", cwd=tmp_path) as s:
        before = s.modes()
        s.expect(b"counter 1\r\n")
        os.kill(s.pid, number)
        assert s.end() == 130
        assert s.modes() == before


@pytest.mark.parametrize(
    ("model", "complaint"), [("WillNotSleep", b"no sleep tonight"), ("WillNotWake", b"too early")]
)
def test_a_device_that_refuses_to_sleep_or_wake(
    tmp_path: Path, model: str, complaint: bytes
) -> None:
    options = ("--device", f"faulty:{model}", "--mem", "16M")
    with screen("boot", "counter", *options, cwd=tmp_path, env=faulty(tmp_path)) as s:
        s.expect(b"counter 1\r\n")
        s.type(b"\x01s")
        if model == "WillNotWake":
            s.expect(b"suspended")
            s.type(b"\x01s")
        s.expect(complaint)
        s.expect(b"counter \\d+\r\n")
        s.type(b"\x01x")
        assert s.end() == 0


def test_the_menu_works_when_the_guest_takes_no_input(tmp_path: Path) -> None:
    with screen("boot", "counter", "--mem", "16M", cwd=tmp_path) as s:
        s.expect(b"counter 1\r\n")
        s.type(b"x" * 100_000)
        s.expect(b"input is dropped")
        s.type(b"\x01i")
        s.expect(b"running for")
        s.type(b"\x01x")
        assert s.end() == 0


def test_the_menu_works_when_the_screen_stands_still(tmp_path: Path) -> None:
    (tmp_path / "flood.bin").write_bytes(FLOOD)
    with screen("boot", "flood.bin", cwd=tmp_path) as s:
        before = s.modes()
        s.expect(b"A")
        time.sleep(1.5)  # nobody reads the screen now
        s.type(b"\x01x")
        end = time.monotonic() + 30
        while os.waitpid(s.pid, os.WNOHANG) == (0, 0):
            assert time.monotonic() < end
            time.sleep(0.05)
        s.pid = 0
        assert s.modes() == before


DRAWS = bytes.fromhex(
    "b800b8 8ec0"  # mov ax, 0xb800; mov es, ax
    "26c606000041"  # mov byte [es:0], 'A'
    "66b90084d717 6649 75fc"  # mov ecx, 400000000; l: dec ecx; jnz l
    "26c606a00042"  # mov byte [es:160], 'B': the second row
    "faf4"  # cli; hlt
)


def test_the_text_screen_is_drawn_while_it_changes(tmp_path: Path) -> None:
    (tmp_path / "draws.bin").write_bytes(DRAWS)
    with screen("boot", "draws.bin", "--mode", "16", "--screen-live", cwd=tmp_path) as s:
        termios.tcsetwinsize(s.fd, (40, 100))
        s.expect(rb"\x1b\[2J.*\x1b\[27;40r")  # below the ruler the rest scrolls
        s.expect(rb"\x1b7\x1b\[1;1HA\x1b\[K\x1b8")
        s.expect(rb"\x1b7\x1b\[2;1HB\x1b\[K\x1b8")
        s.expect(rb"\x1b\[r")
        assert s.end() == 0


def test_where_there_is_no_room_changed_rows_are_told(tmp_path: Path) -> None:
    (tmp_path / "draws.bin").write_bytes(DRAWS)
    status, out, err = run(
        *("boot", str(tmp_path / "draws.bin"), "--mode", "16", "--screen-live", "--screen")
    )
    assert (status, out) == (0, b"")
    assert err == b"vmm: screen  1| A\r\nvmm: screen  2| B\r\nvmm: A\r\nvmm: B\r\n"
