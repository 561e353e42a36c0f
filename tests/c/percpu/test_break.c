/* A breakpoint at every instruction of every sequence: the abort handler runs, memory is unchanged, and the operation then happens once.
 *
 * The traced child does operations on items that it shares with the tracer, which looks at them. For each sequence, and for each instruction
 * from its start to behind its commit: put a breakpoint there, let the child run into it (the kernel has preempted the thread then), look,
 * send it on, see it arrive in the abort handler, look again, let it finish, compare with an undisturbed run. A breakpoint right behind the commit must find the
 * operation done, and no abort. Then the child is killed at each of them. (Single-stepping would restart for ever.) Instructions are where objdump
 * says; on aarch64 they all have four bytes. */
#include <elf.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/uio.h>
#include <sys/user.h>

#include "check.h"

enum { DATA_AT = 4096, VISIBLE = 8192, MOST_INSTRUCTIONS = 64 };

struct descriptor { /* struct rseq_cs */
    uint32_t version, flags;
    uint64_t start, length, abort;
} __attribute__((aligned(32)));
extern const struct descriptor __start_pv_percpu_cs[], __stop_pv_percpu_cs[];

static struct shared {
    _Atomic(int) command, result;
    struct pv_percpu_node nodes[3];
} *shared;
static struct pv_percpu *areas;
static struct pv_percpu_ref counter, list, stack, data;
static struct pv_ring_shape ring;
static int cpu;

#define STEP(name, call)                                \
    static __attribute__((noinline)) int name(void)     \
    {                                                   \
        uint64_t seen = 0;                              \
        struct pv_percpu_node *node;                    \
        void *any;                                      \
        char *record;                                   \
        (void)seen, (void)node, (void)any, (void)record;\
        return call;                                    \
    }
STEP(step_add, (int)pv_seq_add(counter, 1))
STEP(step_load, (int)pv_seq_load(counter, &seen) + (int)seen)
STEP(step_store, (int)pv_seq_store(counter, 77))
STEP(step_cas, (int)pv_seq_cas(counter, 41, 43, &seen))
STEP(step_push, (int)pv_seq_push(list, &shared->nodes[2]))
STEP(step_pop, (int)pv_seq_pop(list, &node))
STEP(step_take, (int)pv_seq_take(list, &node))
STEP(step_stack_push, (int)pv_seq_stack_push(stack, 7, &shared->nodes[2]))
STEP(step_stack_pop, (int)pv_seq_stack_pop(stack, &any))
STEP(step_reserve, (int)pv_seq_reserve(&ring, 64, 65, &record, &seen))
STEP(step_pad, (int)pv_seq_pad(&ring, 128, 4096, 99))
STEP(step_put4, (int)pv_seq_put4(ring.control, ring.data, 128, (const uint64_t[4]){1, 2, 3, 4}))

/* `scratch`: where a sequence may write before its commit, because nobody looks there yet. */
static const struct step {
    const char *name;
    int (*run)(void);
    unsigned scratch, scratch_bytes;
} STEPS[] = {
    {"add", step_add, 0, 0},
    {"load", step_load, 0, 0},
    {"store", step_store, 0, 0},
    {"cas", step_cas, 0, 0},
    {"push", step_push, 0, 0},
    {"pop", step_pop, 0, 0},
    {"take", step_take, 0, 0},
    {"stack_push", step_stack_push, 64 + 3 * 8, 8},
    {"stack_pop", step_stack_pop, 0, 0},
    {"reserve", step_reserve, DATA_AT, 4096},
    {"pad", step_pad, DATA_AT, 4096},
    {"put4", step_put4, DATA_AT, 4096},
};
enum { COUNT = sizeof STEPS / sizeof *STEPS };

/* ---- the child --------------------------------------------------------------------------------------------------- */

static void be_traced(void)
{
    CHECK(!ptrace(PTRACE_TRACEME, 0, NULL, NULL));
    for (;;) {
        raise(SIGSTOP);
        shared->result = STEPS[shared->command].run();
    }
}

/* ---- the tracer -------------------------------------------------------------------------------------------------- */

static uint64_t addresses[1 << 20];
static unsigned address_count;

