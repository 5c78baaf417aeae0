; The hot callbacks of the engine in machine code: the block hook, events and SYSCALL.
;
; x86-64, System V calling convention, position-independent. `vmm/cpu/native/__init__.py` loads it;
; `make -C vmm/cpu/native` builds it. Rules:
;
; - The portable code in Python is the complete one. What is here recognises the common case and does
;   exactly what `quick.QuickDelivery` and `fastcall.FastCalls.syscall` do; at the first thing that
;   is otherwise it calls the Python callback, with nothing changed.
; - Guest memory is hostile. Each guest-physical address is compared with the size of RAM before it is
;   touched, each value is loaded once, and no access crosses a page. RAM is whole pages.
; - No place in the engine's context is known here: the block holds a pointer to each field.
; - rbx is the block and rbp the engine throughout; both survive calls of the library.
;
; Sources: Intel SDM volume 3A, sections 4.5 and 6.14; volume 2B, "SYSCALL".

bits 64
default rel

; What the callbacks work on, one for each engine; `native.Block` has the same fields.
struc block
.words:         resq 1          ; the counters of `budget.Budget`
.save:          resq 1          ; functions of the library
.restore:       resq 1
.reg_read:      resq 1
.reg_write:     resq 1
.stop:          resq 1
.context:       resq 1          ; the engine's context buffer, and fields in it
.gpr:           resq 1
.rip:           resq 1
.eflags:        resq 1
.hflags:        resq 1
.cs:            resq 1          ; segments: see `cache`
.ss:            resq 1
.tr:            resq 1
.gdtr:          resq 1
.idtr:          resq 1
.cr:            resq 1
.efer:          resq 1
.star:          resq 1
.lstar:         resq 1
.fmask:         resq 1
.error_code:    resq 1
.is_software:   resq 1
.old_exception: resq 1
.ram:           resq 1          ; the first region of RAM: host address and size
.ram_size:      resq 1
.eflags_id:     resq 1          ; the library's number of RFLAGS
.cost:          resq 1          ; `engine.EXCEPTION_COST`
.with_code:     resq 1          ; a bit for each vector that pushes an error code
.on_interrupt:  resq 1          ; the Python callbacks
.on_syscall:    resq 1
.events:        resq 1          ; how often each was done here
.calls:         resq 1
.code:          resq 1          ; scratch
.gate:          resq 1
.target:        resq 1
.selector:      resq 1
.attributes:    resq 1
.limit:         resq 1
.old_sp:        resq 1
.sp:            resq 1
.frame:         resq 1
.flags:         resq 1
endstruc

; struct SegmentCache of the library.
struc cache
.selector:      resd 1
                resd 1
.base:          resq 1
.limit:         resd 1
.attributes:    resd 1
endstruc

EXECUTED        equ 0           ; `budget`: the order of the counters
LIMIT           equ 8
STOP            equ 16
STOPPED         equ 24

RCX_AT          equ 8           ; registers in the order of their encoding
RSP_AT          equ 32
R11_AT          equ 88

H_CPL           equ 3
H_SHADOW        equ 1 << 3
H_CS32          equ 1 << 4
H_SS32          equ 1 << 5
H_ADDSEG        equ 1 << 6
H_LMA           equ 1 << 14
H_CS64          equ 1 << 15

F_TF            equ 1 << 8
F_IF            equ 1 << 9
F_NT            equ 1 << 14
F_RF            equ 1 << 16
F_VM            equ 1 << 17

CR4_LA57        equ 1 << 12
EFER_SCE        equ 1

READ            equ 0
WRITE           equ 2           ; as the R/W bit of a page-table entry
PRESENT         equ 0x21        ; and accessed
LARGE           equ 0x80
LARGE_ABNORMAL  equ 0x1FE000    ; bits 13 to 20 of an entry for 2 MiB
ADDRESS         equ 0x000FFFFFFFFFF000
LARGE_ADDRESS   equ 0x000FFFFFFFE00000

; Bits 40-55 of a descriptor: present, S, code, long; not conforming, DPL 0, not D.
CODE_MASK       equ 0x0060FC0000000000
CODE_WANTED     equ 0x0020980000000000
GRANULAR        equ 23          ; a bit of its second dword
CODE64          equ 0xA09B00    ; attributes that SYSCALL loads
DATA            equ 0xC09300

header:
                dd block_size
                dd on_block
                dd on_interrupt
                dd on_syscall
                dd inject

; void on_block(engine, uint64_t address, uint32_t size, int64_t *words): see `budget`.
on_block:
        mov     rax, [rcx + EXECUTED]
        cmp     rax, [rcx + LIMIT]
        jge     .stop
        mov     edx, edx
        add     rax, rdx
        mov     [rcx + EXECUTED], rax
        ret
