; serial-poll: as serial-echo, but looks at the line status register again and again instead of
; waiting for an interrupt. Flat, 32-bit, at 0x100000.

%include "inc/ports.inc"
bits 32
org 0x100000
%include "inc/io.inc"
%include "inc/line.inc"

section .text
        call    serial_init
        call    greet
next:   mov     dx, COM1_LSR
        in      al, dx
        test    al, LSR_DATA
        jz      next
        mov     dx, COM1_DATA
        in      al, dx
        call    take_character
        jnc     next
        halt
