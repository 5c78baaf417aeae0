; elf64: an ELF64 executable that starts in long mode, code at 0x100000, data and bss at 0x300000.
; Checks both, and the entry state. Halts with status 0, or debug exit 1 at what went wrong.

%define IMAGE_BASE 0x100000
%include "inc/ports.inc"
%include "inc/elf.inc"

DATA_AT     equ 0x300000
BSS_SIZE    equ 0x20000
MARK        equ 0x600DDA7A600DDA7A
MSR_EFER    equ 0xC0000080
EFER_LMA    equ 1 << 10

bits 64
default rel
elf64_header start, 2
elf64_load 0, IMAGE_BASE, IMAGE_BASE, file_end - IMAGE_BASE, file_end - IMAGE_BASE
elf64_load data_start - IMAGE_BASE, DATA_AT, DATA_AT, DATA_SIZE, DATA_SIZE + BSS_SIZE

%include "inc/io.inc"

section .text
start:  pushfq
        pop     rbx                     ; before anything changes the flags
        call    serial_init
        test    ebx, 0x600              ; IF and DF
        jnz     wrong_flags
        mov     ecx, MSR_EFER
        rdmsr
        test    eax, EFER_LMA
        jz      wrong_mode
        mov     edi, DATA_AT
        mov     rax, MARK
        cmp     [rdi], rax
        jne     wrong_data
        add     edi, DATA_SIZE
        mov     ecx, BSS_SIZE / 8
        xor     eax, eax
        repe    scasq
        jne     wrong_bss
        mov     rbx, rsp                ; PRINT_HEX uses the stack
        print   "elf64: segments in place, bss is zero, stack at "
        print_hex rbx, 16
        print   10
        halt

wrong_flags:
        print   "elf64: WRONG: RFLAGS "
        print_hex rbx, 16
        print   10
        exit    1
wrong_mode:
        print   "elf64: WRONG: EFER "
        print_hex eax, 8
        print   10
        exit    1
wrong_data:
        print   "elf64: WRONG: data segment holds "
        print_hex [rdi], 16
        print   10
        exit    1
wrong_bss:
        print   "elf64: WRONG: bss is not zero at "
        print_hex rdi, 16
        print   10
        exit    1

section .segment progbits align=16
data_start:
        dq      MARK
        dq      0
DATA_SIZE   equ $ - data_start

elf_end