.stop:
        mov     byte [rcx + STOPPED], 1
        jmp     [rcx + STOP]

%macro  enter_frame 0
        push    rbx
        push    rbp
        push    r12
        push    r13
        push    r14
        push    r15
        sub     rsp, 8
        mov     rbp, rdi
%endmacro

%macro  leave_frame 0
        add     rsp, 8
        pop     r15
        pop     r14
        pop     r13
        pop     r12
        pop     rbp
        pop     rbx
%endmacro

%macro  library 1               ; save or restore
        mov     rdi, rbp
        mov     rsi, [rbx + block.context]
        call    [rbx + block.%1]
%endmacro

%macro  register 1              ; reg_read or reg_write RFLAGS
        mov     rdi, rbp
        mov     esi, [rbx + block.eflags_id]
        lea     rdx, [rbx + block.flags]
        call    [rbx + block.%1]
%endmacro

; void on_interrupt(engine, uint32_t vector, block): a fault, or INT n.
on_interrupt:
        enter_frame
        mov     rbx, rdx
        mov     r12d, esi
        library save
        cmp     r12d, 0xFF
        ja      .python
        mov     r14d, 5 * 8
        xor     r13d, r13d
        mov     rax, [rbx + block.is_software]
        cmp     dword [rax], 0
        setne   r13b
        mov     dword [rax], 0  ; the engine forgets to, and believes it at an intercept
        jne     .deliver
        cmp     r12d, 31
        ja      .deliver
        mov     eax, [rbx + block.with_code]
        bt      eax, r12d
        jnc     .deliver
        mov     rax, [rbx + block.error_code]
        mov     eax, [rax]
        mov     [rbx + block.code], rax
        mov     r14d, 6 * 8
.deliver:
        call    deliver
        jc      .python
        call    finish
        jl      .done
        mov     rdi, rbp
        call    [rbx + block.stop]
.done:
        leave_frame
        ret
.python:
        mov     rdi, rbp
        mov     esi, r12d
        mov     rax, [rbx + block.on_interrupt]
        xor     edx, edx
        leave_frame
        jmp     rax

; int inject(engine, uint32_t vector, block): an external interrupt between two runs; 0: not done.
inject:
        enter_frame
        mov     rbx, rdx
        mov     r12d, esi
        library save
        mov     r14d, 5 * 8
        xor     r13d, r13d
        xor     eax, eax
        cmp     r12d, 0xFF
        ja      .done
        call    deliver
        mov     eax, 0
        jc      .done
        call    finish
        mov     eax, 1
.done:
        leave_frame
        ret

; Load the CPU with what was delivered, and charge for it; "less": the run goes on.
finish:
        sub     rsp, 8
        inc     qword [rbx + block.events]
        library restore
        add     rsp, 8
        mov     rcx, [rbx + block.words]
        mov     rax, [rcx + EXECUTED]
        add     rax, [rbx + block.cost]
        mov     [rcx + EXECUTED], rax
        cmp     rax, [rcx + LIMIT]
        jl      .ret
        mov     qword [rcx + STOPPED], 1        ; leaves the flags alone
.ret:
        ret

; Enter a handler in the saved context.
;
; In: r12d vector, r13d 1 for INT n, r14 bytes of the frame; with six words, block.code.
; Out: carry: not the common case, and nothing was changed.
deliver:
        sub     rsp, 8
        mov     rax, [rbx + block.hflags]
        mov     r15d, [rax]
        test    r15d, H_LMA
        jz      .no
        ; The gate.
        mov     rcx, [rbx + block.idtr]
        mov     eax, r12d
        shl     eax, 4
        lea     edx, [rax + 15]
        cmp     edx, [rcx + cache.limit]
        ja      .no
        add     rax, [rcx + cache.base]
        mov     esi, READ
        call    find
        jc      .no
        test    eax, 7
        jnz     .no
        and     eax, 0xFFF
        cmp     eax, 0xFF0
        ja      .no
        mov     r8, [rdi]
        mov     r9d, [rdi + 8]
        mov     rax, r8
        shr     rax, 40
        mov     edx, eax
        and     edx, 0x9E       ; present, a system gate; bit 0 tells a trap gate
        cmp     edx, 0x8E
        jne     .no
        test    r13d, r13d
        jz      .open
        mov     edx, r15d
        and     edx, H_CPL
        shr     eax, 5
        and     eax, 3
        cmp     eax, edx
        jb      .no
