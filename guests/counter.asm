; counter: counts line by line; for suspend, snapshot and restore. Flat, 32-bit, at 0x100000.
; The count lives in five places: EBX, memory, the stack, an x87 register and an SSE register.
; Each line says so if they have come to differ, and the run then ends by debug exit 1.
; The dwords at image offsets 4 and 8 (see guests.patched) are:
;   limit   lines to print before halting with status 0; 0: for ever
;   delay   rounds of an empty loop between two lines

%include "inc/ports.inc"
bits 32
org 0x100000
%include "inc/io.inc"

CR4_OSFXSR equ 1 << 9

section .text
        jmp     short start
        align   4, db 0
limit:  dd      0
delay:  dd      50000000

start:  mov     eax, cr4
        or      eax, CR4_OSFXSR
        mov     cr4, eax
        call    serial_init
        fninit
        fldz
        xor     ebx, ebx
        mov     [count], ebx
        movd    xmm0, ebx
        movd    xmm1, [one]
        push    ebx

next:   inc     ebx
        inc     dword [count]
        inc     dword [esp]
        fld1
        faddp
        paddd   xmm0, xmm1

        mov     eax, [count]
        cmp     eax, ebx
        jne     broken
        cmp     [esp], ebx
        jne     broken
        fist    dword [scratch]
        cmp     [scratch], ebx
        jne     broken
        movd    eax, xmm0
        cmp     eax, ebx
        jne     broken

        print   "counter "
        print_dec ebx
        print   10
        cmp     ebx, [limit]
        je      finished

        mov     ecx, [delay]
        jecxz   next
pause_: dec     ecx
        jnz     pause_
        jmp     next

finished:
        halt

broken: print   "counter is broken: register "
        print_dec ebx
        print   ", memory "
        print_dec [count]
        print   ", stack "
        print_dec [esp + 4]             ; PRINT_DEC has pushed EAX
        print   ", x87 "
        fist    dword [scratch]
        print_dec [scratch]
        print   ", SSE "
        movd    [scratch], xmm0
        print_dec [scratch]
        print   10
        exit    1

section .data
align 4
count:   dd     0
scratch: dd     0
one:     dd     1
