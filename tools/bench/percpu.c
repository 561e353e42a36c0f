/* Per-CPU operations beside what they replace. Usage: percpu ROUNDS
 *
 * Each round runs every case once and prints "case nanoseconds" for it: the thread's CPU time for one operation (for mutexes, on which one sleeps,
 * what passed). Cases named _2 run two threads at once, each on a CPU of its own where there are two. */
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "percpu/delay.h"
#include "percpu/magazine.h"
#include "percpu/ring.h"
#include "percpu/trace.h"

enum { DEPTH = 32, REQUEST_BYTES = 256, CAPACITY = 128 };
#define BARRIER() __asm__ volatile("" ::: "memory")

static struct pv_percpu *areas;
static struct pv_percpu_ref counter;
static struct pv_magazine magazine;
static struct pv_ring ring;
static struct pv_trace trace;
static uint64_t shared_counter __attribute__((aligned(64)));
static uint64_t per_cpu_atomics[1024][8] __attribute__((aligned(64)));
static uint64_t locked_counter __attribute__((aligned(64)));
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static __thread uint64_t local_counter;

static void thread_local_add(long n)
{
    for (long i = 0; i < n; i++) {
        local_counter++;
        BARRIER();
    }
}

/* A counter of which one thread is the only writer, as the vsock device has them. */
static void owned_add(long n)
{
    for (long i = 0; i < n; i++)
        __atomic_store_n(&shared_counter, shared_counter + 1, __ATOMIC_RELAXED);
}

static void percpu_add(long n)
{
    struct pv_percpu_ref ref = counter;

    for (long i = 0; i < n; i++)
        if (pv_percpu_add(ref, 1))
            abort();
}

/* As public rseq libraries have it: the CPU's number is read, and the place found, before the sequence, which compares the number again; no
 * handle is looked at. */
#if defined(__x86_64__)
static int outside_add_one(char *base)
{
    uint32_t cpu;

    __asm__ volatile("movl %%fs:(%1), %0" : "=r"(cpu) : "r"(pv_rseq_offset));
    __asm__ volatile goto(
        ".pushsection pv_percpu_cs, \"aw\"\n\t.balign 32\n99:\n\t.long 0, 0\n\t.quad 1f, 2f - 1f, 4f\n\t.popsection\n\t"
        "leaq 99b(%%rip), %%rax\n\tmovq %%rax, %%fs:8(%[offset])\n"
        "1:\n\tcmpl %[cpu], %%fs:4(%[offset])\n\tjne %l[moved]\n\taddq $1, (%[place])\n2:\n\t"
        ".pushsection pv_percpu_abort, \"ax\"\n\t.byte 0x0f, 0xb9, 0x3d\n\t.long 0x53053053\n4:\n\tjmp %l[moved]\n\t.popsection\n"
        : : [offset] "r"(pv_rseq_offset), [cpu] "r"(cpu), [place] "r"(base + ((uint64_t)cpu << PV_PERCPU_SHIFT))
        : "rax", "memory", "cc" : moved);
    return 0;
moved:
    return -1;
}
#else
static int outside_add_one(char *base)
{
    return pv_percpu_add((struct pv_percpu_ref){base, counter.limit}, 1);
}
#endif

static void outside_add(long n)
{
    char *base = counter.base;

    for (long i = 0; i < n; i++)
        while (outside_add_one(base))
            ;
}

static void delayed_add(long n)
{
    pv_delay_state.area = &local_counter;
    for (long i = 0; i < n; i++)
        pv_delay_add(1, 0);
}

static void getcpu_add(long n)
{
    for (long i = 0; i < n; i++)
        __atomic_fetch_add(&per_cpu_atomics[sched_getcpu() % 1024][0], 1, __ATOMIC_RELAXED);
}

static void atomic_add(long n)
{
    for (long i = 0; i < n; i++)
        __atomic_fetch_add(&shared_counter, 1, __ATOMIC_RELAXED);
}

static void mutex_add(long n)
{
    for (long i = 0; i < n; i++) {
        pthread_mutex_lock(&lock);
        locked_counter++;
        pthread_mutex_unlock(&lock);
    }
}