#if defined(__x86_64__)
static void read_addresses(void)
{
    char line[512], command[64];
    FILE *listing;

    snprintf(command, sizeof command, "objdump -d --no-show-raw-insn /proc/%d/exe", (int)getpid());
    listing = popen(command, "re");
    CHECK(listing);
    while (fgets(line, sizeof line, listing) && address_count < sizeof addresses / sizeof *addresses)
        if (strstr(line, ":\t"))
            addresses[address_count++] = strtoull(line, NULL, 16);
    CHECK(pclose(listing) == 0 && address_count > 100);
}
#else /* every instruction has four bytes */
static void read_addresses(void)
{
    for (const struct descriptor *d = __start_pv_percpu_cs; d < __stop_pv_percpu_cs; d++)
        for (uint64_t at = d->start; at < d->start + d->length; at += 4)
            addresses[address_count++] = at;
}
#endif

static unsigned boundaries(const struct descriptor *sequence, uint64_t *out)
{
    unsigned count = 0;

    for (unsigned i = 0; i < address_count; i++)
        if (addresses[i] >= sequence->start && addresses[i] < sequence->start + sequence->length) {
            CHECK(count < MOST_INSTRUCTIONS);
            out[count++] = addresses[i];
        }
    return count;
}

/* The sequence that was inlined into a step: the only one that starts inside it. */
static const struct descriptor *sequence_of(const struct step *step)
{
    const struct descriptor *best = NULL;

    for (const struct descriptor *d = __start_pv_percpu_cs; d < __stop_pv_percpu_cs; d++)
        if (d->start >= (uintptr_t)step->run && (!best || d->start < best->start))
            best = d;
    CHECK(best && best->start - (uintptr_t)step->run < 256);
    return best;
}

static void reset(void)
{
    char *area = pv_percpu_at(counter, (uint32_t)cpu);
    uint64_t *words = (uint64_t *)pv_percpu_at(stack, (uint32_t)cpu);

    memset(area, 0, VISIBLE);
    *(uint64_t *)area = 41;
    shared->nodes[0].next = &shared->nodes[1];
    shared->nodes[1].next = NULL;
    *(void **)pv_percpu_at(list, (uint32_t)cpu) = &shared->nodes[0];
    words[0] = 2;
    words[1] = words[2] = (uintptr_t)&shared->nodes[0];
    *(uint64_t *)pv_percpu_at(ring.control, (uint32_t)cpu) = 128;
    shared->result = -1;
}

static void snapshot(unsigned char *out, const struct step *without_scratch)
{
    memcpy(out, pv_percpu_at(counter, (uint32_t)cpu), VISIBLE);
    if (without_scratch)
        memset(out + without_scratch->scratch, 0, without_scratch->scratch_bytes);
}

static void wait_for(pid_t child, int wanted)
{
    int status;

    CHECK(waitpid(child, &status, 0) == child);
    if (!WIFSTOPPED(status) || WSTOPSIG(status) != wanted)
        fprintf(stderr, "status %x, wanted signal %d\n", (unsigned)status, wanted);
    CHECK(WIFSTOPPED(status) && WSTOPSIG(status) == wanted);
}

static void resume(pid_t child)
{
    CHECK(!ptrace(PTRACE_CONT, child, NULL, NULL));
}

#if defined(__x86_64__)
#define PC(registers) (registers).rip
#define TRAP_BYTES 1 /* the trap leaves the counter behind itself */
#define WITH_TRAP(word) (((word) & ~0xffL) | 0xcc)
#else
#define PC(registers) (registers).pc
#define TRAP_BYTES 0
#define WITH_TRAP(word) (((word) & ~0xffffffffL) | 0xd4200000)
#endif

static struct user_regs_struct registers_of(pid_t child)
{
    struct user_regs_struct registers;
    struct iovec all = {&registers, sizeof registers};

    CHECK(!ptrace(PTRACE_GETREGSET, child, NT_PRSTATUS, &all));
    return registers;
}

static void set_pc(pid_t child, struct user_regs_struct registers, uint64_t pc)
{
    struct iovec all = {&registers, sizeof registers};

    PC(registers) = pc;
    CHECK(!ptrace(PTRACE_SETREGSET, child, NT_PRSTATUS, &all));
}

static pid_t start_child(void)
{
    pid_t child = fork();

    CHECK(child >= 0);
    if (!child)
        be_traced();
    wait_for(child, SIGSTOP);
    return child;
}

