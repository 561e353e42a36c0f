/* See context.h. The switch, and the workers. */
#include "context.h"

#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "delay.h"
#include "rseq.h"

#define WAITING_MOST 1024

/* ---- the switch -------------------------------------------------------------------------------------------------- */

#if defined(__x86_64__)
/* The callee's registers and the floating-point control words; everything else is the caller's care. */
__asm__(".pushsection pv_nonpreemptible, \"ax\"\n"
        ".globl pv_context_switch\n.hidden pv_context_switch\n.type pv_context_switch, @function\n"
        "pv_context_switch:\n\t"
        "pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\t"
        "subq $8, %rsp\n\tstmxcsr (%rsp)\n\tfnstcw 4(%rsp)\n\t"
        "movq %rsp, (%rdi)\n\t"
        "movq %rsi, %rsp\n\t"
        "ldmxcsr (%rsp)\n\tfldcw 4(%rsp)\n\taddq $8, %rsp\n\t"
        "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\t"
        "ret\n"
        ".size pv_context_switch, . - pv_context_switch\n"
        "pv_context_first:\n\t" /* the first return of a new context: rbx and r12 are prepared */
        "movq %rbx, %rdi\n\txorl %ebp, %ebp\n\tcallq *%r12\n\tud2\n"
        ".popsection\n");
extern const char pv_context_first[] __attribute__((visibility("hidden")));

void *pv_context_prepare(void *stack, size_t bytes, void (*run)(void *argument), void *argument)
{
    uint64_t *sp = (uint64_t *)(((uintptr_t)stack + bytes) & ~15UL) - 10;

    memset(sp, 0, 10 * sizeof *sp);
    sp[0] = 0x1f80 | 0x037fULL << 32; /* mxcsr, control word: as the ABI wants them at a function's start */
    sp[4] = (uintptr_t)run;           /* r15 r14 r13 r12 rbx rbp */
    sp[5] = (uintptr_t)argument;
    sp[7] = (uintptr_t)pv_context_first;
    return sp;
}
#elif defined(__aarch64__)
__asm__(".pushsection pv_nonpreemptible, \"ax\"\n"
        ".globl pv_context_switch\n.hidden pv_context_switch\n.type pv_context_switch, %function\n"
        "pv_context_switch:\n\t"
        "sub sp, sp, #160\n\t"
        "stp x19, x20, [sp]\n\tstp x21, x22, [sp, #16]\n\tstp x23, x24, [sp, #32]\n\tstp x25, x26, [sp, #48]\n\t"
        "stp x27, x28, [sp, #64]\n\tstp x29, x30, [sp, #80]\n\tstp d8, d9, [sp, #96]\n\tstp d10, d11, [sp, #112]\n\t"
        "stp d12, d13, [sp, #128]\n\tstp d14, d15, [sp, #144]\n\t"
        "mov x9, sp\n\tstr x9, [x0]\n\tmov sp, x1\n\t"
        "ldp x19, x20, [sp]\n\tldp x21, x22, [sp, #16]\n\tldp x23, x24, [sp, #32]\n\tldp x25, x26, [sp, #48]\n\t"
        "ldp x27, x28, [sp, #64]\n\tldp x29, x30, [sp, #80]\n\tldp d8, d9, [sp, #96]\n\tldp d10, d11, [sp, #112]\n\t"
        "ldp d12, d13, [sp, #128]\n\tldp d14, d15, [sp, #144]\n\t"
        "add sp, sp, #160\n\tret\n"
        ".size pv_context_switch, . - pv_context_switch\n"
        "pv_context_first:\n\tmov x0, x20\n\tmov x29, #0\n\tblr x19\n\tbrk #1\n"
        ".popsection\n");
extern const char pv_context_first[] __attribute__((visibility("hidden")));

void *pv_context_prepare(void *stack, size_t bytes, void (*run)(void *argument), void *argument)
{
    uint64_t *sp = (uint64_t *)(((uintptr_t)stack + bytes) & ~15UL) - 20;

    memset(sp, 0, 20 * sizeof *sp);
    sp[0] = (uintptr_t)run; /* x19, x20; x30 */
    sp[1] = (uintptr_t)argument;
    sp[11] = (uintptr_t)pv_context_first;
    return sp;
}
#else
#error "no contexts for this architecture"
#endif

/* ---- workers ----------------------------------------------------------------------------------------------------- */

struct worker {
    struct pv_workers *all;
    unsigned number;
    pthread_t thread;
    int wake; /* eventfd: there is a new context, an order to move one, or the end */
    void *sp; /* the scheduler's, while a context runs */
    struct pv_context *current, *waiting;
    bool signal_blocked; /* the preemption signal, on this thread: since a context gave up inside its handler */
    uint64_t area[PV_WORKER_WORDS] __attribute__((aligned(64)));
    pthread_mutex_t lock;
    struct pv_context *first, **last; /* READY; under the lock */
};

