; disk-code: executes a page, has a disk read overwrite it, and executes it again, sector by sector.
; A CPU that keeps what it translated of the old code is caught. Flat, 32-bit, at 0x100000.
;
; Sector n of the disk must begin with "mov eax, n; ret". The disk is a modern virtio one, else the
; first of the IDE controller, read by bus-master DMA. Debug exit 0 if each sector was executed by
; two virtual addresses, 1 at the first that was not. The dword at image offset 4 is the number of
; sectors (see guests.patched).
;
; EBX: the sector; EBP: the routine that reads it to BODY.

%include "inc/ports.inc"
bits 32
org 0x100000
%include "inc/io.inc"
%include "inc/pci.inc"

BODY            equ 0x200000            ; where sectors go
ALIAS           equ 0x400000            ; the first 4 MiB are here once more
PAGE_DIRECTORY  equ 0x300000
PAGE_FLAGS      equ 0x83                ; present, writable, 4 MiB
CR4_PSE         equ 1 << 4
CR0_PG          equ 1 << 31
MOV_EAX         equ 0xB8
RETURN           equ 0xC3

; virtio 1.2: 4.1.4 (capabilities), 4.1.4.3 (common configuration), 2.7 (split ring), 5.2.6 (disk)
VIRTIO_BLK_ID   equ 0x10421AF4
PCI_CAPABILITIES equ 0x34
CAP_VENDOR      equ 0x09
CFG_COMMON      equ 1
CFG_NOTIFY      equ 2
DRIVER_SELECT   equ 0x08
DRIVER_FEATURE  equ 0x0C
STATUS          equ 0x14
QUEUE_SELECT    equ 0x16
QUEUE_SIZE      equ 0x18
QUEUE_ENABLE    equ 0x1C
NOTIFY_OFF      equ 0x1E
QUEUE_DESC      equ 0x20
QUEUE_DRIVER    equ 0x28
QUEUE_DEVICE    equ 0x30
FEATURES_OK     equ 8
DRIVER_OK       equ 4
NEXT            equ 1
WRITE           equ 2
ENTRIES         equ 4
DESCRIPTORS     equ 0x310000
AVAIL           equ 0x311000
USED            equ 0x312000
HEADER          equ 0x313000
VERDICT         equ 0x314000
SECTOR_SIZE     equ 512

; ATA: the primary channel, and its bus master (SFF-8038i)
IDE_ID          equ 0x70108086
BUS_MASTER_BAR  equ PCI_BAR0 + 16
ATA_COUNT       equ 0x1F2
ATA_LOW         equ 0x1F3
ATA_MID         equ 0x1F4
ATA_HIGH        equ 0x1F5
ATA_DEVICE      equ 0x1F6
ATA_COMMAND     equ 0x1F7
ATA_LBA         equ 0xE0
READ_DMA        equ 0xC8
ATA_BSY_DRQ_ERR equ 0x89
MASTER_STATUS   equ 2
MASTER_TABLE    equ 4
MASTER_READ     equ 8                   ; from disk to memory
MASTER_START    equ 1
MASTER_DONE     equ 4
MASTER_ERROR    equ 2
LAST_REGION     equ 1 << 31
COMMAND_MASTER  equ 1 << 2

section .text
        jmp     short start
        align   4, db 0
sectors: dd     32

start:  mov     esp, PAGE_DIRECTORY
        call    serial_init
        call    map_twice
        mov     ebp, virtio_read
        mov     eax, VIRTIO_BLK_ID
        call    pci_find
        jnc     .virtio
        mov     ebp, ide_read
        mov     eax, IDE_ID
        call    pci_find
        jc      .none
        call    ide_init
        print   "disk-code: IDE"
        jmp     .found
.none:  print   "disk-code: there is no disk", 10
        exit    1
.virtio:
        call    virtio_init
        print   "disk-code: virtio"
