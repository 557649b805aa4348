/* Entry of the protected-mode part that the boot loader jumps to: 32-bit, paging off, %esi = boot_params
 * (Documentation/arch/x86/boot.rst, "32-bit boot protocol"). Goes to long mode with the first 4 GiB mapped one to one,
 * lets unpack() put the kernel in place, and enters the kernel by its 64-bit entry with %rsi = boot_params.
 */
    .section .entry, "ax"
    .code32
    .globl entry
entry:
    cli
    cld
    mov $stack_top, %esp
    mov %esi, %ebp

    /* Clear .bss: the boot loader loads what is in the file and no more. */
    mov $bss_start, %edi
    mov $bss_end, %ecx
    sub %edi, %ecx
    xor %eax, %eax
    rep stosb

    /* PML4 -> PDPT -> four page directories of 2 MiB pages. */
    movl $(pdpt + 3), pml4
    mov $pdpt, %edi
    mov $(directories + 3), %eax
    mov $4, %ecx
1:  mov %eax, (%edi)
    add $4096, %eax
    add $8, %edi
    loop 1b
    mov $directories, %edi
    mov $0x83, %eax
    mov $2048, %ecx
2:  mov %eax, (%edi)
    add $0x200000, %eax
    add $8, %edi
    loop 2b

    mov %cr4, %eax
    or $0x20, %eax              /* PAE */
    mov %eax, %cr4
    mov $pml4, %eax
    mov %eax, %cr3
    mov $0xC0000080, %ecx       /* EFER.LME */
    rdmsr
    or $0x100, %eax
    wrmsr
    mov %cr0, %eax
    or $0x80000001, %eax
    mov %eax, %cr0
    lgdt gdt_pointer
    ljmp $0x10, $long_mode

    .code64
long_mode:
    mov $0x18, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    mov %eax, %fs
    mov %eax, %gs
    mov %ebp, %ebx
    mov $payload, %edi
    call unpack
    mov %rbx, %rsi
    jmp *%rax

    .section .rodata
    .balign 16
gdt:
    .quad 0, 0
    .quad 0x00AF9A000000FFFF    /* 0x10: 64-bit code, as the boot protocol wants */
    .quad 0x00CF92000000FFFF    /* 0x18: data */
gdt_pointer:
    .word 31
    .quad gdt

    .section .payload, "a"
    .globl payload
payload:
    .incbin PAYLOAD

    .bss
    .balign 4096
pml4:
    .skip 4096
pdpt:
    .skip 4096
directories:
    .skip 4 * 4096
    .skip 16384
stack_top:
    .section .note.GNU-stack, "", @progbits
