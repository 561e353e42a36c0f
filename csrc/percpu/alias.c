/* See alias.h: a model. */
#include "alias.h"

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "common/cleanup.h"
#include "context.h"

#define PAGE 4096
#define STACK (64 << 10)
#define SIGNAL SIGUSR1

/* The area at the alias; one page a process. */
struct area {
    uint64_t count;
    uint64_t owner; /* number of the process whose area it is */
};

struct modelled {
    void *sp;
    bool started, in_handler, ended;
    uint64_t owner_seen, left, moves;
    uint64_t address;
    char *stack;
};

/* Shared by all processes. */
struct model {
    bool busy; /* a spin lock, held by schedulers for some instructions */
    _Atomic(unsigned) running;
    _Atomic(uint64_t) preemptions;
    unsigned queued;
    struct modelled *queue[PV_ALIAS_CONTEXTS];
    struct modelled contexts[PV_ALIAS_CONTEXTS];
    char stacks[PV_ALIAS_CONTEXTS][STACK] __attribute__((aligned(PAGE)));
};

/* Each process's own: fork made copies, at one address, as it did of everything that is not shared. */
static struct model *model;
static struct area *alias;
static void *scheduler;
static struct modelled *volatile current;

static void lock(void)
{
    while (__atomic_exchange_n(&model->busy, true, __ATOMIC_ACQUIRE))
        sched_yield();
}

static void unlock(void)
{
    __atomic_store_n(&model->busy, false, __ATOMIC_RELEASE);
}

/* ---- in contexts ------------------------------------------------------------------------------------------------- */

static void set_signal(int how)
{
    sigset_t set;

    sigemptyset(&set);
    sigaddset(&set, SIGNAL);
    sigprocmask(how, &set, NULL);
}

static void leave(void)
{
    pv_context_switch(&current->sp, scheduler);
}

/* The patent's case: the address is taken once, and used for as long as the context lives, wherever it is by then. */
static void count(void *argument)
{
    struct modelled *self = argument;
    struct area *area = alias;

    set_signal(SIG_UNBLOCK);
    for (; self->left; self->left--) {
        uint64_t owner;

#if defined(__x86_64__)
        __asm__ volatile("incq %0" : "+m"(area->count) : : "cc");
#else
        __atomic_fetch_add(&area->count, 1, __ATOMIC_RELAXED); /* aarch64 has no plain read-modify-write instruction */
#endif
        owner = *(volatile uint64_t *)&area->owner;
        self->moves += owner != self->owner_seen;
        self->owner_seen = owner;
    }
    set_signal(SIG_BLOCK);
    self->address = (uintptr_t)area;
    self->ended = true;
    leave();
}

/* On the context's stack. What the kernel saved of the interrupted instruction lies there too, and moves with it. */
static void on_signal(int number)
{
    struct modelled *self = current;

    (void)number;
    if (!self)
        return;
    model->preemptions++;
    self->in_handler = true;
    leave();
    self->in_handler = false; /* by now perhaps in another process */
}

/* ---- a process that stands for a CPU ----------------------------------------------------------------------------- */

static struct modelled *take(void)
{
    struct modelled *taken = NULL;

    lock();
    if (model->queued) {
        taken = model->queue[0];
        model->queued--;
        memmove(model->queue, model->queue + 1, model->queued * sizeof model->queue[0]);
    }
    unlock();
    return taken;
}

static void give(struct modelled *context)
{
    lock();
    model->queue[model->queued++] = context;
    unlock();
}

static _Noreturn void be_cpu(unsigned number, int file)
{
    cpu_set_t all, one;
    unsigned seen = 0;

    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (mmap(alias, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, (off_t)number * PAGE) == MAP_FAILED)
        _exit(1);
    sched_getaffinity(0, sizeof all, &all);
    CPU_ZERO(&one);
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
        if (CPU_ISSET(cpu, &all) && seen++ == number % (unsigned)CPU_COUNT(&all))
            CPU_SET(cpu, &one);
    sched_setaffinity(0, sizeof one, &one);
    while (model->running) {
        struct modelled *context = take();

        if (!context) {
            sched_yield();
            continue;
        }
        current = context;
        pv_context_switch(&scheduler, context->sp);
        current = NULL;
        set_signal(SIG_BLOCK);
        if (context->ended)
            model->running--;
        else
            give(context);
    }
    _exit(0);
}

/* ---- the parent, who is the balancer ----------------------------------------------------------------------------- */

