# Static tables: page tables, boot GDT, PVH note. Pages are 2 MiB, identity, for 16 GiB, all reachable from CPL 3,
# with Accessed and Dirty preset: a walk of software or of EPT without A/D bits then never writes to a page table,
# so that members that share them keep a read-only copy each.

.section .note.pvh, "a", @note
    .balign 4
    .long 4, 4, 18              # name size, descriptor size, XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .long pvh_entry

.section .tables, "aw", @progbits
    .balign 4096
    .globl page_tables
page_tables:                    # PML4: P RW US A
    .quad pdpt + 0x27
    .fill 511, 8, 0
pdpt:
    .set i, 0
    .rept {gib}
    .quad page_directories + 4096 * i + 0x27
    .set i, i + 1
    .endr
    .fill 512 - {gib}, 8, 0
page_directories:               # PDEs: P RW US A D PS; 3 GiB..4 GiB is the device hole: PCD too
    .set i, 0
    .rept 512 * {gib}
    .if i >= 1536 && i < 2048
    .quad (i << 21) + 0xF7
    .else
    .quad (i << 21) + 0xE7
    .endif
    .set i, i + 1
    .endr

# Selectors as Linux numbers them (software virtualisation of CPL 3 may depend on 0x33 and 0x2b):
# 0x08 code32, 0x10 code64, 0x18 data, 0x28 user data, 0x30 user code64, 0x40 TSS (in the per-CPU copy).
    .balign 64
    .globl boot_gdt
boot_gdt:
    .quad 0
    .quad 0x00CF9B000000FFFF
    .quad 0x00AF9B000000FFFF
    .quad 0x00CF93000000FFFF
    .quad 0
    .quad 0x00CFF3000000FFFF
    .quad 0x00AFFB000000FFFF
    .quad 0
boot_gdt_end:
    .balign 8
boot_gdtr:
    .word boot_gdt_end - boot_gdt - 1
    .long boot_gdt
    .balign 8
idtr:
    .word 256 * 16 - 1
    .quad idt
    .balign 8
null_idtr:
    .word 0
    .quad 0

.section .bss.idt, "aw", @nobits
    .balign 4096
idt:
    .skip 256 * 16
