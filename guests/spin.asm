; spin: pure CPU work with no device access, for measuring CPU speed. Flat, 32-bit, at 0x100000.
; Mixes arithmetic, stores, loads and calls; leaves its checksum in EAX and halts.
; The dword at image offset 4 is the number of rounds (see guests.patched).

bits 32
org 0x100000

BUFFER  equ 0x200000                    ; 4 KiB away from the code: its pages are never translated

section .text
        jmp     short start
        align   4, db 0
rounds: dd      5000000

start:  mov     ecx, [rounds]
        mov     eax, 0x9E3779B9
next:   mov     edx, eax
        shl     edx, 13
        xor     eax, edx
        mov     edx, eax
        shr     edx, 17
        xor     eax, edx
        mov     edx, eax
        shl     edx, 5
        xor     eax, edx
        mov     ebx, ecx
        and     ebx, 0x3FF
        add     [BUFFER + ebx * 4], eax
        call    mix
        dec     ecx
        jnz     next
done:   cli
        hlt
        jmp     done

mix:    add     eax, [BUFFER + ebx * 4]
        rol     eax, 7
        ret
