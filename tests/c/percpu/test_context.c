/* Contexts: moved by themselves, by a balancer, by a signal at any instruction; what they counted is all there. */
#include <sys/eventfd.h>

#include "check.h"
#include "percpu/context.h"
#include "percpu/delay.h"

enum { WORKERS = 3, CONTEXTS = 12, HOPS = SOME(2000) };

static unsigned adds = SOME(2000000); /* of each context */
static struct pv_workers *workers;
static struct pv_context *contexts[CONTEXTS];
static _Atomic(int) ended;

static void start_workers(void)
{
    int err;

    ended = 0;
    CHECK(!pv_workers_start(WORKERS, NULL, &workers, &err));
}

static void start(unsigned number, void (*run)(void *), void *argument)
{
    int err;

    CHECK(!pv_context_start(workers, number % WORKERS, run, argument, &contexts[number], &err));
}

/* ---- moved at points of their own choice; a ref taken on one CPU is used wherever they are ------------------------ */

static struct pv_percpu_ref counter;

static void hop(void *argument)
{
    struct pv_percpu_ref ref = counter;
    unsigned number = (unsigned)(uintptr_t)argument;

    for (unsigned i = 0; i < HOPS; i++) {
        unsigned next = (number + i) % WORKERS;

        CHECK(!pv_percpu_add(ref, 1));
        pv_context_assign(workers, pv_context_self(), next);
        pv_context_yield();
        CHECK(pv_context_worker() == next);
        CHECK(!pv_percpu_add(ref, 1));
    }
    ended++;
}

static void test_hops(void)
{
    struct pv_percpu *areas = areas_for(0);
    pv_percpu_handle handle = item(areas, 8);

    counter = get(areas, handle);
    start_workers();
    for (unsigned i = 0; i < CONTEXTS; i++)
        start(i, hop, (void *)(uintptr_t)i);
    pv_workers_stop(workers);
    CHECK(ended == CONTEXTS && sum_of(areas, handle) == 2L * CONTEXTS * HOPS);
    pv_percpu_destroy(areas);
}

/* ---- preempted by a signal anywhere, and moved by a balancer ------------------------------------------------------ */

static void add(void *argument)
{
    (void)argument;
    for (unsigned i = 0; i < adds; i++) {
        pv_delay_add(1, 0);
        if (i % 64 == 0) { /* and a longer piece, in several words */
            pv_delay_enter();
            pv_delay_add(1, 1);
            pv_delay_add(1, 2);
            pv_delay_leave();
        }
    }
    ended++; /* the balancer must not assign what has ended: so all end together */
    while (ended < CONTEXTS)
        pv_context_yield();
}

static void test_preempted(void)
{
    uint64_t sums[3] = {0};
    const struct timespec breath = {0, 20000};
    unsigned long signals = 0;
    int err;

    CHECK(!pv_delay_install(SIGUSR1, pv_context_preempt, &err));
    start_workers();
    for (unsigned i = 0; i < CONTEXTS; i++)
        start(i, add, NULL);
    while (ended < CONTEXTS - 1) { /* one at least is there to be assigned, and none is freed */
        for (unsigned i = 0; i < WORKERS; i++, signals++)
            pthread_kill(pv_worker_thread(workers, i), SIGUSR1);
        if (ended == 0)
            pv_context_assign(workers, contexts[signals / WORKERS % CONTEXTS], (unsigned)(signals / 7 % WORKERS));
        nanosleep(&breath, NULL);
    }
    while (ended < CONTEXTS)
        sched_yield();
    for (unsigned w = 0; w < WORKERS; w++)
        for (unsigned i = 0; i < 3; i++)
            sums[i] += pv_worker_area(workers, w)[i];
    printf("%u adds, %lu signals\n", CONTEXTS * adds, signals);
    CHECK(sums[0] == (uint64_t)CONTEXTS * adds && sums[1] == sums[2] && sums[1] == (uint64_t)CONTEXTS * ((adds + 63) / 64));
    pv_workers_stop(workers);
}

/* ---- waiting, and moved while they wait -------------------------------------------------------------------------- */

static int pipes[2];
static _Atomic(int) rounds;

static void take_turns(void *argument)
{
    int number = (int)(uintptr_t)argument;
    eventfd_t value;

    while (rounds < 2000) {
        while (eventfd_read(pipes[number], &value))
            pv_context_wait(pipes[number]);
        rounds++;
        eventfd_write(pipes[!number], 1);
    }
    eventfd_write(pipes[!number], 1);
    ended++;
}

static void test_waiting(void)
{
    for (int i = 0; i < 2; i++)
        pipes[i] = eventfd(0, EFD_NONBLOCK);
    start_workers();
    rounds = 0;
    for (unsigned i = 0; i < 2; i++)
        start(i, take_turns, (void *)(uintptr_t)i);
    eventfd_write(pipes[0], 1);
    for (unsigned i = 0; rounds < 1900; i++) {
        pv_context_assign(workers, contexts[i % 2], i % WORKERS);
        sched_yield();
    }
    pv_workers_stop(workers);
    CHECK(ended == 2);
    close(pipes[0]);
    close(pipes[1]);
}

/* Usage: test_context [ADDS] */
int main(int argc, char **argv)
{
    adds = argc > 1 ? (unsigned)(strtoull(argv[1], NULL, 0) / CONTEXTS) : adds;
    setvbuf(stdout, NULL, _IOLBF, 0);
    test_hops();
    test_waiting();
    test_preempted();
    return 0;
}
