; pci64: moves a 64-bit BAR above 4 GiB, which only 64-bit code can reach, and uses it there.
; Flat, started with --mode 64 at 0x100000. Halts with status 0, or debug exit 1 at what went wrong.

%include "inc/ports.inc"
bits 64
default rel
org 0x100000
%include "inc/io.inc"
%include "inc/pci.inc"
%include "inc/expect.inc"

LOW_PLACE       equ 0xF6000000
HIGH_PLACE      equ 0x40_0000_0000      ; 256 GiB
DIRECTORY       equ 0x200000            ; one page directory of our own
PRESENT_WRITABLE equ 3
LARGE           equ 1 << 7
PATTERN         equ 0x0123456789ABCDEF

section .text
        call    serial_init
        mov     eax, CONFIG_SPACE_ID
        call    pci_find
        jnc     .found
        print   "No config-space function, nothing to move.", 10
        halt

.found: ; Map 2 MiB at HIGH_PLACE: one entry more in the loader's page-directory-pointer table
        mov     rbx, cr3
        mov     rbx, [rbx]
        and     rbx, ~0xFFF
        mov     qword [rbx + (HIGH_PLACE >> 30) * 8], DIRECTORY + PRESENT_WRITABLE
        mov     ebx, DIRECTORY
        mov     rax, HIGH_PLACE + PRESENT_WRITABLE + LARGE
        mov     [rbx], rax
        mov     rax, cr3
        mov     cr3, rax

        add     edi, PCI_BAR0 + 8       ; BAR 2
        mov     eax, LOW_PLACE
        call    pci_write
        add     edi, 4
        xor     eax, eax
        call    pci_write
        sub     edi, PCI_BAR0 + 12 - PCI_COMMAND
        call    pci_read
        and     eax, 0xFFFF
        or      eax, COMMAND_MEMORY
        call    pci_write
        add     edi, PCI_BAR0 + 12 - PCI_COMMAND

        mov     r8, LOW_PLACE
        mov     r9, HIGH_PLACE
        mov     rax, PATTERN
        mov     [r8 + 16], rax
        mov     rbx, [r8 + 16]
        expect  rbx, PATTERN, "64-bit access at the low place"
        mov     rbx, [r9 + 16]
        expect  rbx, -1, "an answer from the high place already"

        mov     rax, HIGH_PLACE >> 32
        call    pci_write
        sub     edi, 4
        xor     eax, eax
        call    pci_write
        mov     rbx, [r9 + 16]
        expect  rbx, PATTERN, "64-bit access at the high place"
        movzx   ebx, byte [r9 + 19]
        expect  rbx, 0x89, "byte access at the high place"
        lea     r9, [r9 + CONFIG_SPACE_RAM - 8]
        mov     rax, ~PATTERN
        mov     [r9], rax
        mov     rbx, [r9]
        expect  rbx, ~PATTERN, "the last 8 bytes"
        mov     rbx, [r8 + 16]
        expect  rbx, -1, "an answer from the low place still"
        print   "BAR 2: 00000000f6000000 -> 0000004000000000, ok", 10
        halt
