/* The guest of the KVM probe: what every kernel does on its way to user mode, each step reported by its number.
 *
 * Loaded at GUEST_CODE and entered in 32-bit protected mode without paging. Tables (GDT, IDT, TSS, pages) were laid out
 * by the probe. In ring 3 it may not touch ports, so user mode reports through SYSCALL.
 */
#include "guest.h"

    .section .rodata
    .global guest_start, guest_end
    .global guest_page_fault, guest_timer, guest_wrong

#define HERE(label) (GUEST_CODE + (label - guest_start))

.macro stage number
    movw $PORT_STAGE, %dx
    movb $\number, %al
    outb %al, %dx
.endm

.macro wrmsr_const msr, high, low
    movl $\msr, %ecx
    movl $\high, %edx
    movl $\low, %eax
    wrmsr
.endm

    .code32
    .balign 4096
guest_start:
    movl $GUEST_KERNEL_STACK_TOP, %esp
    stage STAGE_PROTECTED_MODE
    movl $0x6a0, %eax                   /* CR4: PAE, PGE, OSFXSR, OSXMMEXCPT */
    movl %eax, %cr4
    movl $GUEST_PML4, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx              /* EFER: SCE, LME, NXE */
    rdmsr
    orl $0x901, %eax
    wrmsr
    movl $0x80010033, %eax              /* CR0: PG, WP, NE, ET, MP, PE */
    movl %eax, %cr0
    ljmp $SELECTOR_CODE64, $HERE(guest_long)

    .code64
guest_long:
    movw $SELECTOR_DATA, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    xorl %eax, %eax
    movw %ax, %fs
    movw %ax, %gs
    movq $GUEST_KERNEL_STACK_TOP, %rsp
    movw $SELECTOR_TSS, %ax
    ltr %ax
    stage STAGE_LONG_MODE

    /* instructions that every kernel uses and emulators lack */
    xorl %eax, %eax
    cpuid
    rdtsc
    movl $LOOP_ROUNDS, %ecx
    movq %rcx, %xmm0
    paddq %xmm0, %xmm0
    movq %xmm0, %rcx
    cmpq $(2 * LOOP_ROUNDS), %rcx
    jne guest_wrong
    stage STAGE_REGISTERS

    movl $LOOP_ROUNDS, %ecx
1:  addq $3, %rax
    decl %ecx
    jnz 1b
    stage STAGE_KERNEL_LOOP

    /* a page fault that our own handler mends */
    movq $0x1122334455667788, %rax
    movq %rax, GUEST_FAULT_PAGE
    cmpq %rax, GUEST_FAULT_PAGE
    jne guest_wrong
    stage STAGE_PAGE_FAULT

    /* another address space in which that page is another one: reads must change with CR3 */
    movq $GUEST_SECOND_PML4, %rax
    movq %rax, %cr3
    movq %cr3, %rax
    cmpq $GUEST_SECOND_PML4, %rax
    jne guest_wrong
    stage STAGE_CR3_SWITCH

    /* SYSCALL: where it goes, with which selectors, and interrupts off on entry */
    wrmsr_const 0xc0000081, ((SELECTOR_USER_BASE | 3) << 16 | SELECTOR_CODE64), 0
    wrmsr_const 0xc0000082, 0, HERE(guest_syscall)
    wrmsr_const 0xc0000084, 0, 0x200

    /* to ring 3, as a kernel starts its first program */
    pushq $SELECTOR_USER_DATA
    pushq $GUEST_USER_STACK_TOP
    pushq $0x202                        /* interrupts on */
    pushq $SELECTOR_USER_CODE
    pushq $HERE(guest_user)
    iretq

guest_user:
    movw %cs, %ax
    andw $3, %ax
    cmpw $3, %ax
    jne guest_user_wrong
    movl $STAGE_USER_MODE, %edi
    syscall
    movl $LOOP_ROUNDS, %ecx
1:  addq $3, %rax
    decl %ecx
    jnz 1b
    movl $STAGE_USER_LOOP, %edi         /* the kernel side starts the timer now */
    syscall
2:  pause                               /* until the timer interrupts */
    cmpl $0, HERE(guest_ticks)
    je 2b
    movl $STAGE_TIMER, %edi
    syscall
    movl $STAGE_DONE, %edi
    syscall
guest_user_wrong:
    ud2

/* %edi: the stage to report */
guest_syscall:
    movq %rsp, %r8
    movq $GUEST_KERNEL_STACK_TOP, %rsp
    pushq %rcx
    pushq %r11
    movl %edi, %eax
    movw $PORT_STAGE, %dx
    outb %al, %dx
    cmpl $STAGE_USER_LOOP, %edi
    jne 1f
    movl $GUEST_APIC, %esi
    movl $0x1ff, 0xf0(%rsi)             /* APIC on, spurious vector 255 */
    movl $0xb, 0x3e0(%rsi)              /* divide by 1 */
    movl $TIMER_VECTOR, 0x320(%rsi)     /* one shot */
    movl $1000000, 0x380(%rsi)
1:  popq %r11
    popq %rcx
    movq %r8, %rsp
    sysretq

guest_timer:
    pushq %rsi
    incl HERE(guest_ticks)
    movl $GUEST_APIC, %esi
    movl $0, 0xb0(%rsi)                 /* end of interrupt */
    popq %rsi
    iretq

/* Maps the one page that may fault; any other fault is wrong. */
guest_page_fault:
    pushq %rax
    movq %cr2, %rax
    cmpq $GUEST_FAULT_PAGE, %rax
    jne guest_wrong
    movq $(GUEST_FAULT_PAGE | 7), %rax
    movq %rax, (GUEST_PT + (GUEST_FAULT_PAGE >> 12) * 8)
    popq %rax
    addq $8, %rsp                       /* the error code */
    iretq

guest_wrong:
    movw $PORT_WRONG, %dx
    outb %al, %dx
1:  hlt
    jmp 1b

    .balign 8
guest_ticks:
    .long 0
guest_end:

    .section .note.GNU-stack, "", @progbits
