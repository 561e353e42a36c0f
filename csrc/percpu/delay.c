/* See delay.h. */
#include "delay.h"

#include <errno.h>
#include <signal.h>
#include <ucontext.h>

struct range {
    uintptr_t start, stop;
};

/* The linker's names for the ends of the section. */
extern const char __start_pv_nonpreemptible[] __attribute__((visibility("hidden")));
extern const char __stop_pv_nonpreemptible[] __attribute__((visibility("hidden")));

__thread struct pv_delay_state pv_delay_state __attribute__((tls_model("initial-exec")));
ptrdiff_t pv_delay_offset;
int pv_delay_signal;

static struct range ranges[PV_DELAY_RANGES];
static unsigned range_count;
static pv_delay_preempt preempt_now;

__attribute__((constructor)) static void find_offset(void)
{
    pv_delay_offset = (char *)&pv_delay_state - (char *)__builtin_thread_pointer();
}

/* ---- non-preemptible code ---------------------------------------------------------------------------------------- */

PV_NONPREEMPTIBLE void pv_delay_add_body(int64_t n, uint32_t word)
{
    uint64_t *place = pv_delay_state.area + word;
    uint64_t value = *(volatile uint64_t *)place;

    __asm__ volatile("" : "+r"(value), "+r"(place)); /* three steps, as longer code would have them */
    *(volatile uint64_t *)place = value + (uint64_t)n;
}

PV_NONPREEMPTIBLE void pv_delay_enter(void)
{
    pv_delay_state.depth++;
}

PV_NONPREEMPTIBLE static void leave_body(void)
{
    pv_delay_state.depth--;
}

void pv_delay_leave(void)
{
    leave_body();
    pv_delay_end();
}

/* ---- the signal -------------------------------------------------------------------------------------------------- */

static uintptr_t interrupted_at(const ucontext_t *context)
{
#if defined(__x86_64__)
    return (uintptr_t)context->uc_mcontext.gregs[REG_RIP];
#elif defined(__aarch64__)
    return (uintptr_t)context->uc_mcontext.pc;
#else
#error "where is the program counter?"
#endif
}

static bool is_nonpreemptible(uintptr_t pc)
{
    for (unsigned i = 0; i < range_count; i++)
        if (pc - ranges[i].start < ranges[i].stop - ranges[i].start)
            return true;
    return false;
}

/* Across a preemption the thread may be another one, and then so is errno's place: never look it up once for both. */
static __attribute__((noinline)) int get_errno(void)
{
    __asm__ volatile("");
    return errno;
}

static __attribute__((noinline)) void set_errno(int value)
{
    __asm__ volatile("");
    errno = value;
}

static void on_preemption(int number, siginfo_t *info, void *context)
{
    int saved = get_errno();

    (void)number;
    (void)info;
    if (pv_delay_state.depth || is_nonpreemptible(interrupted_at(context))) {
        pv_delay_state.pending = 1;
        pv_delay_state.delayed++;
    } else {
        pv_delay_state.pending = 0;
        pv_delay_state.at_once++;
        preempt_now();
    }
    set_errno(saved);
}

/* Whether there is something to do now: an inner section's end leaves it to the outer one's. A signal that comes here sets `pending`
 * again, for a preemption that is about to happen anyway: the next section's end then finds one too many, which harms nobody. */
PV_NONPREEMPTIBLE static bool honour_body(void)
{
    if (pv_delay_state.depth)
        return false;
    pv_delay_state.pending = 0;
    pv_delay_state.honoured++;
    return true;
}

void pv_delay_honour(void)
{
    if (honour_body())
        preempt_now();
}

int pv_delay_add_range(const void *start, const void *stop, int *err)
{
    if (range_count == PV_DELAY_RANGES) {
        *err = ENOSPC;
        return -1;
    }
    ranges[range_count++] = (struct range){(uintptr_t)start, (uintptr_t)stop};
    return 0;
}

int pv_delay_install(int signal_number, pv_delay_preempt preempt, int *err)
{
    struct sigaction action = {.sa_sigaction = on_preemption, .sa_flags = SA_SIGINFO | SA_RESTART};

    preempt_now = preempt;
    pv_delay_signal = signal_number;
    sigemptyset(&action.sa_mask);
    if (!range_count && pv_delay_add_range(__start_pv_nonpreemptible, __stop_pv_nonpreemptible, err))
        return -1;
    if (sigaction(signal_number, &action, NULL)) {
        *err = errno;
        return -1;
    }
    return 0;
}
