; multiboot: a Multiboot 1 kernel, ELF32 at 0x100000. Prints what the loader handed over: command
; line, memory sizes, memory map, modules and their first bytes. Halts with status 0, or debug exit 1
; when it was not started by a Multiboot loader.
;
; Source: Multiboot Specification 0.6.96, sections 3.1 to 3.3.

%define IMAGE_BASE 0x100000
%include "inc/ports.inc"
%include "inc/elf.inc"

HEADER_MAGIC    equ 0x1BADB002
LOADER_MAGIC    equ 0x2BADB002
PAGE_ALIGN      equ 1 << 0              ; modules on page boundaries
MEMORY_INFO     equ 1 << 1
FLAGS           equ PAGE_ALIGN | MEMORY_INFO

; The information structure, and its flags
INFO_FLAGS      equ 0
INFO_LOWER      equ 4
INFO_UPPER      equ 8
INFO_CMDLINE    equ 16
INFO_MODULES    equ 20                  ; count, address
INFO_MAP        equ 44                  ; length, address
INFO_LOADER     equ 64
HAS_MEMORY      equ 1 << 0
HAS_CMDLINE     equ 1 << 2
HAS_MODULES     equ 1 << 3
HAS_MAP         equ 1 << 6
HAS_LOADER      equ 1 << 9

PREVIEW         equ 60                  ; bytes of a module that are shown at most

bits 32
elf32_header start, 1
elf32_load 0, IMAGE_BASE, IMAGE_BASE, file_end - IMAGE_BASE, memory_end - IMAGE_BASE

        align   4, db 0
        dd      HEADER_MAGIC, FLAGS, -(HEADER_MAGIC + FLAGS)

%include "inc/io.inc"

section .text
start:  mov     esp, stack_end          ; the specification promises no stack
        call    serial_init
        mov     ebp, ebx                ; EBP: the information structure
        cmp     eax, LOADER_MAGIC
        je      right_magic
        print   "Not started by a Multiboot loader: EAX is "
        print_hex eax, 8
        print   10
        exit    1

right_magic:
        mov     ebx, [ebp + INFO_FLAGS]
        print   "Started by: "
        test    ebx, HAS_LOADER
        jz      no_loader
        mov     esi, [ebp + INFO_LOADER]
        call    puts
no_loader:
        print   10, "Command line: "
        test    ebx, HAS_CMDLINE
        jz      no_cmdline
        mov     esi, [ebp + INFO_CMDLINE]
        call    puts
no_cmdline:
        print   10
        test    ebx, HAS_MEMORY
        jz      no_memory
        print   "Memory: "
        print_dec [ebp + INFO_LOWER]
        print   " KiB low, "
        print_dec [ebp + INFO_UPPER]
        print   " KiB high", 10
no_memory:
        test    ebx, HAS_MAP
        jz      no_map
        print   "Memory map:", 10
        mov     esi, [ebp + INFO_MAP + 4]
        mov     edi, [ebp + INFO_MAP]
        add     edi, esi                ; EDI: its end
map_entry:
        cmp     esi, edi
        jae     no_map
        print   "  "
        mov     eax, [esi + 4]
        mov     edx, [esi + 8]
        call    put_hex64
        print   " + "
        mov     eax, [esi + 12]
        mov     edx, [esi + 16]
        call    put_hex64
        cmp     dword [esi + 20], 1
        je      usable
        print   " reserved", 10
        jmp     map_next
usable: print   " usable", 10
map_next:
        add     esi, [esi]              ; an entry's size does not count the size field
        add     esi, 4
        jmp     map_entry
no_map: test    ebx, HAS_MODULES
        jz      done
        mov     edx, [ebp + INFO_MODULES]
        mov     esi, [ebp + INFO_MODULES + 4]
        print   "Modules: "
        print_dec edx
        print   10
module: test    edx, edx
        jz      done
        print   "  "
        print_hex [esi], 8
        print   " + "
        mov     eax, [esi + 4]
        sub     eax, [esi]
        print_dec eax
        print   " '"
        push    esi
        mov     esi, [esi + 8]
        call    puts
        pop     esi
        print   "': "
        call    preview
        print   10
        add     esi, 16
        dec     edx
        jmp     module
done:   halt

; EDX:EAX in hexadecimal.
put_hex64:
        push    ecx
        mov     cl, 8
        xchg    eax, edx
        call    put_hex
        xchg    eax, edx
        call    put_hex
        pop     ecx
        ret

; The first bytes of the module at entry ESI; what is not printable ASCII becomes a dot.
preview:
        pusha
        mov     ebx, [esi]
        mov     ecx, [esi + 4]
        sub     ecx, ebx
        cmp     ecx, PREVIEW
        jbe     .next
        mov     ecx, PREVIEW
.next:  jecxz   .done
        mov     al, [ebx]
        cmp     al, ' '
        jb      .dot
        cmp     al, '~'
        jbe     .show
.dot:   mov     al, '.'
.show:  call    putc
        inc     ebx
        dec     ecx
        jmp     .next
.done:  popa
        ret

elf_end

section .bss align=16
        resb    4096
stack_end:
memory_end:
