; stress: random accesses of all sizes to the echo device and to the registers and the memory of
; the config-space function, in every way an x86 program can make them. Every value that is read is
; compared with a shadow copy in RAM. Flat, 32-bit, at 0x100000.
;
; Debug exit 0 when all were right, 1 at the first that was not. Without a config-space function
; only the echo device is used. The dword at image offset 4 is the number of rounds (see
; guests.patched).
;
; EBX: xorshift state; ESI: sum of all that was read; EBP: values compared.

%include "inc/ports.inc"
bits 32
org 0x100000
%include "inc/io.inc"
%include "inc/pci.inc"

REGISTERS_AT    equ 0xF0000000          ; BAR 0
RAM_AT          equ 0xF1000000          ; BAR 2
PORTS_AT        equ 0xE000              ; BAR 4
SCRATCH         equ 4                   ; offset of the three scratch registers
SCRATCH_SIZE    equ 12
RAM_SHADOW      equ 0x200000            ; both as large as the window
READ_BACK       equ 0x240000
PROGRESS        equ 8                   ; lines of it

section .text
        jmp     short start
        align   4, db 0
rounds: dd      4000

start:  call    serial_init
        print   "stress: "
        print_dec [rounds]
        print   " rounds on echo"
        mov     dx, ECHO                ; a shadow begins with what the device holds already
        in      eax, dx
        mov     [echo_shadow], eax
        mov     dx, ECHO + 4
        in      eax, dx
        mov     [echo_shadow + 4], eax
        call    place_function
        mov     ebx, 0x9E3779B9
        xor     esi, esi
        xor     ebp, ebp
        mov     eax, [rounds]
        xor     edx, edx
        mov     ecx, PROGRESS
        div     ecx
        mov     [until_line], eax
        mov     [line_every], eax

next:   cmp     dword [rounds], 0
        je      finished
        dec     dword [rounds]
        call    random
        and     eax, 7
        call    [actions + eax * 4]
        dec     dword [until_line]
        jnz     next
        mov     eax, [line_every]
        mov     [until_line], eax
        print   "stress: "
        print_dec ebp
        print   " values compared, sum "
        print_hex esi, 8
        print   10
        jmp     next

finished:
        print   "stress: done, "
        print_dec ebp
        print   " values compared, sum "
        print_hex esi, 8
        print   10
        exit    0

; Find the config-space function and give its BARs addresses.
place_function:
        mov     eax, CONFIG_SPACE_ID
        call    pci_find
        jc      .none
        print   " and config-space", 10
        add     edi, PCI_COMMAND
        call    pci_read
        and     eax, 0xFFFF & ~(COMMAND_IO | COMMAND_MEMORY)
        call    pci_write
        sub     edi, PCI_COMMAND
        mov     ecx, 5
.bar:   push    edi
        lea     edi, [edi + PCI_BAR0 + ecx * 4]
        mov     eax, [bars + ecx * 4]
        call    pci_write
        pop     edi
        dec     ecx
        jns     .bar
        add     edi, PCI_COMMAND
        call    pci_read
        and     eax, 0xFFFF
        or      eax, COMMAND_IO | COMMAND_MEMORY
        call    pci_write
        xor     ecx, ecx
.load:  mov     eax, [REGISTERS_AT + SCRATCH + ecx]
        mov     [scratch_shadow + ecx], eax
        add     ecx, 4
        cmp     ecx, SCRATCH_SIZE
        jb      .load
        cld
        mov     esi, RAM_AT
        mov     edi, RAM_SHADOW
        mov     ecx, CONFIG_SPACE_RAM / 4
        rep     movsd
        ret
.none:  print   " only", 10
        mov     eax, ports_echo
        mov     ecx, 7
.only:  mov     [actions + ecx * 4], eax
        dec     ecx
        jns     .only
        ret

%include "inc/random.inc"

; ECX = 1, 2 or 4 and EDI = an offset so that the access stays within EAX bytes.
random_access:
        push    edx
        mov     edx, eax
        call    random
        mov     ecx, eax
        shr     ecx, 24
        and     ecx, 3
        mov     ecx, [sizes + ecx * 4]
        sub     edx, ecx
        inc     edx                     ; offsets to choose from
        push    edx
        xor     edx, edx
        div     dword [esp]
        mov     edi, edx
        add     esp, 4
        pop     edx
        ret

; EAX cut to ECX bytes.
cut:    cmp     ecx, 2
        ja      .done
        je      .two
        movzx   eax, al
        ret
.two:   movzx   eax, ax
.done:  ret

; EAX was read with ECX bytes, EDX is right; EDI says where.
compare:
        call    cut
        xchg    eax, edx
        call    cut
        xchg    eax, edx
        rol     esi, 1
        add     esi, eax
        inc     ebp
        cmp     eax, edx
        jne     .wrong
        ret
.wrong: print   "stress: mismatch at "
        print_hex edi, 8
        print   " size "
        print_dec ecx
        print   ": read "
        print_hex eax, 8
        print   ", expected "
        print_hex edx, 8
        print   ", after "
        print_dec ebp
        print   " values", 10
        exit    1

