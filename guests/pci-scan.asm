; pci-scan: walks PCI bus 0, sizes and places the BARs, then moves the BARs of the config-space
; function while running and checks that it answers at the new place and no longer at the old one.
; Flat, 32-bit, at 0x100000. Halts with status 0 when all went well; debug exit 1 if not.

%include "inc/ports.inc"
bits 32
org 0x100000
%include "inc/io.inc"
%include "inc/pci.inc"
%include "inc/scan.inc"

NEW_REGISTERS   equ 0xF4000000
NEW_RAM         equ 0xF5000000
NEW_PORTS       equ 0xD100
PATTERN         equ 0x600DF00D
SCRATCH         equ 4                   ; offset of scratch register 0

; Fail with a message unless the operands are equal.
%macro expect 3+
        cmp     %1, %2
        je      %%good
        print   "  WRONG: ", %3, 10
        exit    1
%%good:
%endmacro

section .text
        call    serial_init
        print   "PCI bus 0:", 10
        call    pci_scan
        print   "  functions: "
        print_dec ebx
        print   10
        mov     eax, CONFIG_SPACE_ID
        call    pci_find
        jnc     found
        print   "No config-space function, nothing to relocate.", 10
        halt

found:  print   "Relocation:", 10
        ; BAR 0, 32-bit memory: the registers
        add     edi, PCI_BAR0
        call    pci_read
        and     eax, ~0xF
        mov     esi, eax                ; ESI: the old place
        mov     ebx, NEW_REGISTERS      ; EBX: the new one
        mov     eax, [esi]
        expect  eax, CONFIG_SPACE_MAGIC, "BAR 0 does not answer with its id"
        mov     dword [esi + SCRATCH], PATTERN
        mov     eax, [esi + SCRATCH]
        expect  eax, PATTERN, "scratch register does not read back"
        mov     eax, ebx
        call    pci_write
        mov     eax, [ebx]
        expect  eax, CONFIG_SPACE_MAGIC, "BAR 0 does not answer at its new place"
        mov     eax, [ebx + SCRATCH]
        expect  eax, PATTERN, "scratch register was lost on the way"
        mov     eax, [esi]
        expect  eax, -1, "BAR 0 still answers at its old place"
        mov     al, [esi + SCRATCH + 1]
        expect  al, -1, "BAR 0 still answers bytes at its old place"
        mov     dword [esi + SCRATCH], 0
        mov     eax, [ebx + SCRATCH]
        expect  eax, PATTERN, "a write to the old place went through"
        print   "  BAR 0: "
        print_hex esi, 8
        print   " -> "
        print_hex ebx, 8
        print   ", ok", 10

        ; Decoding off: nothing answers. On again: the value is still there.
        push    edi
        add     edi, PCI_COMMAND - PCI_BAR0
        call    pci_read
        movzx   ecx, ax
        and     eax, 0xFFFF & ~COMMAND_MEMORY
        call    pci_write
        mov     eax, [ebx]
        expect  eax, -1, "BAR 0 answers although memory decoding is off"
        mov     eax, ecx
        call    pci_write
        mov     eax, [ebx + SCRATCH]
        expect  eax, PATTERN, "scratch register was lost while decoding was off"
        pop     edi
        print   "  memory decoding off and on, ok", 10

        ; BAR 4, ports: the registers again
        add     edi, 16
        call    pci_read
        and     eax, 0xFFFC
        mov     esi, eax
        mov     ebx, NEW_PORTS
        lea     edx, [esi + SCRATCH]
        in      eax, dx
        expect  eax, PATTERN, "BAR 4 does not show the scratch register"
        mov     eax, ebx
        call    pci_write
        lea     edx, [ebx + SCRATCH]
        in      eax, dx
        expect  eax, PATTERN, "BAR 4 does not answer at its new place"
        mov     eax, ~PATTERN
        out     dx, eax
        mov     eax, [NEW_REGISTERS + SCRATCH]
        expect  eax, ~PATTERN, "what BAR 4 wrote is not in BAR 0"
        lea     edx, [esi + SCRATCH]
        in      eax, dx
        expect  eax, -1, "BAR 4 still answers at its old place"
        print   "  BAR 4: "
        print_hex esi, 4
        print   " -> "
        print_hex ebx, 4
        print   ", ok", 10

        ; BAR 2, 64-bit memory: moved below 4 GiB, then to where 32-bit code cannot reach it
        sub     edi, 8
        call    pci_read
        and     eax, ~0xF
        mov     esi, eax
        mov     ebx, NEW_RAM
        mov     dword [esi + CONFIG_SPACE_RAM - 4], PATTERN
        mov     eax, ebx
        call    pci_write
        mov     eax, [ebx + CONFIG_SPACE_RAM - 4]
        expect  eax, PATTERN, "BAR 2 does not answer at its new place"
        mov     eax, [esi + CONFIG_SPACE_RAM - 4]
        expect  eax, -1, "BAR 2 still answers at its old place"
        print   "  BAR 2: "
        print_hex esi, 8
        print   " -> "
        print_hex ebx, 8
        print   ", ok", 10
        add     edi, 4
        mov     eax, 0x10
        call    pci_write
        call    pci_read
        expect  eax, 0x10, "the high half of BAR 2 does not read back"
        mov     eax, [ebx + CONFIG_SPACE_RAM - 4]
        expect  eax, -1, "BAR 2 still answers below 4 GiB"
        xor     eax, eax
        call    pci_write
        mov     eax, [ebx + CONFIG_SPACE_RAM - 4]
        expect  eax, PATTERN, "BAR 2 did not come back from above 4 GiB"
        print   "  BAR 2 above 4 GiB and back, ok", 10
        halt
