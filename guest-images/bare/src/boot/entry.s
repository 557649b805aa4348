# From the two ways into a CPU (PVH, SIPI) to Rust at CPL 3. Plain integer instructions only: CPL 0 may be
# interpreted by a KVM that knows no SSE.

# PVH (xen/include/public/arch-x86/hvm/start_info.h): 32-bit protected mode, no paging, EBX = hvm_start_info.
.section .text.boot, "ax", @progbits
.code32
    .globl pvh_entry
pvh_entry:
    cli
    cld
    movl %ebx, start_info
    lgdt boot_gdtr
    xorl %esi, %esi             # CPU index
    jmp enter_long

# An AP from the trampoline: 32-bit protected mode on boot_gdt. Its index is in ap_index.
    .globl ap_entry32
ap_entry32:
    movw $0x18, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movl ap_index, %esi

enter_long:
    movl $0x620, %eax           # CR4: PAE, OSFXSR, OSXMMEXCPT
    movl %eax, %cr4
    movl $page_tables, %eax
    movl %eax, %cr3
    movl $0xC0000080, %ecx      # EFER.LME
    rdmsr
    orl $0x100, %eax
    wrmsr
    movl $0x80010033, %eax      # CR0: PG, WP, NE, ET, MP, PE
    movl %eax, %cr0
    .byte 0xEA                  # ljmp $0x10, $start64
    .long start64
    .word 0x10

.code64
start64:
    movl $0x18, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    xorl %eax, %eax
    movl %eax, %fs
    movl %eax, %gs
    movl %esi, %ebx             # RBX = CPU index, RBP = its block
    movl %esi, %ebp
    shll ${block_shift}, %ebp
    addl $cpu_blocks, %ebp
    leal {block_size}(%rbp), %esp

    # The CPU's own GDT: the boot entries, then the TSS descriptor (SDM vol. 3, 8.2.3).
    movl $boot_gdt, %esi
    leal {block_gdt}(%rbp), %edi
    movl $8, %ecx
1:  movq (%rsi), %rax
    movq %rax, (%rdi)
    addl $8, %esi
    addl $8, %edi
    subl $1, %ecx
    jnz 1b
    leal {block_tss}(%rbp), %eax
    movq %rax, %rdx
    shlq $16, %rdx              # base 15:0 at bit 16, base 23:16 at bit 32
    movabsq $0x000000FFFFFF0000, %rcx
    andq %rcx, %rdx
    movabsq $0x0000890000000168, %rcx
    orq %rcx, %rdx
    shrl $24, %eax
    shlq $56, %rax
    orq %rax, %rdx
    movq %rdx, (%rdi)
    movq $0, 8(%rdi)
    leal {block_size}(%rbp), %eax
    movq %rax, {block_tss} + 4(%rbp)    # RSP0
    # The I/O bitmap, all zero, opens the ports to CPL 3 where a software IRETQ does not load IOPL.
    movw $104, {block_tss} + 102(%rbp)
    movb $0xFF, {block_tss} + 360(%rbp)
    movq %rbx, {block_index}(%rbp)
    movw $79, -16(%rsp)
    leal {block_gdt}(%rbp), %eax
    movq %rax, -14(%rsp)
    lgdt -16(%rsp)
    movl $0x40, %eax
    ltr %ax

    testl %ebx, %ebx
    jnz 3f
    # The first CPU fills the IDT: interrupt gates, DPL 0, to stubs 16 bytes apart.
    movl $idt, %edi
    movl $trap_stubs, %eax
    movl $256, %ecx
2:  movw %ax, (%rdi)
    movl %eax, %edx
    shrl $16, %edx
    movl $0x8E000010, 2(%rdi)
    movw %dx, 6(%rdi)
    movq $0, 8(%rdi)
    addl $16, %eax
    addl $16, %edi
    subl $1, %ecx
    jnz 2b
3:  lidt idtr

    # To Rust at CPL 3: RDI = CPU index, IF 0, stack as at a function's entry. IOPL 3 is for QEMU's TCG, which wants the cached TR
    # to be an available TSS before it reads the I/O bitmap; after KVM_SET_SREGS it is a busy one, as everywhere.
    movl %ebx, %eax
    shll ${stack_shift}, %eax
    addl $user_stacks + {stack_size} - 8, %eax
    pushq $0x2B
    pushq %rax
    pushq $0x3002
    pushq $0x33
    pushq $rust_main
    movl %ebx, %edi
    movl $0x2B, %eax
    movl %eax, %ds
    movl %eax, %es
    iretq

# Real mode, copied to {trampoline}: CS = that >> 4, IP = 0.
.section .rodata.trampoline, "a", @progbits
    .globl trampoline_start, trampoline_end
.code16
trampoline_start:
    cli
    cld
    movw %cs, %ax
    movw %ax, %ds
    lgdtl trampoline_gdtr - trampoline_start
    movl %cr0, %eax
    orl $1, %eax
    movl %eax, %cr0
    .byte 0x66, 0xEA            # ljmpl $0x08, $ap_entry32
    .long ap_entry32
    .word 0x08
    .balign 8
trampoline_gdtr:
    .word 63
    .long boot_gdt
trampoline_end:
.code64