.found: ; The first code there is our own
        xor     ebx, ebx
        mov     byte [BODY], MOV_EAX
        mov     dword [BODY + 1], ebx
        mov     byte [BODY + 5], RETURN
        call    execute
.next:  inc     ebx
        cmp     ebx, [sectors]
        jae     .all
        call    ebp
        cmp     byte [BODY], MOV_EAX
        jne     .wrong_disk
        cmp     [BODY + 1], ebx
        jne     .wrong_disk
        cmp     byte [BODY + 5], RETURN
        jne     .wrong_disk
        call    execute
        jmp     .next
.all:   print   ", "
        print_dec ebx
        print   " sectors, all right", 10
        exit    0
.wrong_disk:
        print   ": no such code in sector "
        print_dec ebx
        print   10
        exit    1

; Call what is at BODY by both of its addresses.
execute:
        mov     eax, BODY
        call    eax
        cmp     eax, ebx
        jne     .stale
        mov     eax, BODY + ALIAS
        call    eax
        cmp     eax, ebx
        jne     .stale
        ret
.stale: mov     ecx, eax
        print   ": sector "
        print_dec ebx
        print   " was read, and the code of "
        print_dec ecx
        print   " ran", 10
        exit    1

; All of the address space at its place, and the first 4 MiB at ALIAS, too.
map_twice:
        mov     edi, PAGE_DIRECTORY
        mov     eax, PAGE_FLAGS
.page:  mov     [edi], eax
        add     edi, 4
        add     eax, 1 << 22
        jnc     .page
        mov     dword [PAGE_DIRECTORY + (ALIAS >> 22) * 4], PAGE_FLAGS
        mov     eax, PAGE_DIRECTORY
        mov     cr3, eax
        mov     eax, cr4
        or      eax, CR4_PSE
        mov     cr4, eax
        mov     eax, cr0
        or      eax, CR0_PG
        mov     cr0, eax
        ret

; Have the function at EDI answer, and master the bus.
enable:
        add     edi, PCI_COMMAND
        call    pci_read
        and     eax, 0xFFFF
        or      eax, COMMAND_IO | COMMAND_MEMORY | COMMAND_MASTER
        call    pci_write
        sub     edi, PCI_COMMAND
        ret

; virtio

; The disk at EDI, up to DRIVER_OK.
virtio_init:
        call    enable
        call    find_structures
        mov     esi, [registers]
        mov     byte [esi + STATUS], 0
        mov     byte [esi + STATUS], 1  ; ACKNOWLEDGE
        mov     byte [esi + STATUS], 3  ; DRIVER
        mov     dword [esi + DRIVER_SELECT], 0
        mov     dword [esi + DRIVER_FEATURE], 0
        mov     dword [esi + DRIVER_SELECT], 1
        mov     dword [esi + DRIVER_FEATURE], 1 ; VERSION_1
        mov     byte [esi + STATUS], FEATURES_OK | 3
        mov     word [esi + QUEUE_SELECT], 0
        mov     word [esi + QUEUE_SIZE], ENTRIES
        mov     dword [esi + QUEUE_DESC], DESCRIPTORS
        mov     dword [esi + QUEUE_DESC + 4], 0
        mov     dword [esi + QUEUE_DRIVER], AVAIL
        mov     dword [esi + QUEUE_DRIVER + 4], 0
        mov     dword [esi + QUEUE_DEVICE], USED
        mov     dword [esi + QUEUE_DEVICE + 4], 0
        movzx   eax, word [esi + NOTIFY_OFF]
        mul     dword [multiplier]
        add     [doorbell], eax
        mov     edi, DESCRIPTORS
        mov     esi, chain
        mov     ecx, (chain_end - chain) / 4
        rep     movsd
        xor     eax, eax
        mov     [AVAIL], eax
        mov     [AVAIL + 4], eax        ; each entry of the ring is chain 0
        mov     [AVAIL + 8], eax
        mov     [USED], eax
        mov     [HEADER], eax           ; VIRTIO_BLK_T_IN
        mov     [HEADER + 12], eax
        mov     esi, [registers]
        mov     word [esi + QUEUE_ENABLE], 1
        mov     byte [esi + STATUS], DRIVER_OK | FEATURES_OK | 3
        ret

