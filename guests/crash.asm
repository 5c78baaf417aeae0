; crash: a deliberate triple fault, three calls deep. ELF32 at 0x100000, with a symbol table that a
; crash report can use. With no IDT (limit 0) the #UD cannot be delivered, nor the #DF after it.

%define IMAGE_BASE 0x100000
%define WITH_SYMBOLS
%include "inc/ports.inc"
%include "inc/elf.inc"
bits 32
elf32_header start, 1
elf32_load 0, IMAGE_BASE, IMAGE_BASE, file_end - IMAGE_BASE, file_end - IMAGE_BASE
%include "inc/io.inc"

section .text
start:  call    serial_init
        print   "About to crash.", 10
        call    fall
hang:   jmp     hang

fall:   mov     eax, 0xC0FFEE
        call    trip
        ret

trip:   lidt    [no_idt]
        ud2
        ret

section .data
no_idt: dw 0
        dd 0
elf32_symbols start, hang, fall, trip
