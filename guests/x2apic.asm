; x2apic: the local APIC by RDMSR and WRMSR. Flat, started with --mode 64 at 0x100000.
; #GP at an MSR that is not there; the APIC's ID and an interrupt to itself in x2APIC mode; CR8 that
; holds one back; the timer by a deadline of the TSC; NMIs that wait for each other. Debug exit 0, or
; 1 at what went wrong. Without x2APIC in CPUID it says so and halts.

%include "inc/ports.inc"
bits 64
default rel
org 0x100000
%include "inc/io.inc"
%include "inc/expect.inc"

MSR_APIC_BASE       equ 0x1B
MSR_TSC             equ 0x10
MSR_TSC_DEADLINE    equ 0x6E0
MSR_X2APIC_ID       equ 0x802
MSR_X2APIC_TPR      equ 0x808
MSR_X2APIC_EOI      equ 0x80B
MSR_X2APIC_SVR      equ 0x80F
MSR_X2APIC_ICR      equ 0x830
MSR_X2APIC_TIMER    equ 0x832
MSR_X2APIC_SELF     equ 0x83F
MSR_NONE            equ 0x1234          ; no processor has it
APIC_ENABLED        equ 3 << 10         ; x2APIC mode
TIMER_DEADLINE      equ 2 << 17
ICR_NMI             equ 4 << 8          ; to the APIC with ID 0, which is this one
CPUID_ECX           equ 1 << 21 | 1 << 24

SELF_VECTOR         equ 0x51
TIMER_VECTOR        equ 0x61
SPURIOUS_VECTOR     equ 0xFF
MILLISECOND         equ 1_000_000       ; of a TSC that runs at 1 GHz
DEADLINES           equ 10
NMIS                equ 5

%macro gate 2                           ; vector, handler
        mov     edi, %1
        lea     rax, [%2]
        call    set_gate
%endmacro

%macro write_msr 2                      ; number, value below 2^32
        mov     ecx, %1
        mov     eax, %2
        xor     edx, edx
        wrmsr
%endmacro

section .text
        call    serial_init
        mov     eax, 1
        cpuid
        and     ecx, CPUID_ECX
        cmp     ecx, CPUID_ECX
        je      .there
        print   "x2apic: this CPU has none", 10
        halt
.there:
        gate    2, nmi
        gate    13, protection_fault
        gate    SELF_VECTOR, self_interrupt
        gate    TIMER_VECTOR, timer_interrupt
        gate    SPURIOUS_VECTOR, spurious
        lidt    [idt_pointer]

        ; No such MSR, and none of the APIC's before its mode is on; the handler steps over each.
        mov     ecx, MSR_NONE
        rdmsr
        wrmsr
        mov     ecx, MSR_X2APIC_ID
        rdmsr
        mov     rax, [faults]
        expect  rax, 3, "number of #GP"
        print   "x2apic: #GP where there is nothing", 10

        mov     ecx, MSR_APIC_BASE
        rdmsr
        or      eax, APIC_ENABLED
        wrmsr
        mov     ecx, MSR_X2APIC_ID
        rdmsr
        expect  rax, 0, "ID"
        write_msr MSR_X2APIC_SVR, 0x100 | SPURIOUS_VECTOR

        ; CR8 is the task priority: 5 holds vector 0x51 back, 4 lets it through.
        mov     eax, 5
        mov     cr8, rax
        mov     ecx, MSR_X2APIC_TPR
        rdmsr
        expect  rax, 0x50, "TPR behind CR8"
        sti
        write_msr MSR_X2APIC_SELF, SELF_VECTOR
        nop
        mov     rax, [self_count]
        expect  rax, 0, "interrupts that CR8 holds back"
        mov     r9d, 4
        mov     cr8, r9
        nop
        mov     rax, [self_count]
        expect  rax, 1, "interrupts that CR8 lets through"
        mov     r10, cr8
        expect  r10, 4, "CR8"
        print   "x2apic: an interrupt to itself, held back by CR8", 10

        write_msr MSR_X2APIC_TIMER, TIMER_DEADLINE | TIMER_VECTOR
        mov     r14d, DEADLINES
