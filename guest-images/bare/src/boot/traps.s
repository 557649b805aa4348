# The CPL-0 half of the guest while it runs: interrupts are counted and acknowledged, UD2 with {service} + n in RAX is
# a request for a privileged instruction, anything else goes to rust_fault at CPL 3.

.section .text.boot, "ax", @progbits
.code64
    .balign 16
trap_stubs:
    .set n, 0
    .rept 256
    .balign 16
    .if n == 8 || (n >= 10 && n <= 14) || n == 17 || n == 21 || n == 29 || n == 30
    .else
    pushq $0                    # stands for the error code
    .endif
    pushq $n
    jmp trap
    .set n, n + 1
    .endr

# Frame from RSP up: RDX RCX RAX vector error RIP CS RFLAGS RSP SS
trap:
    pushq %rax
    pushq %rcx
    pushq %rdx
    movq 24(%rsp), %rax
    cmpl $32, %eax
    jae interrupt
    cmpl $6, %eax
    jne fault
    testl $3, 48(%rsp)
    jz fault
    movq 16(%rsp), %rax
    subq ${service}, %rax
    cmpq $5, %rax
    ja fault
    addq $2, 40(%rsp)           # over UD2
    jmp *services(, %rax, 8)

.balign 8
services:
    .quad service_rdmsr, service_wrmsr, service_halt, service_flags, service_triple, service_cpuid

service_rdmsr:                  # RCX = MSR; RAX = value
    movq 8(%rsp), %rcx
    rdmsr
    shlq $32, %rdx
    movl %eax, %eax
    orq %rdx, %rax
    movq %rax, 16(%rsp)
    jmp trap_return

service_wrmsr:                  # RCX = MSR, RDX = value
    movq 8(%rsp), %rcx
    movq (%rsp), %rax
    movq %rax, %rdx
    shrq $32, %rdx
    movl %eax, %eax
    wrmsr
    jmp trap_return

service_halt:                   # waits for one interrupt; one that is pending ends it at once
    sti
    hlt
    cli
    jmp trap_return

service_flags:                  # RDX = 0 or 0x200: RFLAGS.IF at CPL 3
    andq $~0x200, 56(%rsp)
    movq (%rsp), %rax
    andl $0x200, %eax
    orq %rax, 56(%rsp)
    jmp trap_return

service_triple:
    lidt null_idtr
    ud2

service_cpuid:                  # RCX = leaf, RDX = where EAX EBX ECX EDX go; subleaf 0
    pushq %rbx
    pushq %rdi
    movq 16(%rsp), %rdi
    movq 24(%rsp), %rax
    xorl %ecx, %ecx
    cpuid
    movl %eax, (%rdi)
    movl %ebx, 4(%rdi)
    movl %ecx, 8(%rdi)
    movl %edx, 12(%rdi)
    popq %rdi
    popq %rbx
    jmp trap_return

interrupt:
    movq %rsp, %rcx
    andq $-{block_size}, %rcx
    addq $1, (%rcx, %rax, 8)
    cmpl $0xFF, %eax            # spurious: no EOI (SDM vol. 3, 11.9)
    je 2f
    pushq %rcx
    cmpb $0, xapic_mode
    jne 1f
    movl $0x80B, %ecx
    xorl %eax, %eax
    xorl %edx, %edx
    wrmsr
    jmp 3f
1:  movl $0xFEE000B0, %ecx
    movl $0, (%rcx)
3:  rdtsc
    shlq $32, %rdx
    orq %rdx, %rax
    popq %rcx
    movq %rax, {block_tsc}(%rcx)
2:  testl $3, 48(%rsp)
    jnz trap_return
    # Only the HLT of service_halt can be interrupted at CPL 0: drop that frame and return from the service instead,
    # which spares an IRETQ to CPL 0.
    leaq {block_size} - 80(%rcx), %rsp
trap_return:
    popq %rdx
    popq %rcx
    popq %rax
    addq $16, %rsp
    iretq

# To rust_fault(vector, error, rip, cr2, cs) at CPL 3 on the CPU's own stack, from its top.
fault:
    movq 24(%rsp), %rdi
    movq 32(%rsp), %rsi
    movq 40(%rsp), %rdx
    movq 48(%rsp), %r8
    movq %cr2, %rcx
    movq %rsp, %rbp
    andq $-{block_size}, %rbp
    movl {block_index}(%rbp), %eax
    shll ${stack_shift}, %eax
    addl $user_stacks + {stack_size} - 8, %eax
    leaq {block_size}(%rbp), %rsp
    pushq $0x2B
    pushq %rax
    pushq $0x3002
    pushq $0x33
    pushq $rust_fault
    iretq