/* Runs the child into a breakpoint, takes that away again, and puts the child before the instruction. */
static void run_into(pid_t child, uint64_t address)
{
    long word = ptrace(PTRACE_PEEKTEXT, child, address, NULL);
    struct user_regs_struct registers;

    CHECK(!ptrace(PTRACE_POKETEXT, child, address, WITH_TRAP(word)));
    resume(child);
    wait_for(child, SIGTRAP);
    registers = registers_of(child);
    CHECK(PC(registers) == address + TRAP_BYTES);
    set_pc(child, registers, address);
    CHECK(!ptrace(PTRACE_POKETEXT, child, address, word));
}

static void break_at(pid_t child, const struct step *step, const struct descriptor *sequence, uint64_t address,
                     const unsigned char *done, int result)
{
    unsigned char before[VISIBLE], now[VISIBLE];

    reset();
    snapshot(before, step);
    run_into(child, address);
    snapshot(now, step);
    CHECK(!memcmp(before, now, VISIBLE));
    run_into(child, sequence->abort);
    snapshot(now, step);
    CHECK(!memcmp(before, now, VISIBLE));
    resume(child);
    wait_for(child, SIGSTOP);
    snapshot(now, NULL);
    CHECK(!memcmp(done, now, VISIBLE) && shared->result == result);
}

static void break_behind(pid_t child, const struct descriptor *sequence, const unsigned char *done, int result)
{
    unsigned char now[VISIBLE];

    reset();
    run_into(child, sequence->start + sequence->length);
    snapshot(now, NULL);
    CHECK(!memcmp(done, now, VISIBLE));
    resume(child);
    wait_for(child, SIGSTOP);
    snapshot(now, NULL);
    CHECK(!memcmp(done, now, VISIBLE) && shared->result == result);
}

/* Kills the child before an instruction: what it was doing has not happened, and the next one finds everything in order. */
static pid_t kill_at(pid_t child, const struct step *step, uint64_t address)
{
    unsigned char before[VISIBLE], now[VISIBLE];
    int status;

    reset();
    snapshot(before, step);
    run_into(child, address);
    CHECK(!kill(child, SIGKILL) && waitpid(child, &status, 0) == child && WIFSIGNALED(status));
    snapshot(now, step);
    CHECK(!memcmp(before, now, VISIBLE));
    return start_child();
}

static unsigned break_everywhere(pid_t *traced, const struct step *step)
{
    const struct descriptor *sequence = sequence_of(step);
    uint64_t places[MOST_INSTRUCTIONS];
    unsigned count = boundaries(sequence, places);
    unsigned char done[VISIBLE];
    pid_t child = *traced;
    int result;

    shared->command = (int)(step - STEPS);
    reset();
    resume(child);
    wait_for(child, SIGSTOP);
    result = shared->result;
    CHECK(result == (step->run == step_load ? 41 : PV_DONE));
    snapshot(done, NULL);
    CHECK(count >= 4 && places[0] == sequence->start);
    for (unsigned i = 0; i < count; i++)
        break_at(child, step, sequence, places[i], done, result);
    break_behind(child, sequence, done, result);
    for (unsigned i = 0; i < count; i++)
        *traced = kill_at(*traced, step, places[i]);
    return count;
}

static void make_items(void)
{
    areas = areas_for(0);
    counter = get(areas, item(areas, 8));
    list = get(areas, item(areas, 8));
    stack = get(areas, item(areas, 64));
    ring.control = get(areas, item(areas, 128));
    data = get(areas, item(areas, 4096));
    ring.data = data.base - ring.control.base;
    ring.size = 4096;
    CHECK(stack.base - counter.base == 64 && data.base - counter.base == DATA_AT);
    shared = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(shared != MAP_FAILED);
}

int main(void)
{
    cpu_set_t set;
    unsigned total = 0;
    int cpus[1] = {0}, status;
    pid_t child;

    make_items();
    usable_cpus(cpus, 1);
    cpu = cpus[0];
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    CHECK(!sched_setaffinity(0, sizeof set, &set));
    read_addresses();
    child = start_child();
    for (unsigned i = 0; i < COUNT; i++) {
        unsigned count = break_everywhere(&child, &STEPS[i]);

        printf("%-10s %2u instructions\n", STEPS[i].name, count);
        total += count;
    }
    printf("%u breakpoints inside %d sequences: each aborted, none left a trace; killed there, neither\n", total, COUNT);
    CHECK(!kill(child, SIGKILL) && waitpid(child, &status, 0) == child);
    pv_percpu_destroy(areas);
    return 0;
}