.deadline:
        cli
        rdtsc
        shl     rdx, 32
        or      rax, rdx
        lea     r13, [rax + MILLISECOND]
        mov     rax, r13
        mov     rdx, rax
        shr     rdx, 32
        mov     ecx, MSR_TSC_DEADLINE
        wrmsr
        sti
        hlt
        rdtsc
        shl     rdx, 32
        or      rax, rdx
        cmp     rax, r13
        jb      .early
        mov     ecx, MSR_TSC_DEADLINE
        rdmsr
        expect  rax, 0, "a deadline that is over"
        dec     r14d
        jnz     .deadline
        mov     rax, [timer_count]
        expect  rax, DEADLINES, "timer interrupts"
        print   "x2apic: ten deadlines kept", 10

        ; Who reads the time in a loop is interrupted as well.
        rdtsc
        add     eax, 3 * MILLISECOND
        adc     edx, 0
        mov     ecx, MSR_TSC_DEADLINE
        wrmsr
.spin:  rdtsc
        cmp     qword [timer_count], DEADLINES
        je      .spin
        print   "x2apic: a deadline kept while it looks at the clock", 10

        ; One that is past comes at once, and no time goes back for it.
        rdtsc
        shl     rdx, 32
        or      rax, rdx
        mov     r12, rax
        mov     ecx, MSR_TSC_DEADLINE
        mov     eax, 1
        xor     edx, edx
        wrmsr
.past:  rdtsc
        shl     rdx, 32
        or      rax, rdx
        cmp     rax, r12
        jb      .back
        mov     r12, rax
        cmp     qword [timer_count], DEADLINES + 1
        je      .past
        print   "x2apic: a deadline that was past", 10

        ; A counter that is set back takes the deadline with it.
        rdtsc
        add     eax, 3 * MILLISECOND
        adc     edx, 0
        mov     ecx, MSR_TSC_DEADLINE
        wrmsr
        write_msr MSR_TSC, 0
        mov     ecx, MSR_TSC_DEADLINE
        rdmsr
        shl     rdx, 32
        or      rax, rdx
        mov     r12, rax
.set:   rdtsc
        cmp     qword [timer_count], DEADLINES + 2
        je      .set
        xor     r13d, r13d
        cmp     rax, r12
        setae   r13b
        expect  r13, 1, "the deadline came before its time"
        expect  rdx, 0, "high half of a counter that was set to 0"
        print   "x2apic: a counter that was set", 10

        ; An NMI in the handler of another waits for its IRET.
        write_msr MSR_X2APIC_ICR, ICR_NMI
.nmis:  cmp     qword [nmi_count], NMIS
        jb      .nmis
        mov     rax, [nmi_nested]
        expect  rax, 0, "NMIs within an NMI"
        print   "x2apic: NMIs one after the other", 10
        exit    0
.early: print   "WRONG: too early", 10
        exit    1
.back:  print   "WRONG: time went back", 10
        exit    1

; Vector EDI leads to RAX.
set_gate:
        shl     edi, 4
        lea     rcx, [idt]
        add     rdi, rcx
        mov     [rdi], ax
        mov     word [rdi + 2], CODE64
        mov     word [rdi + 4], 0x8E00  ; present, ring 0, interrupt gate, no IST
        shr     rax, 16
        mov     [rdi + 6], ax
        shr     rax, 16
        mov     [rdi + 8], eax
        mov     dword [rdi + 12], 0
        ret

protection_fault:
        inc     qword [faults]
        add     qword [rsp + 8], 2      ; past RDMSR or WRMSR
        add     rsp, 8
        iretq

%macro handler 2
%1:     push    rax
        push    rcx
        push    rdx
        inc     qword [%2]
        write_msr MSR_X2APIC_EOI, 0
        pop     rdx
        pop     rcx
        pop     rax
        iretq
%endmacro
        handler self_interrupt, self_count
        handler timer_interrupt, timer_count

spurious:
        iretq

; Asks for the next one as long as there are to be more.
nmi:    push    rax
        push    rcx
        push    rdx
        mov     rax, [nmi_depth]
        add     [nmi_nested], rax
        inc     qword [nmi_depth]
        inc     qword [nmi_count]
        cmp     qword [nmi_count], NMIS
        jae     .last
        write_msr MSR_X2APIC_ICR, ICR_NMI
.last:  mov     ecx, 1000               ; time enough for it to come too early
.wait:  loop    .wait
        dec     qword [nmi_depth]
        pop     rdx
        pop     rcx
        pop     rax
        iretq

section .data
align 8
faults:         dq 0
self_count:     dq 0
timer_count:    dq 0
nmi_count:      dq 0
nmi_depth:      dq 0
nmi_nested:     dq 0
idt_pointer:
        dw      idt_end - idt - 1
        dq      idt
align 16
idt:    times 0x100 * 2 dq 0
idt_end:
