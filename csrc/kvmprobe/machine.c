#include "machine.h"

#include "../common/cleanup.h"
#include "guest.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

extern const uint8_t guest_start[], guest_end[], guest_page_fault[], guest_timer[], guest_wrong[];

enum { PTE_PRESENT = 1, PTE_WRITE = 2, PTE_USER = 4, PTE_CACHE_DISABLE = 16, PTE_LARGE = 128, MAX_CPUID = 256 };
enum { GATE_INTERRUPT = 0x8e00, MACHINE_API = 12 };

int fail(struct failure *f, int err, const char *format, ...)
{
    va_list arguments;

    f->err = err;
    va_start(arguments, format);
    vsnprintf(f->what, sizeof f->what, format, arguments);
    va_end(arguments);
    return -1;
}

static uint64_t *table(struct machine *m, uint32_t address)
{
    return (uint64_t *)(m->memory + address);
}

/* The first 2 MiB one to one in 4 KiB pages, all but the fault page; and the APIC's page. */
static void lay_page_tables(struct machine *m)
{
    const uint64_t flags = PTE_PRESENT | PTE_WRITE | PTE_USER;

    table(m, GUEST_PML4)[0] = GUEST_PDPT | flags;
    table(m, GUEST_SECOND_PML4)[0] = GUEST_PDPT | flags;
    table(m, GUEST_PDPT)[0] = GUEST_PD | flags;
    table(m, GUEST_PDPT)[3] = GUEST_APIC_PD | flags;
    table(m, GUEST_PD)[0] = GUEST_PT | flags;
    table(m, GUEST_APIC_PD)[(GUEST_APIC >> 21) & 511] =
        (GUEST_APIC & ~0x1fffffULL) | PTE_PRESENT | PTE_WRITE | PTE_CACHE_DISABLE | PTE_LARGE;
    for (uint64_t page = 0; page < 512; page++)
        table(m, GUEST_PT)[page] = page << 12 | flags;
    table(m, GUEST_PT)[GUEST_FAULT_PAGE >> 12] = 0;
}

static void lay_gdt(struct machine *m)
{
    uint64_t *gdt = table(m, GUEST_GDT);

    gdt[SELECTOR_CODE32 >> 3] = 0x00cf9b000000ffff;
    gdt[SELECTOR_CODE64 >> 3] = 0x00af9b000000ffff;
    gdt[SELECTOR_DATA >> 3] = 0x00cf93000000ffff;
    gdt[SELECTOR_USER_BASE >> 3] = 0x00cffb000000ffff;
    gdt[SELECTOR_USER_DATA >> 3] = 0x00cff3000000ffff;
    gdt[SELECTOR_USER_CODE >> 3] = 0x00affb000000ffff;
    gdt[SELECTOR_TSS >> 3] = 0x0000890000000067 | (uint64_t)GUEST_TSS << 16;
    /* The stack that an interrupt in ring 3 switches to. */
    memcpy(m->memory + GUEST_TSS + 4, &(uint64_t){GUEST_KERNEL_STACK_TOP}, 8);
}

static void lay_gate(struct machine *m, unsigned vector, const uint8_t *handler)
{
    uint64_t address = GUEST_CODE + (uint64_t)(handler - guest_start);
    uint64_t *gate = table(m, GUEST_IDT) + (size_t)vector * 2;

    gate[0] = (address & 0xffff) | (uint64_t)SELECTOR_CODE64 << 16 | (uint64_t)GATE_INTERRUPT << 32 |
              (address & 0xffff0000) << 32;
    gate[1] = address >> 32;
}

static void lay_memory(struct machine *m)
{
    lay_page_tables(m);
    lay_gdt(m);
    for (unsigned vector = 0; vector < 256; vector++)
        lay_gate(m, vector, guest_wrong);
    lay_gate(m, PAGE_FAULT_VECTOR, guest_page_fault);
    lay_gate(m, TIMER_VECTOR, guest_timer);
    memcpy(m->memory + GUEST_CODE, guest_start, (size_t)(guest_end - guest_start));
}

static int create_vm(struct machine *m, struct failure *f)
{
    int version;

    m->kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (m->kvm < 0)
        return fail(f, errno, "opening /dev/kvm");
    version = ioctl(m->kvm, KVM_GET_API_VERSION, 0);
    if (version != MACHINE_API)
        return fail(f, version < 0 ? errno : 0, "KVM's API version is %d, not %d", version, MACHINE_API);
    m->vm = ioctl(m->kvm, KVM_CREATE_VM, 0);
    if (m->vm < 0)
        return fail(f, errno, "creating a VM");
    /* Needed by Intel CPUs only; elsewhere it does nothing. */
    if (ioctl(m->vm, KVM_SET_TSS_ADDR, 0xfffbd000UL) && errno != EINVAL && errno != ENOTTY)
        return fail(f, errno, "setting the VM's TSS address");
    if (ioctl(m->vm, KVM_CREATE_IRQCHIP, 0))
        return fail(f, errno, "creating the VM's interrupt controller");
    return 0;
}