.open:
        mov     [rbx + block.gate], r8
        shl     r9, 32
        mov     rax, r8
        shr     rax, 32
        and     eax, 0xFFFF0000
        or      r9, rax
        movzx   eax, r8w
        or      r9, rax
        mov     [rbx + block.target], r9
        sar     r9, 47
        inc     r9
        cmp     r9, 1
        ja      .no             ; not canonical
        ; Its code segment.
        mov     rax, r8
        shr     rax, 16
        and     eax, 0xFFFC
        jz      .no
        test    eax, 4
        jnz     .no
        mov     [rbx + block.selector], rax
        mov     rcx, [rbx + block.gdtr]
        lea     edx, [rax + 7]
        cmp     edx, [rcx + cache.limit]
        ja      .no
        add     rax, [rcx + cache.base]
        mov     esi, READ
        call    find
        jc      .no
        test    eax, 7
        jnz     .no
        mov     r8, [rdi]
        mov     rax, CODE_MASK
        and     rax, r8
        mov     rcx, CODE_WANTED
        cmp     rax, rcx
        jne     .no
        movzx   eax, r8w
        shr     r8, 32
        mov     [rbx + block.attributes], r8
        mov     ecx, r8d
        and     ecx, 0xF0000
        or      eax, ecx
        bt      r8d, GRANULAR
        jnc     .bytes
        shl     eax, 12
        or      eax, 0xFFF
.bytes:
        mov     [rbx + block.limit], rax
        ; The stack: of the interrupt stack table, of ring 0, or the same.
        mov     rax, [rbx + block.gpr]
        mov     rax, [rax + RSP_AT]
        mov     [rbx + block.old_sp], rax
        mov     rcx, [rbx + block.gate]
        shr     rcx, 32
        and     ecx, 7
        lea     edx, [rcx * 8 + 28]
        jnz     .tss
        test    r15d, H_CPL
        jz      .stack
        mov     edx, 4
.tss:
        mov     rcx, [rbx + block.tr]
        lea     eax, [rdx + 7]
        cmp     eax, [rcx + cache.limit]
        ja      .no
        mov     rax, [rcx + cache.base]
        add     rax, rdx
        mov     esi, READ
        call    find
        jc      .no
        and     eax, 0xFFF
        cmp     eax, 0xFF8
        ja      .no
        mov     rax, [rdi]
.stack:
        and     rax, -16
        sub     rax, r14
        mov     [rbx + block.sp], rax
        mov     esi, WRITE
        call    find
        jc      .no
        and     eax, 0xFFF
        add     eax, r14d
        cmp     eax, 0x1000
        ja      .no
        mov     [rbx + block.frame], rdi
        mov     qword [rbx + block.flags], 0
        register reg_read
        ; Nothing can fail any more. The frame:
        mov     rdi, [rbx + block.frame]
        cmp     r14d, 5 * 8
        je      .no_code
        mov     rax, [rbx + block.code]
        mov     [rdi], rax
        add     rdi, 8
.no_code:
        mov     rsi, [rbx + block.rip]
        mov     rax, [rsi]
        mov     [rdi], rax
        mov     rcx, [rbx + block.cs]
        mov     eax, [rcx + cache.selector]
        mov     [rdi + 8], rax
        mov     eax, [rbx + block.flags]
        mov     [rdi + 16], rax
        mov     rax, [rbx + block.old_sp]
        mov     [rdi + 24], rax
        mov     rdx, [rbx + block.ss]
        mov     eax, [rdx + cache.selector]
        mov     [rdi + 32], rax
        ; And the registers.
        mov     rax, [rbx + block.target]
        mov     [rsi], rax
        mov     eax, ~(F_TF | F_RF | F_NT | F_VM)
        bt      qword [rbx + block.gate], 40
        jc      .trap
        and     eax, ~F_IF
.trap:
        mov     rsi, [rbx + block.eflags]
        and     [rsi], eax
        test    r15d, H_CPL
        jz      .same_ring
        mov     dword [rdx + cache.selector], 0
        mov     qword [rdx + cache.base], 0
        mov     dword [rdx + cache.limit], 0
        mov     dword [rdx + cache.attributes], 0
.same_ring:
        mov     eax, [rbx + block.selector]
        mov     [rcx + cache.selector], eax
        mov     qword [rcx + cache.base], 0
        mov     eax, [rbx + block.limit]
        mov     [rcx + cache.limit], eax
        mov     eax, [rbx + block.attributes]
        mov     [rcx + cache.attributes], eax
        and     r15d, ~(H_CPL | H_SHADOW | H_ADDSEG)
        or      r15d, H_CS64 | H_CS32 | H_SS32
        mov     rax, [rbx + block.hflags]
        mov     [rax], r15d
        mov     rax, [rbx + block.gpr]
        mov     rcx, [rbx + block.sp]
        mov     [rax + RSP_AT], rcx
        mov     rax, [rbx + block.old_exception]
        mov     dword [rax], -1
        add     rsp, 8
        clc
        ret
.no:
        add     rsp, 8
        stc
        ret

