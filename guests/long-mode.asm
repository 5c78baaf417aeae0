; long-mode: a tour of 64-bit mode. Flat, started with --mode 64 at 0x100000.
; 64-bit and SSE2 arithmetic; an IDT, and in it #UD, #PF and int 0x80 taken and returned from; then
; ring 3 with page tables and a TSS of its own, int 0x80 and SYSCALL from there, a forbidden access
; (#PF with error code 5), and back. Halts with status 0, or debug exit 1 at what went wrong.

%include "inc/ports.inc"
bits 64
default rel
org 0x100000
%include "inc/io.inc"
%include "inc/expect.inc"

PML4            equ 0x200000            ; three tables, one page each
USER_PAGE       equ 0x400000            ; ring 3 may touch 2 MiB from here
USER_STACK      equ USER_PAGE + 0x100000
KERNEL_STACK    equ 0x300000            ; what ring 0 gets when ring 3 is interrupted
NOT_MAPPED      equ 0x20_0000_0000      ; 128 GiB: outside the loader's identity map

PRESENT_WRITABLE equ 3
USER            equ 4
LARGE           equ 1 << 7

; Our own GDT; the order of the last three is what SYSRET asks for.
KERNEL_CODE     equ 0x08
KERNEL_DATA     equ 0x10
USER_DATA       equ 0x20
USER_CODE       equ 0x28
TSS             equ 0x30

MSR_EFER        equ 0xC0000080
MSR_STAR        equ 0xC0000081
MSR_LSTAR       equ 0xC0000082
MSR_FMASK       equ 0xC0000084
EFER_SCE        equ 1 << 0

%macro gate 3                           ; vector, handler, attributes
        mov     edi, %1
        lea     rax, [%2]
        mov     edx, %3
        call    set_gate
%endmacro
INTERRUPT_GATE      equ 0x8E
USER_INTERRUPT_GATE equ 0xEE

section .text
        mov     rbx, rsp                ; PRINT_HEX uses the stack
        call    serial_init
        print   "long mode: RSP "
        print_hex rbx, 16
        print   10

        mov     rax, 0x0123456789ABCDEF
        mov     rdx, 0xFEDCBA9876543210
        mul     rdx
        mov     r15, rdx
        expect  rax, 0x2236D88FE5618CF0, "low half of a 64 x 64 bit product"
        expect  r15, 0x0121FA00AD77D742, "high half of a 64 x 64 bit product"
        mov     rax, 3
        cvtsi2sd xmm0, rax
        mulsd   xmm0, xmm0
        cvttsd2si rax, xmm0
        expect  rax, 9, "SSE2 arithmetic"
        print   "arithmetic: ok", 10

        ; Descriptor tables, and the TSS that says where ring 0's stack is
        lea     rax, [tss]
        mov     [tss_descriptor + 2], ax
        shr     rax, 16
        mov     [tss_descriptor + 4], al
        mov     [tss_descriptor + 7], ah
        lgdt    [gdt_pointer]
        push    KERNEL_CODE
        lea     rax, [.reload]
        push    rax
        retfq
.reload:
        mov     eax, KERNEL_DATA
        mov     ds, eax
        mov     es, eax
        mov     ss, eax
        mov     eax, TSS
        ltr     ax
        gate    6, invalid_opcode, INTERRUPT_GATE
        gate    13, protection_fault, INTERRUPT_GATE
        gate    14, page_fault, INTERRUPT_GATE
        gate    0x80, service, USER_INTERRUPT_GATE
        lidt    [idt_pointer]

        ; Exceptions in ring 0
        ud2                             ; its handler steps over it
        mov     rax, [ud_count]
        expect  rax, 1, "number of #UD"
        print   "#UD: taken and returned from", 10

        mov     rbx, NOT_MAPPED
.write: mov     qword [rbx + 8], 1      ; its handler steps over it
write_length equ $ - .write
        mov     rax, [fault_address]
        expect  rax, NOT_MAPPED + 8, "CR2"
        mov     rax, [fault_code]
        expect  rax, 2, "error code of a write to a page that is not there"
        print   "#PF: taken and returned from, CR2 "
        print_hex [fault_address], 16
        print   10

        mov     eax, SERVICE_ADD
        mov     edi, 40
        mov     esi, 2
        int     0x80
        expect  rax, 42, "int 0x80 from ring 0"
        print   "int 0x80: 40 + 2 = "
        print_dec eax
        print   10

        ; Ring 3
        call    build_tables
        call    enable_syscall
        lea     rsi, [user_start]
        mov     edi, USER_PAGE
        mov     ecx, user_end - user_start
        cld
        rep     movsb
        push    USER_DATA | 3
        push    USER_STACK
        push    0x202                   ; interrupts on: none is there to come
        push    USER_CODE | 3
        push    USER_PAGE
        iretq

; Vector EDI leads to RAX, with attributes EDX.
set_gate:
        shl     edi, 4
        lea     rcx, [idt]
        add     rdi, rcx
        mov     [rdi], ax
        mov     word [rdi + 2], KERNEL_CODE
        mov     byte [rdi + 4], 0       ; no IST
        mov     [rdi + 5], dl
        shr     rax, 16
        mov     [rdi + 6], ax
        shr     rax, 16
        mov     [rdi + 8], eax
        mov     dword [rdi + 12], 0
        ret

; The first GiB mapped to itself in 2 MiB pages; one of them is open to ring 3.
build_tables:
        mov     edi, PML4
        xor     eax, eax
        mov     ecx, 3 * 4096 / 8
        cld
        rep     stosq
        mov     edi, PML4
        mov     qword [rdi], PML4 + 0x1000 + PRESENT_WRITABLE + USER
        mov     qword [rdi + 0x1000], PML4 + 0x2000 + PRESENT_WRITABLE + USER
        add     edi, 0x2000
        mov     eax, PRESENT_WRITABLE + LARGE
        mov     ecx, 512
.page:  mov     [rdi], rax
        add     rax, 1 << 21
        add     edi, 8
        dec     ecx
        jnz     .page
        mov     edi, PML4 + 0x2000 + (USER_PAGE >> 21) * 8
        or      qword [rdi], USER
        mov     eax, PML4
        mov     cr3, rax
        ret

enable_syscall:
        mov     ecx, MSR_EFER
        rdmsr
        or      eax, EFER_SCE
        wrmsr
        mov     ecx, MSR_STAR
        xor     eax, eax
        ; SYSCALL takes CS and SS from here up; SYSRET takes SS + 8 and CS + 16, with ring 3
        mov     edx, ((USER_DATA - 8) | 3) << 16 | KERNEL_CODE
        wrmsr
        mov     ecx, MSR_LSTAR
        lea     rax, [system_call]
        mov     rdx, rax
        shr     rdx, 32
        wrmsr
        mov     ecx, MSR_FMASK
        mov     eax, 0x200              ; interrupts off in the handler
        xor     edx, edx
        wrmsr
        ret

; Exceptions. Those with an error code find it at [RSP], RIP behind it.

invalid_opcode:
        inc     qword [ud_count]
        add     qword [rsp], 2          ; past UD2
        iretq

page_fault:
        push    rax
        mov     rax, cr2
        mov     [fault_address], rax
        mov     rax, [rsp + 8]
        mov     [fault_code], rax
        test    al, USER
        jnz     .ring3
        add     qword [rsp + 16], write_length
        pop     rax
        add     rsp, 8
        iretq
.ring3: add     qword [rsp + 16], user_fault_length
        pop     rax
        add     rsp, 8
        iretq

protection_fault:
        print   "WRONG: #GP at "
        print_hex [rsp + 24], 16        ; PRINT_HEX has pushed two registers on top of the code
        print   10
        exit    1

; int 0x80: service EAX with EDI and ESI; the answer in RAX.
SERVICE_ADD     equ 1
SERVICE_REPORT  equ 2                   ; what ring 3 got from SYSCALL, in EDI

service:
        cmp     eax, SERVICE_REPORT
        je      .report
        lea     rax, [rdi + rsi]
        iretq
.report:
        mov     r15, rdi
        mov     r14, [rsp + 8]          ; the interrupted CS
        mov     r13, rsp
        expect  r14, USER_CODE | 3, "CS of ring 3"
        expect  r13, KERNEL_STACK - 40, "stack taken from the TSS"
        expect  r15, 77, "sum of int 0x80 and SYSCALL in ring 3"
        mov     rax, [fault_address]
        expect  rax, 0x100000, "CR2 of the forbidden access"
        mov     rax, [fault_code]
        expect  rax, 5, "error code of a forbidden read from ring 3"
        print   "ring 3: int 0x80, SYSCALL and a forbidden access, ok", 10
        print   "long mode: done", 10
        halt

; SYSCALL: RCX is the return address, R11 the flags; the stack is still that of ring 3.
system_call:
        add     rdi, rsi
        mov     rax, rdi
        o64 sysret

; Ring 3. This is copied to USER_PAGE: it uses no absolute address of its own.
user_start:
        mov     eax, SERVICE_ADD
        mov     edi, 30
        mov     esi, 5
        int     0x80
        mov     ebx, eax
        mov     edi, ebx                ; 35
        mov     esi, 42
        syscall
        mov     ebx, eax                ; 77
user_fault:
        mov     eax, [abs dword 0x100000]
user_fault_length equ $ - user_fault
        mov     edi, ebx
        mov     eax, SERVICE_REPORT
        int     0x80
        jmp     $
user_end:

section .data
align 16
gdt:    dq      0
        dq      0x00AF9B000000FFFF      ; KERNEL_CODE
        dq      0x00CF93000000FFFF      ; KERNEL_DATA
        dq      0                       ; 32-bit user code would be here
        dq      0x00CFF3000000FFFF      ; USER_DATA
        dq      0x00AFFB000000FFFF      ; USER_CODE
tss_descriptor:
        dw      tss_end - tss - 1, 0
        db      0, 0x89, 0, 0           ; present, available 64-bit TSS
        dq      0
gdt_end:
gdt_pointer:
        dw      gdt_end - gdt - 1
        dq      gdt
idt_pointer:
        dw      idt_end - idt - 1
        dq      idt
align 8
        dd      0
tss:    dd      0
        dq      KERNEL_STACK            ; RSP0
        times 102 - 12 db 0
        dw      104                     ; no I/O permission bitmap
tss_end:
align 16
ud_count:       dq 0
fault_address:  dq 0
fault_code:     dq 0
idt:    times 0x81 * 2 dq 0
idt_end:
