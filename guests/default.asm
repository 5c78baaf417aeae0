; default: what `python -m vmm boot` runs when it is given no image. Flat, 32-bit, at 0x100000.
; Says hello, exercises the echo device, walks PCI bus 0, and halts: status 0.

%include "inc/ports.inc"
bits 32
org 0x100000
%include "inc/io.inc"
%include "inc/pci.inc"
%include "inc/scan.inc"

section .text
        call    serial_init
        print   "Hello from the default guest!", 10
        print   10, "Echo device at port 0xEC0:", 10
        mov     dx, ECHO
        mov     al, 0x5A
        out     dx, al
        in      al, dx
        cmp     al, 0x5A
        jne     no_echo

        print   "  8 bits:  wrote 5a, read "
        print_hex eax, 2
        mov     dx, ECHO + 2
        mov     ax, 0xBEEF
        out     dx, ax
        in      ax, dx
        print   10, "  16 bits: wrote beef, read "
        print_hex eax, 4
        mov     dx, ECHO + 4
        mov     eax, 0xCAFEF00D
        out     dx, eax
        xor     eax, eax
        in      eax, dx
        print   10, "  32 bits: wrote cafef00d, read "
        print_hex eax, 8
        print   10
        jmp     scan

no_echo:
        print   "  nothing answers there", 10

scan:   print   10, "PCI bus 0:", 10
        call    pci_scan
        print   "  "
        print_dec ebx
        print   " function"
        cmp     ebx, 1
        je      one
        print   "s"
one:    print   10, 10, "Goodbye.", 10
        halt