struct pv_workers {
    unsigned count;
    _Atomic(unsigned) contexts;
    _Atomic(bool) stopping;
    struct worker *workers;
};

static __thread struct worker *this_worker __attribute__((tls_model("initial-exec")));

/* Never inlined: behind a switch the thread may be another one. */
static __attribute__((noinline)) struct worker *worker_here(void)
{
    __asm__ volatile("");
    return this_worker;
}

static void wake(const struct worker *worker)
{
    eventfd_write(worker->wake, 1);
}

static void enqueue(struct worker *worker, struct pv_context *context)
{
    pthread_mutex_lock(&worker->lock);
    pv_slice_begin(); /* who is preempted here makes the balancer wait */
    context->next = NULL;
    context->worker = worker->number;
    *worker->last = context;
    worker->last = &context->next;
    pthread_mutex_unlock(&worker->lock);
    pv_slice_end();
}

/* To the queue of the worker that it shall run on. */
static void make_ready(struct worker *here, struct pv_context *context)
{
    struct worker *there = &here->all->workers[__atomic_load_n(&context->target, __ATOMIC_ACQUIRE)];

    context->state = PV_CONTEXT_READY;
    context->moves += there != here;
    enqueue(there, context);
    if (there != here)
        wake(there);
}

static struct pv_context *dequeue(struct worker *worker)
{
    struct pv_context *context;

    pthread_mutex_lock(&worker->lock);
    pv_slice_begin();
    context = worker->first;
    if (context) {
        worker->first = context->next;
        if (!worker->first)
            worker->last = &worker->first;
    }
    pthread_mutex_unlock(&worker->lock);
    pv_slice_end();
    return context;
}

static void finish(struct worker *here, struct pv_context *context)
{
    munmap(context->stack, PV_CONTEXT_STACK);
    free(context);
    if (!--here->all->contexts)
        for (unsigned i = 0; i < here->all->count; i++)
            wake(&here->all->workers[i]);
}

/* A context that goes back into the signal's handler does so with the signal blocked, as it left: or handlers would pile up on its stack. */
static void set_blocked(struct worker *here, bool blocked)
{
    sigset_t set;

    if (here->signal_blocked == blocked)
        return;
    sigemptyset(&set);
    sigaddset(&set, pv_delay_signal);
    pthread_sigmask(blocked ? SIG_BLOCK : SIG_UNBLOCK, &set, NULL);
    here->signal_blocked = blocked;
}

/* Runs a context until it gives the worker up; then puts it where it wants to be: only now, when nobody is on its stack. */
static void run(struct worker *here, struct pv_context *context)
{
    if (__atomic_load_n(&context->target, __ATOMIC_ACQUIRE) != here->number) { /* assigned elsewhere meanwhile */
        make_ready(here, context);
        return;
    }
    context->state = PV_CONTEXT_RUNNING;
    here->current = context;
    set_blocked(here, context->in_handler);
    pv_context_switch(&here->sp, context->sp);
    here->current = NULL;
    here->signal_blocked = context->in_handler;
    if (context->state == PV_CONTEXT_ENDED) {
        finish(here, context);
    } else if (context->state == PV_CONTEXT_WAITING) {
        context->next = here->waiting;
        here->waiting = context;
    } else {
        make_ready(here, context);
    }
}

/* Sleeps, unless there is a READY context, until something comes; takes those out of `waiting` whose time has come or who were assigned
 * elsewhere (they wait there on: a spurious READY lets them look). */
static void look_around(struct worker *here, int timeout)
{
    struct pollfd polled[WAITING_MOST + 1] = {{here->wake, POLLIN, 0}};
    struct pv_context **link = &here->waiting;
    nfds_t count = 1;
    eventfd_t ignored;

    for (struct pv_context *c = here->waiting; c && count <= WAITING_MOST; c = c->next)
        polled[count++] = (struct pollfd){c->fd, POLLIN, 0};
    if (poll(polled, count, timeout) <= 0)
        return;
    if (polled[0].revents)
        eventfd_read(here->wake, &ignored);
    for (nfds_t i = 1; i < count; i++) {
        struct pv_context *context = *link;

        if (polled[i].revents || __atomic_load_n(&context->target, __ATOMIC_ACQUIRE) != here->number) {
            *link = context->next;
            make_ready(here, context);
        } else {
            link = &context->next;
        }
    }
}

static void *work(void *argument)
{
    struct worker *here = argument;
    struct pv_workers *all = here->all;
    unsigned turns = 0;

    this_worker = here;
    pv_delay_enter();
    pv_delay_state.area = here->area;
    while (!all->stopping || all->contexts) {
        struct pv_context *context = dequeue(here);

        if (context)
            run(here, context);
        if (!context || (++turns % 64 == 0 && here->waiting))
            look_around(here, context ? 0 : -1);
    }
    pv_delay_leave();
    return NULL;
}

/* ---- what contexts call ------------------------------------------------------------------------------------------ */

