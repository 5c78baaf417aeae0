; elf32: an ELF32 executable with two segments, code at 0x100000 and data at 0x300000, and bss behind
; the data. Checks that both are in place, that bss is zero, and its entry state. Halts with status 0,
; or debug exit 1 at what went wrong.

%define IMAGE_BASE 0x100000
%include "inc/ports.inc"
%include "inc/elf.inc"

DATA_AT     equ 0x300000
BSS_SIZE    equ 0x20000
MARK        equ 0x600DDA7A

bits 32
elf32_header start, 2
elf32_load 0, IMAGE_BASE, IMAGE_BASE, file_end - IMAGE_BASE, file_end - IMAGE_BASE
elf32_load data_start - IMAGE_BASE, DATA_AT, DATA_AT, DATA_SIZE, DATA_SIZE + BSS_SIZE

%include "inc/io.inc"

section .text
start:  pushfd
        pop     ecx                     ; before anything changes the flags
        call    serial_init
        test    ecx, 0x600              ; IF and DF
        jnz     wrong_flags
        mov     eax, cr0
        test    eax, 1 << 31
        jnz     wrong_paging
        cmp     dword [DATA_AT], MARK
        jne     wrong_data
        mov     edi, DATA_AT + DATA_SIZE
        mov     ecx, BSS_SIZE / 4
        xor     eax, eax
        repe    scasd
        jne     wrong_bss
        print   "elf32: segments in place, bss is zero", 10
        halt

wrong_flags:
        print   "elf32: WRONG: EFLAGS "
        print_hex ecx, 8
        print   10
        exit    1
wrong_paging:
        print   "elf32: WRONG: paging is on", 10
        exit    1
wrong_data:
        print   "elf32: WRONG: data segment holds "
        print_hex [DATA_AT], 8
        print   10
        exit    1
wrong_bss:
        print   "elf32: WRONG: bss is not zero at "
        print_hex edi, 8
        print   10
        exit    1

section .segment progbits align=16
data_start:
        dd      MARK
        dd      0
DATA_SIZE   equ $ - data_start

elf_end