static int give_memory(struct machine *m, struct failure *f)
{
    struct kvm_userspace_memory_region region = {.memory_size = GUEST_MEMORY_SIZE};

    m->memory = mmap(NULL, GUEST_MEMORY_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (m->memory == MAP_FAILED) {
        m->memory = NULL;
        return fail(f, errno, "allocating guest memory");
    }
    region.userspace_addr = (uintptr_t)m->memory;
    if (ioctl(m->vm, KVM_SET_USER_MEMORY_REGION, &region))
        return fail(f, errno, "giving the VM its memory");
    lay_memory(m);
    return 0;
}

static int create_vcpu(struct machine *m, struct failure *f)
{
    int size = ioctl(m->kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
    void *run;

    m->vcpu = ioctl(m->vm, KVM_CREATE_VCPU, 0);
    if (m->vcpu < 0 || size < 0)
        return fail(f, errno, "creating a virtual CPU");
    run = mmap(NULL, (size_t)size, PROT_READ | PROT_WRITE, MAP_SHARED, m->vcpu, 0);
    if (run == MAP_FAILED)
        return fail(f, errno, "mapping the virtual CPU");
    m->run = run;
    m->run_size = (size_t)size;
    return 0;
}

/* Everything that this KVM supports: without it the guest has no long mode. */
static int set_cpuid(struct machine *m, struct failure *f)
{
    cleanup_free struct kvm_cpuid2 *cpuid = calloc(1, sizeof *cpuid + MAX_CPUID * sizeof cpuid->entries[0]);

    if (!cpuid)
        return fail(f, ENOMEM, "allocating the virtual CPU's features");
    cpuid->nent = MAX_CPUID;
    if (ioctl(m->kvm, KVM_GET_SUPPORTED_CPUID, cpuid) || ioctl(m->vcpu, KVM_SET_CPUID2, cpuid))
        return fail(f, errno, "setting the virtual CPU's features");
    return 0;
}

static struct kvm_segment flat_segment(unsigned selector, unsigned type)
{
    return (struct kvm_segment){.limit = 0xffffffff,
                                .selector = (uint16_t)selector,
                                .type = (uint8_t)type,
                                .present = 1,
                                .db = 1,
                                .s = 1,
                                .g = 1};
}

/* 32-bit protected mode without paging, as a boot loader leaves it. */
static int set_registers(struct machine *m, struct failure *f)
{
    struct kvm_regs registers = {.rip = GUEST_CODE, .rflags = 2};
    struct kvm_sregs special;

    if (ioctl(m->vcpu, KVM_GET_SREGS, &special))
        return fail(f, errno, "reading the virtual CPU's registers");
    special.cs = flat_segment(SELECTOR_CODE32, 0xb);
    special.ds = special.es = special.fs = special.gs = special.ss = flat_segment(SELECTOR_DATA, 0x3);
    special.gdt = (struct kvm_dtable){.base = GUEST_GDT, .limit = 0xff};
    special.idt = (struct kvm_dtable){.base = GUEST_IDT, .limit = 0xfff};
    special.cr0 = 0x11;
    if (ioctl(m->vcpu, KVM_SET_SREGS, &special) || ioctl(m->vcpu, KVM_SET_REGS, &registers))
        return fail(f, errno, "setting the virtual CPU's registers");
    return 0;
}

int machine_create(struct machine *m, struct failure *f)
{
    *m = MACHINE_NONE;
    if (create_vm(m, f) || give_memory(m, f) || create_vcpu(m, f))
        return -1;
    return set_cpuid(m, f) || set_registers(m, f) ? -1 : 0;
}

void machine_destroy(struct machine *m)
{
    if (m->run)
        munmap(m->run, m->run_size);
    if (m->vcpu >= 0)
        close(m->vcpu);
    if (m->vm >= 0)
        close(m->vm);
    if (m->memory)
        munmap(m->memory, GUEST_MEMORY_SIZE);
    if (m->kvm >= 0)
        close(m->kvm);
    *m = MACHINE_NONE;
}

/* 1: go on, 0: done, -1: failed. */
static int take_output(struct machine *m, volatile int *stage, struct failure *f)
{
    uint8_t value = ((uint8_t *)m->run)[m->run->io.data_offset];

    if (m->run->io.direction != KVM_EXIT_IO_OUT || m->run->io.port != PORT_STAGE)
        return fail(f, 0, "the guest found a wrong result or got an exception");
    if (value != *stage + 1)
        return fail(f, 0, "the guest reported step %u after step %d", value, *stage);
    *stage = value;
    return value != STAGE_DONE;
}

static int explain_exit(const struct machine *m, struct failure *f)
{
    switch (m->run->exit_reason) {
    case KVM_EXIT_SHUTDOWN:
        return fail(f, 0, "triple fault in the guest");
    case KVM_EXIT_INTERNAL_ERROR:
        if (m->run->internal.suberror == KVM_INTERNAL_ERROR_EMULATION)
            return fail(f, 0, "KVM emulates the guest's code, and could not emulate an instruction");
        return fail(f, 0, "internal error of KVM, suberror %u", m->run->internal.suberror);
    case KVM_EXIT_FAIL_ENTRY:
        return fail(f, 0, "the CPU refused to enter the guest, hardware reason 0x%llx",
                    (unsigned long long)m->run->fail_entry.hardware_entry_failure_reason);
    default:
        return fail(f, 0, "unexpected exit %u from the guest", m->run->exit_reason);
    }
}

int machine_run(struct machine *m, volatile int *stage, struct failure *f)
{
    for (;;) {
        int more;

        if (ioctl(m->vcpu, KVM_RUN, 0)) {
            if (errno == EINTR || errno == EAGAIN)
                continue;
            return fail(f, errno, "running the guest");
        }
        if (m->run->exit_reason != KVM_EXIT_IO)
            return explain_exit(m, f);
        more = take_output(m, stage, f);
        if (more <= 0)
            return more;
    }
}