static void malloc_free(long n)
{
    for (long i = 0; i < n; i++) {
        void *p = malloc(REQUEST_BYTES);

        __asm__ volatile("" : "+r"(p) : : "memory");
        free(p);
    }
}

static void magazine_free(long n)
{
    for (long i = 0; i < n; i++) {
        void *p = pv_magazine_alloc(&magazine);

        __asm__ volatile("" : "+r"(p) : : "memory");
        pv_magazine_free(&magazine, p);
    }
}

static void malloc_deep(long n)
{
    void *held[DEPTH];

    for (long i = 0; i < n; i += DEPTH) {
        for (int k = 0; k < DEPTH; k++)
            held[k] = malloc(REQUEST_BYTES);
        BARRIER();
        for (int k = 0; k < DEPTH; k++)
            free(held[k]);
    }
}

static void magazine_deep(long n)
{
    void *held[DEPTH];

    for (long i = 0; i < n; i += DEPTH) {
        for (int k = 0; k < DEPTH; k++)
            held[k] = pv_magazine_alloc(&magazine);
        BARRIER();
        for (int k = 0; k < DEPTH; k++)
            pv_magazine_free(&magazine, held[k]);
    }
}

/* A free list that one thread alone takes from and gives to, as each block device and each disk has one; the one used last is taken. */
static struct pv_percpu_node *own_list;

static struct pv_percpu_node *own_take(void)
{
    struct pv_percpu_node *node = own_list;

    if (!node)
        return calloc(1, REQUEST_BYTES);
    own_list = node->next;
    return node;
}

static void own_give(void *object)
{
    struct pv_percpu_node *node = object;

    node->next = own_list;
    own_list = node;
}

static void own_free(long n)
{
    for (long i = 0; i < n; i++) {
        void *p = own_take();

        __asm__ volatile("" : "+r"(p) : : "memory");
        own_give(p);
    }
}

static void own_deep(long n)
{
    void *held[DEPTH];

    for (long i = 0; i < n; i += DEPTH) {
        for (int k = 0; k < DEPTH; k++)
            held[k] = own_take();
        BARRIER();
        for (int k = 0; k < DEPTH; k++)
            own_give(held[k]);
    }
}

/* What a trace ring for each CPU replaces: one for all, whose writers meet at its head. The event is the same. */
static struct {
    uint64_t head __attribute__((aligned(64)));
    uint64_t records[4096][4] __attribute__((aligned(64)));
} shared_ring;

static void shared_trace_event(long n)
{
    for (long i = 0; i < n; i++) {
        uint64_t *record = shared_ring.records[__atomic_fetch_add(&shared_ring.head, 1, __ATOMIC_RELAXED) % 4096];

        record[0] = pv_trace_ticks();
        record[1] = 0;
        record[2] = (uint64_t)local_counter << 32 | 1 << 8;
        __atomic_store_n(&record[3], (uint64_t)i, __ATOMIC_RELEASE);
    }
}

static void ring_record(long n)
{
    uint64_t record[3] = {1, 2, 3}, out[8];
    size_t bytes;
    int err;

    for (long i = 0; i < n; i++) {
        if (pv_ring_put(&ring, record, sizeof record) == 1)
            continue;
        for (uint32_t area = 0; area < pv_percpu_cpus(areas); area++)
            while (pv_ring_read(&ring, area, out, sizeof out, &bytes, &err) == 1)
                ;
    }
}

static void trace_event(long n)
{
    for (long i = 0; i < n; i++)
        pv_trace_put(&trace, PV_TRACE_INSTANT, 1, (uint64_t)i, 0);
}

static void trace_off(long n)
{
    for (long i = 0; i < n; i++)
        PV_TRACE(PV_TRACE_INSTANT, 1, (uint64_t)i, 0);
}

