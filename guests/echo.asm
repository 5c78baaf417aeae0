; echo: exercises the echo device with every access size at every offset. Flat, 32-bit, 0x100000.
; Debug exit 0 when every value came back as written, 1 at the first that did not.

%include "inc/ports.inc"
bits 32
org 0x100000
%include "inc/io.inc"

LENGTH  equ 8                           ; of the device's register

section .text
        call    serial_init
        print   "echo: every size at every offset", 10
        mov     ebx, 0x2545F491         ; xorshift state, never 0
        xor     ebp, ebp                ; checks made

        mov     ecx, 1                  ; access size: 1, 2, 4
sizes:  xor     edi, edi                ; offset
offsets:
        call    random
        call    write
        call    check_all
        inc     edi
        lea     eax, [edi + ecx]
        cmp     eax, LENGTH
        jbe     offsets
        shl     ecx, 1
        cmp     ecx, 4
        jbe     sizes

        ; An access that leaves the register belongs to nobody: it reads all-ones and writes nothing.
        mov     dx, ECHO + LENGTH - 1
        xor     eax, eax
        out     dx, ax
        in      ax, dx
        inc     ebp
        cmp     ax, 0xFFFF
        jne     straddle_failed
        mov     dx, ECHO + LENGTH - 3
        xor     eax, eax
        out     dx, eax
        in      eax, dx
        inc     ebp
        cmp     eax, 0xFFFFFFFF
        jne     straddle_failed
        call    check_all

        print   "echo: "
        print_dec ebp
        print   " checks, all right", 10
        exit    0

straddle_failed:
        print   "echo: a straddling access was claimed, it read "
        print_hex eax, 8
        print   10
        exit    1

%include "inc/random.inc"

; Write the low ECX bytes of EAX at offset EDI, to the device and to its shadow.
write:  lea     edx, [edi + ECHO]
        cmp     ecx, 2
        je      .two
        ja      .four
        out     dx, al
        mov     [shadow + edi], al
        ret
.two:   out     dx, ax
        mov     [shadow + edi], ax
        ret
.four:  out     dx, eax
        mov     [shadow + edi], eax
        ret

; Read the whole register with each size at each offset and compare with the shadow.
check_all:
        pusha
        xor     edi, edi
.byte:  lea     edx, [edi + ECHO]
        movzx   esi, byte [shadow + edi]
        xor     eax, eax
        in      al, dx
        call    compare
        cmp     edi, LENGTH - 2
        ja      .next
        movzx   esi, word [shadow + edi]
        xor     eax, eax
        in      ax, dx
        call    compare
        cmp     edi, LENGTH - 4
        ja      .next
        mov     esi, [shadow + edi]
        in      eax, dx
        call    compare
.next:  inc     edi
        cmp     edi, LENGTH
        jb      .byte
        mov     [esp + 8], ebp          ; POPA's EBP: the count survives
        popa
        ret

; EAX was read at port EDX, ESI is right.
compare:
        inc     ebp
        cmp     eax, esi
        jne     .wrong
        ret
.wrong: print   "echo: port "
        print_hex edx, 4
        print   " read "
        print_hex eax, 8
        print   ", expected "
        print_hex esi, 8
        print   10
        exit    1

section .data
align 8
shadow: times LENGTH db 0