; void on_syscall(engine, block). The engine adds 2 to RIP afterwards.
on_syscall:
        enter_frame
        mov     rbx, rsi
        library save
        mov     rax, [rbx + block.hflags]
        mov     r15d, [rax]
        test    r15d, H_CS64
        jz      .python
        mov     rax, [rbx + block.efer]
        test    dword [rax], EFER_SCE
        jz      .python
        mov     r12, [rbx + block.rip]
        mov     rax, [r12]
        mov     esi, READ
        call    find
        jc      .python
        and     eax, 0xFFF
        cmp     eax, 0xFFF
        je      .python
        cmp     word [rdi], 0x050F      ; without prefixes
        jne     .python
        mov     qword [rbx + block.flags], 0
        register reg_read
        mov     rdx, [rbx + block.gpr]
        mov     rax, [r12]
        add     rax, 2
        mov     [rdx + RCX_AT], rax
        mov     eax, [rbx + block.flags]
        and     eax, ~F_RF
        mov     [rdx + R11_AT], rax
        mov     rcx, [rbx + block.fmask]
        mov     ecx, [rcx]
        not     ecx
        and     eax, ecx
        or      eax, 2
        mov     [rbx + block.flags], rax
        mov     rax, [rbx + block.star]
        mov     eax, [rax + 4]
        and     eax, 0xFFFC
        mov     rcx, [rbx + block.cs]
        mov     [rcx + cache.selector], eax
        mov     qword [rcx + cache.base], 0
        mov     dword [rcx + cache.limit], -1
        mov     dword [rcx + cache.attributes], CODE64
        add     eax, 8
        mov     rcx, [rbx + block.ss]
        mov     [rcx + cache.selector], eax
        mov     qword [rcx + cache.base], 0
        mov     dword [rcx + cache.limit], -1
        mov     dword [rcx + cache.attributes], DATA
        and     r15d, ~(H_CPL | H_SHADOW | H_ADDSEG)
        or      r15d, H_CS32 | H_SS32
        mov     rax, [rbx + block.hflags]
        mov     [rax], r15d
        mov     rax, [rbx + block.lstar]
        mov     rax, [rax]
        sub     rax, 2
        mov     [r12], rax
        inc     qword [rbx + block.calls]
        library restore
        register reg_write
        leave_frame
        ret
.python:
        mov     rdi, rbp
        mov     rax, [rbx + block.on_syscall]
        xor     esi, esi
        leave_frame
        jmp     rax

; A supervisor access by four-level paging, entries present and accessed, tables and target in RAM.
;
; In: rax linear address, esi READ or WRITE.
; Out: rax guest-physical address, rdi host address, both good up to the end of the page; carry: look
; closer. Changes rcx, rdx, rsi and r8 to r11.
find:
        mov     rdx, rax
        sar     rdx, 47
        inc     rdx
        cmp     rdx, 1
        ja      .no             ; not canonical
        mov     rdx, [rbx + block.cr]
        test    dword [rdx + 4 * 8], CR4_LA57
        jnz     .no
        mov     rdx, [rdx + 3 * 8]
        mov     rdi, [rbx + block.ram]
        mov     r9, [rbx + block.ram_size]
        mov     r8, ADDRESS
        mov     r10d, esi
        or      r10d, PRESENT   ; what an entry must have
        mov     r11d, r10d
        or      r11d, LARGE     ; of these

%macro  level 1                 ; rdx: from an entry to the next one's
        and     rdx, r8
        mov     rcx, rax
        shr     rcx, %1 - 3
        and     ecx, 0xFF8
        or      rdx, rcx
        cmp     rdx, r9
        jae     .no
        mov     rdx, [rdi + rdx]
        mov     ecx, edx
%endmacro

        level   39
        and     ecx, r11d
        cmp     ecx, r10d
        jne     .no
        level   30
        and     ecx, r11d
        cmp     ecx, r10d
        jne     .no
        level   21
        shl     esi, 5          ; a page to be written must be dirty
        test    ecx, LARGE
        jnz     .large
        and     ecx, r11d
        cmp     ecx, r10d
        jne     .no
        level   12
        or      r10d, esi
        and     ecx, r10d
        cmp     ecx, r10d
        jne     .no
        and     rdx, r8
        and     eax, 0xFFF
        jmp     .found
.large:
        or      r10d, esi
        mov     r11d, r10d
        or      r11d, LARGE_ABNORMAL
        and     ecx, r11d
        cmp     ecx, r10d
        jne     .no
        mov     r8, LARGE_ADDRESS
        and     rdx, r8
        and     eax, 0x1FFFFF
.found:
        or      rax, rdx
        cmp     rax, r9
        jae     .no
        add     rdi, rax
        clc
        ret
.no:
        stc
        ret
