/* Delayed preemption: the signal at every instruction of non-preemptible code, of its caller and of its epilogue.
 *
 * The preemption itself writes to the same word by the same plain read, add and write: were it ever let in between those of the interrupted
 * code, an addition would be lost. The tracer steps the child to the k-th instruction of a call, delivers the signal exactly there, and lets it finish:
 * for every k, with one section, with nested ones, and with code outside the section that pv_delay_enter protects. */
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/user.h>

#include "check.h"
#include "percpu/delay.h"

enum { OURS = 1000 };

static uint64_t area[8];
static uint64_t preemptions;

/* What another context would do. */
static void preempt(void)
{
    uint64_t value = *(volatile uint64_t *)&area[0];

    preemptions++;
    *(volatile uint64_t *)&area[0] = value + OURS;
}

static __attribute__((noinline)) void one_section(void)
{
    pv_delay_add(1, 0);
}

/* Outer code in the section that has an inner section with an end of its own. */
PV_NONPREEMPTIBLE static void outer_body(void)
{
    uint64_t value = *(volatile uint64_t *)&area[0];

    pv_delay_add_body(5, 1);
    *(volatile uint64_t *)&area[0] = value + 1;
}

static __attribute__((noinline)) void nested_in_the_section(void)
{
    outer_body();
    pv_delay_end();
}

static __attribute__((noinline)) void nested_by_depth(void)
{
    uint64_t value;

    pv_delay_enter();
    value = *(volatile uint64_t *)&area[0];
    pv_delay_add(5, 1);
    pv_delay_enter();
    pv_delay_leave();
    *(volatile uint64_t *)&area[0] = value + 1;
    pv_delay_leave();
}

static void (*const CALLS[])(void) = {one_section, nested_in_the_section, nested_by_depth};
enum { COUNT = sizeof CALLS / sizeof *CALLS };

/* ---- the child --------------------------------------------------------------------------------------------------- */

static struct report {
    _Atomic(unsigned) command;
    uint64_t preemptions, first, second, delayed, at_once, depth;
} *report;

static _Noreturn void child_main(void)
{
    int err;

    CHECK(!pv_delay_install(SIGUSR1, preempt, &err));
    pv_delay_state.area = area;
    CHECK(!ptrace(PTRACE_TRACEME, 0, NULL, NULL));
    for (;;) {
        raise(SIGSTOP);
        area[0] = area[1] = preemptions = 0;
        pv_delay_state = (struct pv_delay_state){.area = area};
        CALLS[report->command]();
        report->preemptions = preemptions;
        report->first = area[0];
        report->second = area[1];
        report->delayed = pv_delay_state.delayed;
        report->at_once = pv_delay_state.at_once;
        report->depth = pv_delay_state.depth;
    }
}

/* ---- the tracer -------------------------------------------------------------------------------------------------- */

static void wait_for(pid_t child, int wanted)
{
    int status;

    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFSTOPPED(status) && WSTOPSIG(status) == wanted);
}

static struct user_regs_struct registers_of(pid_t child)
{
    struct user_regs_struct registers;

    CHECK(!ptrace(PTRACE_GETREGS, child, NULL, &registers));
    return registers;
}

/* Runs the child to the first instruction of the call; where that returns to. */
static uint64_t run_to(pid_t child, uintptr_t address)
{
    long word = ptrace(PTRACE_PEEKTEXT, child, address, NULL);
    struct user_regs_struct registers;

    CHECK(!ptrace(PTRACE_POKETEXT, child, address, (word & ~0xffL) | 0xcc));
    CHECK(!ptrace(PTRACE_CONT, child, NULL, NULL));
    wait_for(child, SIGTRAP);
    registers = registers_of(child);
    CHECK(registers.rip == address + 1);
    registers.rip = address;
    CHECK(!ptrace(PTRACE_SETREGS, child, NULL, &registers));
    CHECK(!ptrace(PTRACE_POKETEXT, child, address, word));
    return (uint64_t)ptrace(PTRACE_PEEKDATA, child, registers.rsp, NULL);
}

/* The signal before the k-th instruction of the call; 0 when it has no k-th. */
static int signal_at(pid_t child, unsigned call, int k)
{
    uint64_t back;

    report->command = call;
    back = run_to(child, (uintptr_t)CALLS[call]);
    for (int i = 0; i < k; i++) {
        CHECK(!ptrace(PTRACE_SINGLESTEP, child, NULL, NULL));
        wait_for(child, SIGTRAP);
        if (registers_of(child).rip == back)
            k = -1; /* as if it came right behind the call */
    }
    CHECK(!ptrace(PTRACE_CONT, child, NULL, SIGUSR1));
    wait_for(child, SIGSTOP);
    CHECK(report->preemptions >= 1 && report->preemptions <= 2 && report->depth == 0);
    CHECK(report->first == 1 + report->preemptions * OURS && report->second == (call ? 5 : 0));
    CHECK(report->delayed + report->at_once == 1);
    return k >= 0;
}

int main(void)
{
    static const char *const NAMES[] = {"one section", "nested in the section", "nested by depth"};
    int status;
    pid_t child;

    report = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(report != MAP_FAILED);
    child = fork();
    CHECK(child >= 0);
    if (!child)
        child_main();
    wait_for(child, SIGSTOP);
    for (unsigned call = 0; call < COUNT; call++) {
        int k = 0, delayed = 0;

        for (int more = 1; more; k++) {
            more = signal_at(child, call, k);
            delayed += (int)report->delayed;
        }
        printf("%-22s a signal before each of %2d instructions: %2d delayed, %2d at once\n", NAMES[call], k, delayed, k - delayed);
        CHECK(delayed >= 4 && delayed < k);
    }
    CHECK(!kill(child, SIGKILL) && waitpid(child, &status, 0) == child);
    return 0;
}