static const struct bench {
    const char *name;
    void (*run)(long n);
    int threads;
    long n;
} CASES[] = {
    {"tls", thread_local_add, 1, 4000000},
    {"percpu", percpu_add, 1, 4000000},
    {"outside", outside_add, 1, 4000000},
    {"delayed", delayed_add, 1, 4000000},
    {"owned", owned_add, 1, 4000000},
    {"getcpu", getcpu_add, 1, 1000000},
    {"atomic", atomic_add, 1, 1000000},
    {"mutex", mutex_add, 1, 500000},
    {"percpu_2", percpu_add, 2, 4000000},
    {"atomic_2", atomic_add, 2, 1000000},
    {"mutex_2", mutex_add, 2, 300000},
    {"malloc_2", malloc_free, 2, 1000000},
    {"magazine_2", magazine_free, 2, 1000000},
    {"malloc_deep_2", malloc_deep, 2, 1000000},
    {"magazine_deep_2", magazine_deep, 2, 1000000},
    {"own", own_free, 1, 1000000},
    {"magazine", magazine_free, 1, 1000000},
    {"own_deep", own_deep, 1, 1000000},
    {"magazine_deep", magazine_deep, 1, 1000000},
    {"ring", ring_record, 1, 500000},
    {"trace", trace_event, 1, 500000},
    {"trace_2", trace_event, 2, 500000},
    {"shared_trace_2", shared_trace_event, 2, 500000},
    {"trace_off", trace_off, 1, 4000000},
};

struct worker {
    const struct bench *bench;
    pthread_barrier_t *start;
    int number;
    double nanoseconds;
};

static double now(clockid_t clock)
{
    struct timespec t;

    clock_gettime(clock, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

/* To the `number`th CPU that the process may use. */
static void pin(int number)
{
    cpu_set_t all, one;
    int seen = 0;

    sched_getaffinity(0, sizeof all, &all);
    number %= CPU_COUNT(&all);
    CPU_ZERO(&one);
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
        if (CPU_ISSET(cpu, &all) && seen++ == number)
            CPU_SET(cpu, &one);
    sched_setaffinity(0, sizeof one, &one);
}

static void *work(void *argument)
{
    struct worker *self = argument;
    clockid_t clock = self->bench->run == mutex_add ? CLOCK_MONOTONIC : CLOCK_THREAD_CPUTIME_ID;
    double start;

    pin(self->number);
    self->bench->run(self->bench->n / 20);
    pthread_barrier_wait(self->start);
    start = now(clock);
    self->bench->run(self->bench->n);
    self->nanoseconds = (now(clock) - start) / (double)self->bench->n;
    return NULL;
}

static double measure(const struct bench *bench)
{
    struct worker workers[2];
    pthread_t threads[2];
    pthread_barrier_t start;
    double sum = 0;

    pthread_barrier_init(&start, NULL, (unsigned)bench->threads);
    for (int i = 0; i < bench->threads; i++) {
        workers[i] = (struct worker){bench, &start, i, 0};
        pthread_create(&threads[i], NULL, work, &workers[i]);
    }
    for (int i = 0; i < bench->threads; i++) {
        pthread_join(threads[i], NULL);
        sum += workers[i].nanoseconds;
    }
    pthread_barrier_destroy(&start);
    return sum / bench->threads;
}

static void do_nothing(void)
{
}

int main(int argc, char **argv)
{
    pv_percpu_handle handle;
    int err;

    if (pv_delay_install(SIGUSR1, do_nothing, &err) || pv_percpu_create(0, &areas, &err) || pv_percpu_alloc(areas, 8, &handle, &err) ||
        pv_percpu_get(areas, handle, &counter, &err) || pv_ring_create(areas, 65536, &ring, &err) ||
        pv_magazine_init(&magazine, areas, REQUEST_BYTES, CAPACITY, 0, &err) || pv_trace_create(areas, 4096, &trace, &err))
        return 1;
    for (int round = 0; round < (argc > 1 ? atoi(argv[1]) : 1); round++)
        for (unsigned i = 0; i < sizeof CASES / sizeof *CASES; i++)
            printf("%s %.4f\n", CASES[i].name, measure(&CASES[i]));
    return 0;
}
