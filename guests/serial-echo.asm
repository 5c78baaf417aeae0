; serial-echo: reads the serial port by interrupt (IRQ 4 through the 8259A) and sleeps in HLT while
; nothing comes. Each line comes back; "quit" or Ctrl-D halts: status 0. Flat, 32-bit, at 0x100000.

%include "inc/ports.inc"
bits 32
org 0x100000
%include "inc/io.inc"
%include "inc/idt32.inc"
%include "inc/line.inc"

QUEUE   equ 256                         ; indices are bytes and wrap by themselves

section .text
        call    serial_init
        mov     al, IRQ_BASE + COM1_IRQ
        mov     ebx, received
        call    set_gate
        mov     ax, 1 << COM1_IRQ
        call    interrupts_init
        mov     dx, COM1_MCR
        mov     al, MCR_READY | MCR_OUT2
        out     dx, al
        call    greet
        mov     dx, COM1_IER
        mov     al, IER_RECEIVED
        out     dx, al

        ; STI lets one more instruction run before an interrupt is taken: none can slip in between
        ; the look at the queue and HLT.
next:   cli
        movzx   ebx, byte [tail]
        cmp     bl, [head]
        jne     take
        sti
        hlt
        jmp     next
take:   mov     al, [queue + ebx]
        inc     byte [tail]
        sti
        call    take_character
        jnc     next
        halt

received:
        pusha
.more:  mov     dx, COM1_LSR
        in      al, dx
        test    al, LSR_DATA
        jz      .empty
        mov     dx, COM1_DATA
        in      al, dx
        movzx   ebx, byte [head]
        mov     [queue + ebx], al
        inc     bl
        cmp     bl, [tail]
        je      .more                   ; the queue is full: this character is lost
        mov     [head], bl
        jmp     .more
.empty: mov     al, PIC_EOI
        out     PIC1, al
        popa
        iret

section .data
head:   db      0                       ; written by the handler only
tail:   db      0                       ; written by the main program only
queue:  times QUEUE db 0