; Where its registers are, from the capabilities of EDI.
find_structures:
        add     edi, PCI_CAPABILITIES
        call    pci_read
        sub     edi, PCI_CAPABILITIES
.next:  movzx   ecx, al
        jecxz   .done
        add     edi, ecx
        call    pci_read                ; id, next, length, type
        mov     esi, eax
        cmp     al, CAP_VENDOR
        jne     .other
        shr     eax, 24
        cmp     al, CFG_COMMON
        jne     .not_common
        call    structure
        mov     [registers], eax
.not_common:
        mov     eax, esi
        shr     eax, 24
        cmp     al, CFG_NOTIFY
        jne     .other
        call    structure
        mov     [doorbell], eax
        add     edi, 16
        call    pci_read
        mov     [multiplier], eax
        sub     edi, 16
.other: sub     edi, ecx
        mov     eax, esi
        shr     eax, 8
        jmp     .next
.done:  ret

; EAX = the address of the structure of the capability at EDI (whose offset in the function is ECX).
structure:
        add     edi, 4
        call    pci_read                ; BAR
        add     edi, 4
        movzx   eax, al
        push    edi
        sub     edi, ecx
        lea     edi, [edi + eax * 4 + PCI_BAR0 - 8]
        call    pci_read
        and     eax, ~0xF
        mov     edx, eax
        pop     edi
        call    pci_read                ; offset in it
        add     eax, edx
        sub     edi, 8
        ret

virtio_read:
        mov     [HEADER + 8], ebx
        inc     word [AVAIL + 2]
        mov     edi, [doorbell]
        mov     word [edi], 0
.wait:  mov     ax, [USED + 2]
        cmp     ax, [AVAIL + 2]
        jne     .wait
        ret

; IDE

ide_init:
        call    enable
        add     edi, BUS_MASTER_BAR
        call    pci_read
        and     eax, ~3
        mov     [bus_master], eax
        ret

ide_read:
        mov     edx, [bus_master]
        add     edx, MASTER_TABLE
        mov     eax, region
        out     dx, eax
        sub     edx, MASTER_TABLE - MASTER_STATUS
        mov     al, MASTER_DONE | MASTER_ERROR
        out     dx, al                  ; clears them
        mov     dx, ATA_DEVICE
        mov     al, ATA_LBA
        out     dx, al
        mov     dx, ATA_COUNT
        mov     al, 1
        out     dx, al
        mov     eax, ebx
        mov     dx, ATA_LOW
        out     dx, al
        shr     eax, 8
        mov     dx, ATA_MID
        out     dx, al
        shr     eax, 8
        mov     dx, ATA_HIGH
        out     dx, al
        mov     dx, ATA_COMMAND
        mov     al, READ_DMA
        out     dx, al
        mov     edx, [bus_master]
        mov     al, MASTER_READ | MASTER_START
        out     dx, al
        add     edx, MASTER_STATUS
.wait:  in      al, dx
        test    al, MASTER_DONE
        jz      .wait
        sub     edx, MASTER_STATUS
        mov     al, 0
        out     dx, al
        mov     dx, ATA_COMMAND
        in      al, dx
        test    al, ATA_BSY_DRQ_ERR
        jnz     .error
        ret
.error: print   ": the drive reports an error", 10
        exit    1

section .data
        align   4, db 0
registers: dd      0
doorbell: dd    0
multiplier: dd  0
bus_master: dd  0
chain:  dd      HEADER, 0, 16
        dw      NEXT, 1
        dd      BODY, 0, SECTOR_SIZE
        dw      NEXT | WRITE, 2
        dd      VERDICT, 0, 1
        dw      WRITE, 0
chain_end:
region: dd      BODY, SECTOR_SIZE | LAST_REGION
