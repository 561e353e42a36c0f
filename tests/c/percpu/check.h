/* For the tests of per-CPU areas: checks, and a thread that moves others between CPUs for as long as they run. */
#ifndef CHECK_H
#define CHECK_H

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "percpu/percpu.h"

#define CHECK(condition)                                                                      \
    do {                                                                                      \
        if (!(condition)) {                                                                   \
            fprintf(stderr, "%s:%d: %s (errno %d)\n", __FILE__, __LINE__, #condition, errno); \
            _exit(1);                                                                         \
        }                                                                                     \
    } while (0)

/* An emulated machine does a hundredth of the work. */
#ifdef PV_TEST_EMULATED
#define SOME(n) ((n) / 100)
#else
#define SOME(n) (n)
#endif

enum { THREADS = 16 };

struct crowd {
    pthread_t threads[THREADS];
    _Atomic(pid_t) ids[THREADS];
    _Atomic(int) running, started;
    _Atomic(unsigned long) moves;
    void (*work)(unsigned number, void *context);
    void *context;
    int signal; /* sent to the threads as they are moved; 0: none */
};

struct member {
    struct crowd *crowd;
    unsigned number;
};

static inline void *member_main(void *argument)
{
    struct member *self = argument;

    self->crowd->ids[self->number] = (pid_t)syscall(SYS_gettid);
    self->crowd->started++;
    self->crowd->work(self->number, self->crowd->context);
    self->crowd->ids[self->number] = 0;
    self->crowd->running--;
    return NULL;
}

/* Lets the calling thread run whenever it wants to, where that is allowed. */
static inline void hurry(void)
{
    struct sched_param first = {.sched_priority = 1};

    if (sched_setscheduler(0, SCHED_FIFO | SCHED_RESET_ON_FORK, &first))
        return; /* then it takes its turn, and there are fewer moves */
}

/* Moves every thread to the next CPU that this process may use, again and again. Not in one breath: they shall run, too. */
static inline void move_all(struct crowd *crowd, const int *cpus, int count)
{
    const struct timespec breath = {0, 300000};

    for (unsigned turn = 0; crowd->running > 0; turn++) {
        for (unsigned i = 0; i < THREADS; i++) {
            pid_t id = crowd->ids[i];
            cpu_set_t set;

            CPU_ZERO(&set);
            CPU_SET(cpus[(turn + i) % (unsigned)count], &set);
            if (!id)
                continue;
            if (!sched_setaffinity(id, sizeof set, &set))
                crowd->moves++;
            if (crowd->signal)
                syscall(SYS_tgkill, getpid(), id, crowd->signal);
        }
        nanosleep(&breath, NULL);
    }
}

static inline int usable_cpus(int *cpus, int most)
{
    cpu_set_t set;
    int count = 0;

    CHECK(!sched_getaffinity(0, sizeof set, &set));
    for (int i = 0; i < CPU_SETSIZE && count < most; i++)
        if (CPU_ISSET(i, &set))
            cpus[count++] = i;
    return count;
}

/* Runs `work` in THREADS threads while they are moved; how often they were. */
static inline unsigned long run_crowd(void (*work)(unsigned, void *), void *context, int signal_number)
{
    static struct crowd crowd;
    struct member members[THREADS];
    int cpus[64], count = usable_cpus(cpus, 64);

    memset(&crowd, 0, sizeof crowd);
    crowd.work = work;
    crowd.context = context;
    crowd.signal = signal_number;
    crowd.running = THREADS;
    for (unsigned i = 0; i < THREADS; i++) {
        members[i] = (struct member){&crowd, i};
        CHECK(!pthread_create(&crowd.threads[i], NULL, member_main, &members[i]));
    }
    while (crowd.started < THREADS)
        sched_yield();
    hurry();
    move_all(&crowd, cpus, count);
    sched_setscheduler(0, SCHED_OTHER, &(struct sched_param){0});
    for (unsigned i = 0; i < THREADS; i++)
        CHECK(!pthread_join(crowd.threads[i], NULL));
    return crowd.moves;
}

static inline struct pv_percpu_ref get(const struct pv_percpu *areas, pv_percpu_handle handle)
{
    struct pv_percpu_ref ref;
    int err;

    CHECK(!pv_percpu_get(areas, handle, &ref, &err));
    return ref;
}

static inline pv_percpu_handle item(struct pv_percpu *areas, uint32_t bytes)
{
    pv_percpu_handle handle;
    int err;

    CHECK(!pv_percpu_alloc(areas, bytes, &handle, &err));
    return handle;
}

static inline int64_t sum_of(const struct pv_percpu *areas, pv_percpu_handle handle)
{
    int64_t sum;
    int err;

    CHECK(!pv_percpu_sum(areas, handle, &sum, &err));
    return sum;
}

static inline struct pv_percpu *areas_for(uint32_t cpus)
{
    struct pv_percpu *areas;
    int err;

    CHECK(!pv_percpu_create(cpus, &areas, &err));
    return areas;
}

#endif