; OUT EAX to port EDI with size ECX; and IN.
port_write:
        mov     edx, edi
        cmp     ecx, 2
        ja      .four
        je      .two
        out     dx, al
        ret
.two:   out     dx, ax
        ret
.four:  out     dx, eax
        ret
port_read:
        mov     edx, edi
        xor     eax, eax
        cmp     ecx, 2
        ja      .four
        je      .two
        in      al, dx
        ret
.two:   in      ax, dx
        ret
.four:  in      eax, dx
        ret

; MOV EAX to memory EDI with size ECX; and back.
memory_write:
        cmp     ecx, 2
        ja      .four
        je      .two
        mov     [edi], al
        ret
.two:   mov     [edi], ax
        ret
.four:  mov     [edi], eax
        ret
memory_read:
        cmp     ecx, 2
        ja      .four
        je      .two
        movzx   eax, byte [edi]
        ret
.two:   movzx   eax, word [edi]
        ret
.four:  mov     eax, [edi]
        ret

; Write a random part of a shadowed window and read another.
;   %1 size of the window, %2 where it is, %3 its shadow, %4 how to write, %5 how to read
%macro random_write_read 5
        mov     eax, %1
        call    random_access
        call    random
        push    edi
        add     edi, %3
        call    memory_write
        pop     edi
        add     edi, %2
        call    %4
        mov     eax, %1
        call    random_access
        push    edi
        add     edi, %3
        call    memory_read
        pop     edi
        push    eax
        add     edi, %2
        call    %5
        pop     edx
        call    compare
%endmacro

ports_echo:
        random_write_read 8, ECHO, echo_shadow, port_write, port_read
        ret
memory_registers:
        random_write_read SCRATCH_SIZE, REGISTERS_AT + SCRATCH, scratch_shadow, \
                memory_write, memory_read
        ret
ports_registers:
        random_write_read SCRATCH_SIZE, PORTS_AT + SCRATCH, scratch_shadow, port_write, port_read
        ret
memory_ram:
        random_write_read CONFIG_SPACE_RAM, RAM_AT, RAM_SHADOW, memory_write, memory_read
        ret

; Read-modify-write instructions: ADD to memory, XCHG, LOCK XADD. EDI: the register's address.
%define shadow_of_edi scratch_shadow - (REGISTERS_AT + SCRATCH) + edi
memory_modify:
        call    random
        and     eax, 4 | 8
        cmp     eax, SCRATCH_SIZE
        jb      .at
        xor     eax, eax
.at:    lea     edi, [REGISTERS_AT + SCRATCH + eax]
        mov     ecx, 4
        call    random
        add     [edi], eax
        add     [shadow_of_edi], eax
        call    random
        mov     edx, [shadow_of_edi]
        mov     [shadow_of_edi], eax
        xchg    eax, [edi]
        call    compare
        call    random
        mov     edx, [shadow_of_edi]
        add     [shadow_of_edi], eax
        lock xadd [edi], eax
        call    compare
        mov     eax, [edi]
        mov     edx, [shadow_of_edi]
        call    compare
        ret

; String instructions: a block to the device's memory, and from there to READ_BACK.
BLOCK   equ 64
block:  call    random
        and     eax, CONFIG_SPACE_RAM - BLOCK
        mov     edx, eax                ; where in the window
        xor     ecx, ecx
.fill:  call    random
        mov     [RAM_SHADOW + edx + ecx], eax
        add     ecx, 4
        cmp     ecx, BLOCK
        jb      .fill
        push    esi
        lea     esi, [RAM_SHADOW + edx]
        lea     edi, [RAM_AT + edx]
        mov     ecx, BLOCK / 4
        rep     movsd
        lea     esi, [RAM_AT + edx]
        lea     edi, [READ_BACK + edx]
        mov     ecx, BLOCK / 2
        rep     movsw
        pop     esi
        lea     edi, [RAM_AT + edx]
.check: mov     ecx, 4
        mov     eax, [edi + READ_BACK - RAM_AT]
        mov     edx, [edi + RAM_SHADOW - RAM_AT]
        call    compare
        add     edi, 4
        test    edi, BLOCK - 1
        jnz     .check
        ret

; The echo register by OUTSD and INSB. The port does not move from one element to the next.
string_ports:
        call    random
        mov     [echo_shadow], eax
        push    esi
        mov     esi, echo_shadow
        mov     edx, ECHO
        outsd
        mov     edi, buffer
        mov     ecx, 3
        rep     insb
        pop     esi
        mov     edi, ECHO
        mov     ecx, 1
%assign index 0
%rep 3
        mov     al, [buffer + index]
        mov     edx, [echo_shadow]
        call    compare
  %assign index index + 1
%endrep
        ret

section .data
align 4
sizes:  dd      1, 2, 4, 4
bars:   dd      REGISTERS_AT, 0, RAM_AT, 0, PORTS_AT, 0
actions:
        dd      ports_echo, memory_registers, ports_registers, memory_ram
        dd      memory_modify, block, string_ports, memory_ram
until_line:     dd 0
line_every:     dd 0
scratch_shadow: times 3 dd 0
echo_shadow:    dq 0
buffer: times 4 db 0
