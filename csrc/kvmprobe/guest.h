/* What the probe and its guest code (guest.S) agree on: addresses, ports, stages. For C and assembler. */
#ifndef PV_KVMPROBE_GUEST_H
#define PV_KVMPROBE_GUEST_H

/* Guest physical addresses; the first 2 MiB are mapped one to one. */
#define GUEST_MEMORY_SIZE 0x200000
#define GUEST_PML4 0x1000
#define GUEST_PDPT 0x2000
#define GUEST_PD 0x3000
#define GUEST_PT 0x4000
#define GUEST_SECOND_PML4 0x5000
#define GUEST_APIC_PD 0x6000
#define GUEST_GDT 0x7000
#define GUEST_IDT 0x8000
#define GUEST_TSS 0x9000
#define GUEST_KERNEL_STACK_TOP 0xc000
#define GUEST_USER_STACK_TOP 0xe000
#define GUEST_CODE 0x10000

/* Not present until the guest's own page fault handler maps it. */
#define GUEST_FAULT_PAGE 0x100000
#define GUEST_APIC 0xfee00000

#define SELECTOR_CODE32 0x08
#define SELECTOR_CODE64 0x10
#define SELECTOR_DATA 0x18
/* SYSRET wants user data and then user code, each 8 apart, after its base. */
#define SELECTOR_USER_BASE 0x20
#define SELECTOR_USER_DATA 0x2b
#define SELECTOR_USER_CODE 0x33
#define SELECTOR_TSS 0x38

/* The guest writes a stage's number here when it has reached it, and to the other port when something was wrong. */
#define PORT_STAGE 0x500
#define PORT_WRONG 0x501

/* In the order in which they are reached. */
#define STAGE_PROTECTED_MODE 1
#define STAGE_LONG_MODE 2
#define STAGE_REGISTERS 3
#define STAGE_KERNEL_LOOP 4
#define STAGE_PAGE_FAULT 5
#define STAGE_CR3_SWITCH 6
#define STAGE_USER_MODE 7
#define STAGE_USER_LOOP 8
#define STAGE_TIMER 9
#define STAGE_DONE 10

/* Real CPUs need a few milliseconds for this; a hypervisor that emulates instruction by instruction needs a minute. */
#define LOOP_ROUNDS 20000000

#define TIMER_VECTOR 0x40
#define PAGE_FAULT_VECTOR 14

#endif
