"""The Unicorn library through ctypes: the only module that imports it.

Unicorn's own Python binding wraps each call and each callback once more, which doubles their cost
(port access 0.34 against 0.14 us). Here the shared library that the binding loaded is called
directly, and a callback is a bare C function pointer.

An `Engine` is one emulated x86 CPU in UC_MODE_64, which serves every mode. Its registers are
reached in two ways: by number through the public API, and as bytes of one context buffer, which
`save` fills and `restore` takes back. Only the second way reaches the hidden parts of segments.

Sources: Unicorn's public headers unicorn.h and x86.h, version 2.1.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from unicorn import UC_ARCH_X86, UC_MODE_64, unicorn_const, x86_const
from unicorn.unicorn_py3 import unicorn as _binding

REG = x86_const
"""Register numbers, as ``REG.UC_X86_REG_...``."""

VERSION = "{UC_VERSION_MAJOR}.{UC_VERSION_MINOR}.{UC_VERSION_PATCH}".format_map(vars(unicorn_const))
"""The version of the binding, which ships the library."""

_lib = ctypes.CDLL(_binding.uclib._name)
"""A second handle on the loaded library, so that our prototypes disturb nobody else's."""


def _map_large_blocks() -> None:
    """Keep the heap from growing with every engine that is closed.

    An engine has a table of 512 KiB, aligned to 64 bytes. The C library first gives it a mapping
    of its own, learns from its end that such blocks are short-lived, and puts the next one into
    the heap; there glibc before 2.38 finds a hole for an aligned block too seldom. The heap of a
    process that opened thousands of engines became gigabytes of holes, which each fork pays for.
    Told where the border lies, the C library learns nothing. Sources: mallopt(3), M_MMAP_THRESHOLD;
    glibc's bug 14581.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # other C libraries have neither the habit nor the function
        mallopt(_M_MMAP_THRESHOLD, _TABLE_BYTES)


_M_MMAP_THRESHOLD = -3  # malloc.h
_TABLE_BYTES = 512 << 10
_map_large_blocks()

InterruptCallback = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p)
InvalidCallback = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_void_p)
InCallback = ctypes.CFUNCTYPE(
    ctypes.c_uint32, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_void_p
)
OutCallback = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p
)
SyscallCallback = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)
CpuidCallback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
BlockCallback = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_void_p
)
MmioReadCallback = ctypes.CFUNCTYPE(
    ctypes.c_uint64, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint, ctypes.c_void_p
)
MmioWriteCallback = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint, ctypes.c_uint64, ctypes.c_void_p
)

HOOK_INTERRUPT = unicorn_const.UC_HOOK_INTR
HOOK_INVALID = unicorn_const.UC_HOOK_INSN_INVALID
HOOK_INSTRUCTION = unicorn_const.UC_HOOK_INSN
HOOK_BLOCK = unicorn_const.UC_HOOK_BLOCK

ERROR_NAMES = {
    value: name for name, value in vars(unicorn_const).items() if name.startswith("UC_ERR_")
}
FETCH_ERRORS = frozenset((unicorn_const.UC_ERR_FETCH_UNMAPPED, unicorn_const.UC_ERR_FETCH_PROT))
DATA_ERRORS = frozenset(
    (
        unicorn_const.UC_ERR_READ_UNMAPPED,
        unicorn_const.UC_ERR_WRITE_UNMAPPED,
        unicorn_const.UC_ERR_READ_PROT,
        unicorn_const.UC_ERR_WRITE_PROT,
    )
)

# Control words of uc_ctl: the request, how many arguments (bits 26-29), write (bit 30).
_CTL_WRITE = 1 << 30
_CTL_SET_MODEL = unicorn_const.UC_CTL_CPU_MODEL | 1 << 26 | _CTL_WRITE
_CTL_REMOVE_TRANSLATIONS = unicorn_const.UC_CTL_TB_REMOVE_CACHE | 2 << 26 | _CTL_WRITE
_CTL_FLUSH_TRANSLATIONS = unicorn_const.UC_CTL_TB_FLUSH | _CTL_WRITE
_CTL_USE_EXITS = unicorn_const.UC_CTL_UC_USE_EXITS | 1 << 26 | _CTL_WRITE
_CTL_FLUSH_TLB = unicorn_const.UC_CTL_TLB_FLUSH | _CTL_WRITE

CPU_MODEL = x86_const.UC_CPU_X86_WESTMERE
"""The richest model whose instructions the engine really has: no AVX, XSAVE, SVM or SMAP."""

_u64, _size, _int, _ptr = ctypes.c_uint64, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p


def _prototype(name: str, *arguments: Any) -> Callable[..., int]:
    function = getattr(_lib, name)
    function.argtypes = arguments
    function.restype = _int
    return function  # type: ignore[no-any-return]


_open = _prototype("uc_open", _int, _int, _ptr)
_close = _prototype("uc_close", _ptr)
_map = _prototype("uc_mem_map_ptr", _ptr, _u64, _size, ctypes.c_uint32, _ptr)
_map_io = _prototype("uc_mmio_map", _ptr, _u64, _size, _ptr, _ptr, _ptr, _ptr)
_context_alloc = _prototype("uc_context_alloc", _ptr, _ptr)
_context_free = _prototype("uc_context_free", _ptr)
_context_save = _prototype("uc_context_save", _ptr, _ptr)
_context_restore = _prototype("uc_context_restore", _ptr, _ptr)
_context_size = _lib.uc_context_size
_context_size.argtypes = [_ptr]
_context_size.restype = _size
_reg_read = _prototype("uc_reg_read", _ptr, _int, _ptr)
_reg_write = _prototype("uc_reg_write", _ptr, _int, _ptr)
_start = _prototype("uc_emu_start", _ptr, _u64, _u64, _u64, _size)
_stop = _prototype("uc_emu_stop", _ptr)
_hook_add = _lib.uc_hook_add
_hook_add.restype = _int
# uc_ctl is variadic; a handle of its own for each shape keeps the prototypes apart.
_ctl1 = ctypes.CDLL(_binding.uclib._name).uc_ctl
_ctl1.argtypes = [_ptr, ctypes.c_uint32, _u64]
_ctl2 = ctypes.CDLL(_binding.uclib._name).uc_ctl
_ctl2.argtypes = [_ptr, ctypes.c_uint32, _u64, _u64]


def function_at(callback: Any) -> int:
    """Host address of a C function, for native code."""
    return ctypes.cast(callback, _ptr).value or 0


def address_of(name: str) -> int:
    """Host address of a function of the library, for native code."""
    return function_at(getattr(_lib, name))


_CONTEXT_HEADER = 40
"""struct uc_context up to its data; used to look for a private field, which is then proved."""


class EngineError(Exception):
    """The library refused a call of ours: the machine's own bug, or a library we don't know."""


def check(code: int, doing: str) -> None:
    """Raise `EngineError` unless `code` is UC_ERR_OK."""
    if code:
        raise EngineError(f"{doing}: {error_name(code)}")


def error_name(code: int) -> str:
    return ERROR_NAMES.get(code, f"unknown error {code}")


class _Msr(ctypes.Structure):
    _fields_ = (("number", ctypes.c_uint32), ("value", ctypes.c_uint64))


class Engine:
    """One engine and its context buffer.

    Attributes:
        bytes, words, longs: the context buffer as bytes, 32-bit and 64-bit words.
        save: fill the buffer from the CPU (0.3 us).
        restore: load the CPU from the buffer; flushes nothing (0.3 us).
    """

    def __init__(self, end_addresses: bool = False) -> None:
        handle = _ptr()
        check(_open(UC_ARCH_X86, UC_MODE_64, ctypes.byref(handle)), "open the CPU engine")
        self.handle = handle.value
        context = _ptr()
        self._kept: list[Any] = []
        check(_ctl1(self.handle, _CTL_SET_MODEL, CPU_MODEL), "choose the CPU model")
        if not end_addresses:
            # An empty table of end addresses: none ends a run, and none is looked up after it.
            check(_ctl1(self.handle, _CTL_USE_EXITS, 1), "do without an end address")
        check(_context_alloc(self.handle, ctypes.byref(context)), "allocate a context")
        self._context = context.value
        size = _context_size(self.handle)
        self.context_bytes = size - _CONTEXT_HEADER
        raw = (ctypes.c_ubyte * size).from_address(self._context or 0)
        self.bytes = memoryview(raw).cast("B")
        self.words = self.bytes[: size & ~3].cast("I")
        self.longs = self.bytes[: size & ~7].cast("Q")
        self._value = _u64()
        self._value_at = ctypes.byref(self._value)

    def close(self) -> None:
        """Free the engine; harmless when repeated."""
        if self.handle is None:
            return
        _context_free(self._context)
        _close(self.handle)
        self.handle = self._context = None
        self._kept.clear()

    # Registers.

    def save(self) -> None:
        _context_save(self.handle, self._context)

    def restore(self) -> None:
        _context_restore(self.handle, self._context)

    def read(self, register: int) -> int:
        """A register of at most 64 bits."""
        self._value.value = 0
        _reg_read(self.handle, register, self._value_at)
        return self._value.value

    def write(self, register: int, value: int) -> None:
        self._value.value = value
        _reg_write(self.handle, register, self._value_at)

    def read_wide(self, register: int, size: int) -> bytes:
        """A register of more than 64 bits, least significant byte first."""
        data = (ctypes.c_ubyte * 64)()
        _reg_read(self.handle, register, data)
        return bytes(data[:size])

    def write_wide(self, register: int, value: bytes) -> None:
        data = (ctypes.c_ubyte * 64)(*value)
        _reg_write(self.handle, register, data)

    def read_msr(self, number: int) -> int:
        msr = _Msr(number, 0)
        _reg_read(self.handle, x86_const.UC_X86_REG_MSR, ctypes.byref(msr))
        return int(msr.value)

    def write_msr(self, number: int, value: int) -> None:
        _reg_write(self.handle, x86_const.UC_X86_REG_MSR, ctypes.byref(_Msr(number, value)))

    # Memory and translations.

    def map_ram(self, address: int, size: int, host: int, *, writable: bool = True) -> None:
        """Let the guest reach `size` bytes of our memory at `host`, to read, execute and write."""
        rights = 7 if writable else 5
        check(_map(self.handle, address, size, rights, host), f"map RAM at {address:#x}")

    def map_io(self, address: int, size: int, read: Any, write: Any) -> None:
        """Send accesses to the callbacks; they get the offset from `address`."""
        self._kept += (read, write)
        code = _map_io(
            self.handle,
            address,
            size,
            ctypes.cast(read, _ptr),
            None,
            ctypes.cast(write, _ptr),
            None,
        )
        check(code, f"map the I/O window at {address:#x}")

    def remove_translations(self, start: int, end: int) -> int:
        """Drop translated code of these virtual addresses; gives the library's error code."""
        return int(_ctl2(self.handle, _CTL_REMOVE_TRANSLATIONS, start, end))

    def flush_translations(self) -> None:
        check(_ctl1(self.handle, _CTL_FLUSH_TRANSLATIONS, 0), "flush translated code")

    def flush_tlb(self) -> None:
        check(_ctl1(self.handle, _CTL_FLUSH_TLB, 0), "flush the TLB")

    # Execution.

    def hook(self, kind: int, callback: Any, *extra: Any, data: int = 0) -> None:
        """Install a callback over all addresses and keep it alive as long as the engine."""
        self._kept.append(callback)
        number = _size()
        code = _hook_add(
            _ptr(self.handle),
            ctypes.byref(number),
            _int(kind),
            ctypes.cast(callback, _ptr),
            _ptr(data),
            _u64(1),  # begin above end: no bounds
            _u64(0),
            *extra,
        )
        check(code, f"install hook {kind:#x}")

    def hook_instruction(self, instruction: int, callback: Any, data: int = 0) -> None:
        self.hook(HOOK_INSTRUCTION, callback, _int(instruction), data=data)

    def start(self, rip: int, count: int = 0, until: int = 0) -> int:
        """Run from RIP until something stops it; gives the library's error code.

        `until` counts only in an engine that was made with `end_addresses`.
        """
        return _start(self.handle, rip, until, 0, count)

    def stop(self) -> None:
        """Ask for a stop; exact only in an OUT or interrupt callback."""
        _stop(self.handle)


def memory_of(buffer: Any) -> int:
    """Host address of a writable buffer, which the caller keeps alive and in place."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
