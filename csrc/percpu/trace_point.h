/* Trace points: what a hot path calls. Needs nothing but this header; off, a point is one load and one branch.
 *
 *      uint64_t start = PV_TRACE_NOW();                   0 while tracing is off
 *      ...
 *      PV_TRACE_SPAN(PV_TRACE_FAULT, start, address);     or, for a moment: PV_TRACE(PV_TRACE_INSTANT, PV_TRACE_VSOCK, bytes, 0)
 *
 * Each extension module has a `pv_trace_hook` of its own; whoever has a trace (trace.h) hands its hook to each module by pv_trace_use.
 */
#ifndef PV_TRACE_POINT_H
#define PV_TRACE_POINT_H

#include <stddef.h>
#include <stdint.h>

/* What happened; the words that a viewer shows are in trace.c. */
enum pv_trace_name {
    PV_TRACE_OTHER,
    PV_TRACE_FAULT,     /* a page fault served; argument: offset in guest RAM */
    PV_TRACE_VSOCK,     /* a turn of the vsock device; argument: events */
    PV_TRACE_BLOCK,     /* a block request; argument: bytes */
    PV_TRACE_FILTER,    /* one filter's part of it; argument: the filter's number */
    PV_TRACE_PREEMPTED, /* a context gave its worker up; argument: the context */
    PV_TRACE_NAMES,
};
enum pv_trace_phase { PV_TRACE_COMPLETE, PV_TRACE_INSTANT };

struct pv_trace_hook {
    void (*put)(void *context, enum pv_trace_phase phase, enum pv_trace_name name, uint64_t argument, uint64_t start);
    void *context;
};

__attribute__((weak, visibility("hidden"))) const struct pv_trace_hook *pv_trace_hook;

static inline void pv_trace_use(const struct pv_trace_hook *hook)
{
    __atomic_store_n(&pv_trace_hook, hook, __ATOMIC_RELEASE);
}

/* The CPU's own clock, in ticks. */
static inline uint64_t pv_trace_ticks(void)
{
#if defined(__x86_64__)
    return __builtin_ia32_rdtsc();
#elif defined(__aarch64__)
    uint64_t ticks;

    __asm__ volatile("mrs %0, cntvct_el0" : "=r"(ticks));
    return ticks;
#else
#error "which clock has this CPU?"
#endif
}

#define PV_TRACE_HOOK() __atomic_load_n(&pv_trace_hook, __ATOMIC_RELAXED)
#define PV_TRACE_NOW() (__builtin_expect(PV_TRACE_HOOK() != NULL, 0) ? pv_trace_ticks() : 0)
#define PV_TRACE(phase, name, argument, start)                                          \
    do {                                                                                \
        const struct pv_trace_hook *hook_ = PV_TRACE_HOOK();                            \
                                                                                        \
        if (__builtin_expect(hook_ != NULL, 0))                                         \
            hook_->put(hook_->context, (phase), (name), (uint64_t)(argument), (start)); \
    } while (0)
#define PV_TRACE_SPAN(name, start, argument)                             \
    do {                                                                 \
        if (__builtin_expect((start) != 0, 0))                           \
            PV_TRACE(PV_TRACE_COMPLETE, (name), (argument), (start));    \
    } while (0)

#endif
