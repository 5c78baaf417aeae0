; hello: the smallest guest. Flat, 32-bit, at 0x100000.
; Says hello over the serial port and halts with interrupts off, which ends the run with status 0.

%include "inc/ports.inc"
bits 32
org 0x100000

section .text
        mov     esi, greeting
next:   lodsb
        test    al, al
        jz      done
        mov     ah, al
        mov     dx, COM1_LSR
wait_:  in      al, dx
        test    al, LSR_THRE
        jz      wait_
        mov     al, ah
        mov     dx, COM1_DATA
        out     dx, al
        jmp     next
done:   cli
        hlt
        jmp     done

section .data
greeting: db "Hello from the guest!", 10, 0
