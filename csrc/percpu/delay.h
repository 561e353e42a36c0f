/* The second embodiment: code that is not restarted but not preempted either. Preemption waits for it.
 *
 * Theory of operation
 * -------------------
 * What is preempted here are contexts (context.h) and the project's own threads, by a signal: the end of a time slice, or the balancer that wants to
 * move a context to another CPU. Code marked PV_NONPREEMPTIBLE lies in a section of its own. The handler of the signal looks where it
 * interrupted the thread:
 *
 *      in none of the ranges, depth 0  ->  preempt now (the callback: switch to another context)
 *      in one, or depth > 0            ->  pending = 1, return: the code goes on
 *
 * and the end of the non-preemptible code looks at `pending` and does what was put off. Each call goes
 *
 *      caller         body, in the section            caller again
 *      ------------   -----------------------------   ------------------------------
 *      call body      ... all of it ...; ret          cmp pending, 0; jne honour
 *                     `- signal: pending = 1 -----------'  `- signal: preempt at once, and pending = 0: it is honoured
 *
 * The test of `pending` is one instruction, and outside the section. So a signal that comes before it is seen by it, one that comes after
 * it finds nothing to wait for, and none is forgotten: the epilogue itself needs no protection.
 *
 * Nested sections: a body that calls another body stays in the ranges. Code that calls out of the section (to memcpy, say) stands between
 * pv_delay_enter and pv_delay_leave, which nest and count `depth`; only the outermost honours.
 *
 * A kernel's own preemption needs no delaying: it never runs another of *our* contexts on this worker.
 *
 * Thread state is thread-local to the worker; contexts never keep its address, since they move.
 *
 * Source: US 10795813.
 */
#ifndef PV_DELAY_H
#define PV_DELAY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define PV_DELAY_RANGES 8
#define PV_NONPREEMPTIBLE __attribute__((section("pv_nonpreemptible"), noinline, no_stack_protector))

struct pv_delay_state {
    uint32_t pending, depth;
    uint64_t *area; /* of the worker that this thread is: what pv_delay_add adds to */
    uint64_t delayed, honoured, at_once;
};
extern __thread struct pv_delay_state pv_delay_state __attribute__((tls_model("initial-exec"), visibility("hidden")));
extern int pv_delay_signal __attribute__((visibility("hidden"))); /* the preemption signal; 0: none yet */
extern ptrdiff_t pv_delay_offset __attribute__((visibility("hidden"))); /* of it, from the thread pointer */

/* Called to preempt: from the signal handler (the interrupted registers lie on the same stack) or from the end of a section; with the
 * signal blocked in the first case. */
typedef void (*pv_delay_preempt)(void);

/* Makes `signal_number` the preemption signal of this process. What sigaction(2) says. */
int pv_delay_install(int signal_number, pv_delay_preempt preempt, int *err);
/* Another module's non-preemptible code. ENOSPC: PV_DELAY_RANGES are known. Before any signal. */
int pv_delay_add_range(const void *start, const void *stop, int *err);

/* Non-preemptible from here to pv_delay_leave, wherever the code goes; nests. Not to be left by anything else. */
void pv_delay_enter(void);
void pv_delay_leave(void);

void pv_delay_honour(void); /* the slow half of pv_delay_end */
void pv_delay_add_body(int64_t n, uint32_t word);

/* Behind every call of a non-preemptible body. */
static inline void pv_delay_end(void)
{
#if defined(__x86_64__)
    __asm__ goto("cmpl $0, %%fs:(%[offset])\n\tjne %l[honour]" : : [offset] "r"(pv_delay_offset) : "memory", "cc" : honour);
    return;
honour:
    pv_delay_honour();
#else
    char *thread; /* asked for each time: a context that was moved has another one */

    __asm__ volatile("mrs %0, tpidr_el0" : "=r"(thread));
    if (__builtin_expect(*(volatile uint32_t *)(thread + pv_delay_offset) != 0, 0))
        pv_delay_honour();
#endif
}

/* Adds to a word of the area of the worker that the context runs on: read, add, write, by plain instructions. */
static inline void pv_delay_add(int64_t n, uint32_t word)
{
    pv_delay_add_body(n, word);
    pv_delay_end();
}

#endif
