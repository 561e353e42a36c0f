/* Not one lost: adds, list and stack operations from 16 threads that are moved all the time and get signals.
 *
 * Usage: test_adds [ADDS [CPUS]]     ADDS in all; CPUS for which the areas are made, fewer than there are: 1 */
#include "check.h"

static uint64_t adds = 128 << 20;

struct shared {
    struct pv_percpu *areas;
    struct pv_percpu_ref counter, list, stack;
    _Atomic(uint64_t) by_cas;
};

static void on_signal(int number)
{
    (void)number;
}

static void add(unsigned number, void *context)
{
    struct pv_percpu_ref counter = ((struct shared *)context)->counter;
    uint64_t count = adds / THREADS;

    (void)number;
    for (uint64_t i = 0; i < count; i++)
        CHECK(!pv_percpu_add(counter, 1));
}

/* As add, by load and compare-and-store; a value read on one CPU must not be stored on another unless it is the same there. */
static void increment_by_cas(unsigned number, void *context)
{
    struct pv_percpu_ref counter = ((struct shared *)context)->counter;

    (void)number;
    for (uint64_t i = 0; i < adds / THREADS / 8; i++) {
        uint64_t seen;

        CHECK(!pv_percpu_load(counter, &seen));
        for (int done = 0; !done;) {
            done = pv_percpu_cas(counter, seen, seen + 1, &seen);
            CHECK(done >= 0);
        }
    }
}

/* Every node is on one list or in one hand at any time; `owner` would show two hands. */
struct node {
    struct pv_percpu_node link;
    _Atomic(unsigned) owner;
};

static void pass_nodes(unsigned number, void *context)
{
    struct shared *shared = context;
    struct pv_percpu_ref list = shared->list, stack = shared->stack;

    for (uint64_t i = 0; i < adds / THREADS / 8; i++) {
        struct pv_percpu_node *node;
        void *item;

        if (pv_percpu_pop(list, &node) == 1) {
            CHECK(!atomic_exchange(&((struct node *)node)->owner, number + 1));
            CHECK(atomic_exchange(&((struct node *)node)->owner, 0) == number + 1);
            if (pv_percpu_stack_push(stack, 100, node) != 1)
                CHECK(!pv_percpu_push(list, node));
        }
        if (pv_percpu_stack_pop(stack, &item) == 1) {
            CHECK(!atomic_exchange(&((struct node *)item)->owner, number + 1));
            CHECK(atomic_exchange(&((struct node *)item)->owner, 0) == number + 1);
            CHECK(!pv_percpu_push(list, item));
        }
    }
}

/* Takes what the areas hold; all threads are gone. */
static unsigned count_nodes(const struct shared *shared)
{
    unsigned count = 0;

    for (int64_t a = pv_percpu_next(shared->areas, shared->list, 0); a >= 0;
         a = pv_percpu_next(shared->areas, shared->list, (uint32_t)a + 1))
        for (struct pv_percpu_node *n = *(void **)pv_percpu_at(shared->list, (uint32_t)a); n; n = n->next)
            count++;
    for (int64_t a = pv_percpu_next(shared->areas, shared->stack, 0); a >= 0;
         a = pv_percpu_next(shared->areas, shared->stack, (uint32_t)a + 1))
        count += (unsigned)*(uint64_t *)pv_percpu_at(shared->stack, (uint32_t)a);
    return count;
}

static void test_adds(struct shared *shared, int signal_number)
{
    pv_percpu_handle handle = item(shared->areas, 8);
    struct timespec start, end;
    unsigned long moves;
    double seconds;
    int err;

    shared->counter = get(shared->areas, handle);
    clock_gettime(CLOCK_MONOTONIC, &start);
    moves = run_crowd(add, shared, signal_number);
    clock_gettime(CLOCK_MONOTONIC, &end);
    CHECK(sum_of(shared->areas, handle) == (int64_t)(adds / THREADS * THREADS));
    seconds = (double)(end.tv_sec - start.tv_sec) + (double)(end.tv_nsec - start.tv_nsec) / 1e9;
    printf("%lu adds, %lu moves, %.0f moves a second, %lu restarts%s\n", (unsigned long)adds, moves, (double)moves / seconds,
           (unsigned long)pv_percpu_aborts, signal_number ? ", with signals" : "");
    CHECK(!pv_percpu_free(shared->areas, handle, &err));
}

static void test_cas(struct shared *shared)
{
    pv_percpu_handle handle = item(shared->areas, 8);

    shared->counter = get(shared->areas, handle);
    run_crowd(increment_by_cas, shared, SIGUSR1);
    CHECK(sum_of(shared->areas, handle) == (int64_t)(adds / THREADS / 8 * THREADS));
}

static void test_nodes(struct shared *shared)
{
    static struct node nodes[64];

    shared->list = get(shared->areas, item(shared->areas, 8));
    shared->stack = get(shared->areas, item(shared->areas, 1024));
    for (unsigned i = 0; i < 64; i++)
        CHECK(!pv_percpu_push(shared->list, &nodes[i].link));
    run_crowd(pass_nodes, shared, SIGUSR1);
    CHECK(count_nodes(shared) == 64);
}

int main(int argc, char **argv)
{
    struct shared shared = {0};

    adds = argc > 1 ? strtoull(argv[1], NULL, 0) : adds;
    CHECK(sigaction(SIGUSR1, &(struct sigaction){.sa_handler = on_signal, .sa_flags = SA_RESTART}, NULL) == 0);
    shared.areas = areas_for(argc > 2 ? (uint32_t)atoi(argv[2]) : 0);
    test_adds(&shared, 0);
    test_adds(&shared, SIGUSR1);
    test_cas(&shared);
    test_nodes(&shared);
    pv_percpu_destroy(shared.areas);
    return 0;
}
