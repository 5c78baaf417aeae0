; elf32-high: a kernel linked at 0xC0100000 that lies at 0x100000, as many are. The loader starts it
; at the physical address of its entry with paging off; it maps itself and goes on above 3 GiB.
; Halts with status 0.

%define IMAGE_BASE 0xC0100000
%include "inc/ports.inc"
%include "inc/elf.inc"

OFFSET          equ 0xC0000000          ; from physical to virtual
DIRECTORY       equ 0x200000            ; one page
PAGE            equ 0x83                ; present, writable, 4 MiB
CR0_PG          equ 1 << 31
CR4_PSE         equ 1 << 4

bits 32
elf32_header start, 1
elf32_load 0, IMAGE_BASE, IMAGE_BASE - OFFSET, file_end - IMAGE_BASE, file_end - IMAGE_BASE

%include "inc/io.inc"

section .text
start:  mov     edi, DIRECTORY
        xor     eax, eax
        mov     ecx, 1024
        rep     stosd
        mov     dword [DIRECTORY], PAGE                         ; the page that this runs in
        mov     dword [DIRECTORY + (OFFSET >> 22) * 4], PAGE    ; and the same one up there
        mov     eax, DIRECTORY
        mov     cr3, eax
        mov     eax, cr4
        or      eax, CR4_PSE
        mov     cr4, eax
        mov     eax, cr0
        or      eax, CR0_PG
        mov     cr0, eax
        mov     eax, high_start
        jmp     eax

high_start:
        add     esp, OFFSET
        mov     dword [DIRECTORY + OFFSET], 0                   ; nothing of us is low any more
        mov     eax, cr3
        mov     cr3, eax
        call    serial_init
        call    here
here:   pop     eax
        print   "elf32-high: running at "
        print_hex eax, 8
        print   10
        halt

elf_end
