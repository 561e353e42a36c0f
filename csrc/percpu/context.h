/* Contexts: light coroutines with stacks of their own, run by one worker thread on each CPU.
 *
 * Theory of operation
 * -------------------
 *      RUNNING --pv_context_yield, preemption--> READY (in its worker's queue) --> RUNNING
 *         |---pv_context_wait(fd)---> WAITING (its worker polls fd) --readable--> READY
 *         `---its function returns--> ENDED
 *
 *      pv_context_assign(context, worker): it goes on there, from READY or WAITING at once, from RUNNING when it next gives its worker up
 *
 * A worker that has no READY context sleeps in poll(2) on an eventfd and on what its contexts wait for. Its scheduler runs on the
 * thread's own stack. A context holds refs of per-CPU items across its moves (percpu.h); it must not hold addresses of thread-local things, libc's neither, across a
 * call of this file (and, where contexts are preempted by a signal (delay.h), not at all).
 *
 * Preemption: pv_context_preempt is a callback for pv_delay_install. A worker's scheduler counts as non-preemptible: depth is 1 from
 * before a context switches away until behind the switch to the next one.
 *
 * A context waits for one descriptor at a time; a worker polls up to 1024 of them.
 *
 * Functions for contexts may be called by a context only; the others by any thread.
 */
#ifndef PV_CONTEXT_H
#define PV_CONTEXT_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#define PV_CONTEXT_STACK (64 << 10)
#define PV_WORKER_WORDS 8

struct pv_workers;

enum pv_context_state { PV_CONTEXT_READY, PV_CONTEXT_RUNNING, PV_CONTEXT_WAITING, PV_CONTEXT_ENDED };

struct pv_context {
    void *sp; /* while it does not run */
    void *stack;
    void (*run)(void *argument);
    void *argument;
    enum pv_context_state state;
    int fd;          /* WAITING: for this one */
    bool in_handler; /* it gave its worker up inside the signal's handler: going back there unblocks the signal */
    unsigned worker, target;
    struct pv_context *next;
    uint64_t moves;
};

/* Changes stacks: keeps the caller's in *from, goes on where `to` stopped. */
void pv_context_switch(void **from, void *to);
/* Makes `stack` one on which pv_context_switch starts run(argument); the stack pointer to switch to. `run` never returns. */
void *pv_context_prepare(void *stack, size_t bytes, void (*run)(void *argument), void *argument);

/* Starts `count` workers, worker i on CPU cpus[i]; `cpus` NULL: not bound. ENOMEM, EAGAIN, ... */
int pv_workers_start(unsigned count, const int *cpus, struct pv_workers **out, int *err);
/* Waits until every context has ended, ends the workers and frees all. */
void pv_workers_stop(struct pv_workers *workers);
/* A new context on `worker`. It frees itself at its end. ENOMEM. */
int pv_context_start(struct pv_workers *workers, unsigned worker, void (*run)(void *argument), void *argument,
                     struct pv_context **out, int *err);
/* To be moved; `context` must not have ended. */
void pv_context_assign(struct pv_workers *workers, struct pv_context *context, unsigned worker);
/* The worker's own area, in which its contexts add by pv_delay_add: PV_WORKER_WORDS words, zero at first. */
uint64_t *pv_worker_area(const struct pv_workers *workers, unsigned worker);
/* For a thread that sends the preemption signal. */
pthread_t pv_worker_thread(const struct pv_workers *workers, unsigned worker);

/* ---- for contexts ---- */
struct pv_context *pv_context_self(void);
unsigned pv_context_worker(void);
void pv_context_yield(void);
void pv_context_wait(int fd); /* until it is readable, or the context was moved */
void pv_context_preempt(void);

#endif