static void lay_out(const struct pv_alias_plan *plan)
{
    for (unsigned i = 0; i < plan->contexts; i++) {
        struct modelled *context = &model->contexts[i];

        context->left = plan->adds;
        context->stack = model->stacks[i];
        context->sp = pv_context_prepare(context->stack, STACK, count, context);
        model->queue[model->queued++] = context;
    }
    model->running = plan->contexts;
}

static int fork_all(const struct pv_alias_plan *plan, int file, pid_t *pids)
{
    struct sigaction action = {.sa_handler = on_signal}, before;
    sigset_t set, mask;
    int failed = 0;

    sigemptyset(&set);
    sigaddset(&set, SIGNAL);
    sigprocmask(SIG_BLOCK, &set, &mask);
    sigaction(SIGNAL, &action, &before);
    for (unsigned i = 0; i < plan->cpus; i++) {
        pids[i] = failed ? -1 : fork();
        if (pids[i] == 0)
            be_cpu(i, file);
        failed |= pids[i] < 0;
        if (failed) {
            pids[i] = 0; /* never -1 to kill(2) */
            model->running = 0;
        }
    }
    sigaction(SIGNAL, &before, NULL);
    sigprocmask(SIG_SETMASK, &mask, NULL);
    return failed;
}

/* One that died took a context with it, and perhaps the lock: the others cannot come to an end. */
static void end_all(const struct pv_alias_plan *plan, const pid_t *pids, unsigned ended)
{
    for (unsigned i = 0; i < plan->cpus; i++)
        if (pids[i] > 0 && !(ended & 1U << i))
            kill(pids[i], SIGKILL);
}

/* Preempts every process again and again until all have ended; whether all ended well. */
static bool balance(const struct pv_alias_plan *plan, const pid_t *pids)
{
    const struct timespec breath = {0, 50000};
    unsigned ended = 0;
    bool well = true;

    for (unsigned i = 0; i < plan->cpus; i++)
        ended |= pids[i] > 0 ? 0 : 1U << i;
    for (; ended != (1U << plan->cpus) - 1; nanosleep(&breath, NULL))
        for (unsigned i = 0; i < plan->cpus; i++) {
            int status;

            if (ended & 1U << i)
                continue;
            if (waitpid(pids[i], &status, WNOHANG) != pids[i]) {
                kill(pids[i], SIGNAL);
                continue;
            }
            ended |= 1U << i;
            if (status && well) {
                well = false;
                end_all(plan, pids, ended);
            }
        }
    return well;
}

static void collect(const struct pv_alias_plan *plan, int file, struct pv_alias_result *out)
{
    *out = (struct pv_alias_result){.preemptions = model->preemptions, .address = (uintptr_t)alias};
    for (unsigned i = 0; i < plan->cpus; i++)
        if (pread(file, &out->area[i], sizeof out->area[i], (off_t)i * PAGE) != sizeof out->area[i])
            out->area[i] = 0;
    for (unsigned i = 0; i < plan->contexts; i++) {
        out->moves += model->contexts[i].moves;
        if (model->contexts[i].address != out->address)
            out->address = 0;
    }
}

static int make_areas(const struct pv_alias_plan *plan)
{
    int file = memfd_create("aliases", MFD_CLOEXEC);

    if (file < 0 || ftruncate(file, (off_t)plan->cpus * PAGE))
        return -1;
    for (unsigned i = 0; i < plan->cpus; i++) {
        struct area area = {0, i};

        if (pwrite(file, &area, sizeof area, (off_t)i * PAGE) != sizeof area)
            return -1;
    }
    return file;
}

int pv_alias_run(const struct pv_alias_plan *plan, struct pv_alias_result *out, int *err)
{
    cleanup_fd int file = -1;
    pid_t pids[PV_ALIAS_CPUS];

    *err = EINVAL;
    if (!plan->cpus || plan->cpus > PV_ALIAS_CPUS || !plan->contexts || plan->contexts > PV_ALIAS_CONTEXTS || !plan->adds)
        return -1;
    file = make_areas(plan);
    model = mmap(NULL, sizeof *model, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    alias = mmap(NULL, PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0); /* the address; each process puts its area there */
    *err = ENOMEM;
    if (file >= 0 && model != MAP_FAILED && alias != MAP_FAILED) {
        lay_out(plan);
        *err = fork_all(plan, file, pids) ? EAGAIN : 0;
        if (!balance(plan, pids))
            *err = EIO;
        collect(plan, file, out);
    }
    if (model != MAP_FAILED)
        munmap(model, sizeof *model);
    if (alias != MAP_FAILED)
        munmap(alias, PAGE);
    return *err ? -1 : 0;
}