static void give_up(enum pv_context_state state, bool in_handler)
{
    struct worker *here;

    pv_delay_enter();
    here = worker_here();
    here->current->state = state;
    here->current->in_handler = in_handler;
    pv_context_switch(&here->current->sp, here->sp);
    pv_delay_leave();
}

struct pv_context *pv_context_self(void)
{
    struct pv_context *self;

    pv_delay_enter();
    self = worker_here()->current;
    pv_delay_leave();
    return self;
}

unsigned pv_context_worker(void)
{
    unsigned number;

    pv_delay_enter();
    number = worker_here()->number;
    pv_delay_leave();
    return number;
}

void pv_context_yield(void)
{
    give_up(PV_CONTEXT_READY, false);
}

void pv_context_wait(int fd)
{
    pv_context_self()->fd = fd;
    give_up(PV_CONTEXT_WAITING, false);
}

void pv_context_preempt(void)
{
    const struct worker *here = worker_here();
    sigset_t mask;

    if (!here || !here->current) /* a thread that is no worker, or not yet */
        return;
    /* From the end of a section no signal is blocked, from the handler all of its mask is. */
    pthread_sigmask(SIG_SETMASK, NULL, &mask);
    give_up(PV_CONTEXT_READY, sigismember(&mask, pv_delay_signal) == 1);
}

static void first(void *argument)
{
    struct pv_context *self = argument;

    pv_delay_leave(); /* the scheduler's */
    self->run(self->argument);
    give_up(PV_CONTEXT_ENDED, false);
}

/* ---- making and unmaking ----------------------------------------------------------------------------------------- */

int pv_context_start(struct pv_workers *workers, unsigned worker, void (*run_it)(void *argument), void *argument,
                     struct pv_context **out, int *err)
{
    struct pv_context *context = calloc(1, sizeof *context);
    void *stack = mmap(NULL, PV_CONTEXT_STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);

    if (!context || stack == MAP_FAILED) {
        if (stack != MAP_FAILED)
            munmap(stack, PV_CONTEXT_STACK);
        free(context);
        *err = ENOMEM;
        return -1;
    }
    *context = (struct pv_context){.stack = stack, .run = run_it, .argument = argument, .worker = worker, .target = worker};
    context->sp = pv_context_prepare(stack, PV_CONTEXT_STACK, first, context);
    workers->contexts++;
    if (out)
        *out = context;
    enqueue(&workers->workers[worker], context);
    wake(&workers->workers[worker]);
    return 0;
}

void pv_context_assign(struct pv_workers *workers, struct pv_context *context, unsigned worker)
{
    unsigned before = __atomic_exchange_n(&context->target, worker, __ATOMIC_ACQ_REL);

    if (before != worker)
        wake(&workers->workers[before]);
}

uint64_t *pv_worker_area(const struct pv_workers *workers, unsigned worker)
{
    return workers->workers[worker].area;
}

pthread_t pv_worker_thread(const struct pv_workers *workers, unsigned worker)
{
    return workers->workers[worker].thread;
}

static int start_worker(struct pv_workers *all, unsigned number, const int *cpus)
{
    struct worker *worker = &all->workers[number];
    pthread_attr_t attributes;
    cpu_set_t set;
    int result;

    *worker = (struct worker){.all = all, .number = number, .last = &worker->first};
    worker->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (worker->wake < 0)
        return errno;
    pthread_mutex_init(&worker->lock, NULL);
    pthread_attr_init(&attributes);
    CPU_ZERO(&set);
    if (cpus) {
        CPU_SET(cpus[number], &set);
        pthread_attr_setaffinity_np(&attributes, sizeof set, &set);
    }
    result = pthread_create(&worker->thread, &attributes, work, worker);
    pthread_attr_destroy(&attributes);
    if (result) {
        close(worker->wake);
        pthread_mutex_destroy(&worker->lock);
    }
    return result;
}

int pv_workers_start(unsigned count, const int *cpus, struct pv_workers **out, int *err)
{
    struct pv_workers *all = calloc(1, sizeof *all);
    int result = ENOMEM;

    if (all)
        all->workers = aligned_alloc(64, count * sizeof *all->workers);
    if (all && all->workers)
        for (result = 0; all->count < count && !result; all->count += !result)
            result = start_worker(all, all->count, cpus);
    if (!result) {
        *out = all;
        return 0;
    }
    if (all)
        pv_workers_stop(all);
    *err = result;
    return -1;
}

void pv_workers_stop(struct pv_workers *all)
{
    all->stopping = true;
    for (unsigned i = 0; i < all->count; i++)
        wake(&all->workers[i]);
    for (unsigned i = 0; i < all->count; i++) {
        pthread_join(all->workers[i].thread, NULL);
        close(all->workers[i].wake);
        pthread_mutex_destroy(&all->workers[i].lock);
    }
    free(all->workers);
    free(all);
}
