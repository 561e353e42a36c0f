/* Who shall serve a VM's page faults, and where? Usage: percpu_faults ROUNDS
 *
 * One thread touches pages of memory that a userfaultfd fills, as a vCPU does; a server, thread or context, copies them in. Each round runs every
 * case once and prints "case nanoseconds" a fault. In the cases that end in _moving the toucher changes its CPU every MOVE_EVERY faults, and
 * the server is brought after it (or not); the time for that counts. */
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "percpu/context.h"
#include "percpu/percpu.h"

enum { PAGE = 4096, FAULTS = 4000, MOVE_EVERY = 50, COUNTS = 5 };

static char *memory;
static char data[PAGE] __attribute__((aligned(PAGE)));
static int uffd, stop_fd, cpus[2];
static pthread_t thread;
static struct pv_workers *workers;
static struct pv_context *context;
static _Atomic(int) serving;

/* What a fault server counts of each fault, one way or the other. */
static enum { UNCOUNTED, ATOMICS, PERCPU } counting;
static uint64_t counts[COUNTS];
static struct pv_percpu_ref refs[COUNTS];

static void must(int ok, const char *what)
{
    if (!ok) {
        perror(what);
        exit(1);
    }
}

static void bind_thread(pthread_t which, int cpu)
{
    cpu_set_t set;

    CPU_ZERO(&set);
    for (int i = 0; i < 2; i++)
        if (cpu < 0 || cpu == i)
            CPU_SET(cpus[i], &set);
    pthread_setaffinity_np(which, sizeof set, &set);
}

static void make_counters(void)
{
    struct pv_percpu *areas;
    pv_percpu_handle handle;
    int err;

    must(!pv_percpu_create(0, &areas, &err), "areas");
    for (int i = 0; i < COUNTS; i++)
        must(!pv_percpu_alloc(areas, 8, &handle, &err) && !pv_percpu_get(areas, handle, &refs[i], &err), "a counter");
}

static void count_all(void)
{
    for (int i = 0; i < COUNTS && counting != UNCOUNTED; i++)
        if (counting == ATOMICS)
            __atomic_fetch_add(&counts[i], 1, __ATOMIC_RELAXED);
        else
            must(!pv_percpu_add(refs[i], 1), "adding");
}

/* ---- servers ----------------------------------------------------------------------------------------------------- */

static void serve_one(void)
{
    struct uffd_msg message;

    while (read(uffd, &message, sizeof message) == sizeof message) {
        struct uffdio_copy copy = {.dst = message.arg.pagefault.address & ~(PAGE - 1UL), .src = (uintptr_t)data, .len = PAGE};

        must(!ioctl(uffd, UFFDIO_COPY, &copy), "UFFDIO_COPY");
        count_all();
    }
}

static void *serve_by_thread(void *ignored)
{
    struct pollfd polled[] = {{uffd, POLLIN, 0}, {stop_fd, POLLIN, 0}};

    (void)ignored;
    serving = 1;
    while (poll(polled, 2, -1) > 0 && !polled[1].revents)
        serve_one();
    return NULL;
}

static void serve_by_context(void *ignored)
{
    (void)ignored;
    while (serving) {
        pv_context_wait(uffd);
        serve_one();
    }
}

/* ---- cases ------------------------------------------------------------------------------------------------------- */

enum who { THREAD, CONTEXT };
enum where { ANYWHERE, OTHER, SAME, FOLLOWS };
static const struct bench {
    const char *name;
    enum who who;
    enum where where;
    int moving, counting;
} CASES[] = {
    {"thread_anywhere", THREAD, ANYWHERE, 0, UNCOUNTED},
    {"thread_other", THREAD, OTHER, 0, UNCOUNTED},
    {"thread_same", THREAD, SAME, 0, UNCOUNTED},
    {"thread_same_atomics", THREAD, SAME, 0, ATOMICS},
    {"thread_same_percpu", THREAD, SAME, 0, PERCPU},
    {"context_same", CONTEXT, SAME, 0, UNCOUNTED},
    {"thread_anywhere_moving", THREAD, ANYWHERE, 1, UNCOUNTED},
    {"thread_follows_moving", THREAD, FOLLOWS, 1, UNCOUNTED},
    {"context_follows_moving", CONTEXT, FOLLOWS, 1, UNCOUNTED},
};

static void start_server(const struct bench *bench)
{
    int err, place = bench->where == OTHER;

    serving = 0;
    if (bench->who == CONTEXT) {
        serving = 1;
        must(!pv_workers_start(2, cpus, &workers, &err), "workers");
        must(!pv_context_start(workers, (unsigned)place, serve_by_context, NULL, &context, &err), "context");
        return;
    }
    must(!pthread_create(&thread, NULL, serve_by_thread, NULL), "thread");
    bind_thread(thread, bench->where == ANYWHERE ? -1 : place);
    while (!serving)
        sched_yield();
}

static void stop_server(const struct bench *bench)
{
    eventfd_t ignored;

    if (bench->who == CONTEXT) {
        volatile char *last = memory + (size_t)FAULTS * PAGE;

        serving = 0;
        *last = 1; /* its last fault: so it looks at `serving` */
        pv_workers_stop(workers);
        return;
    }
    eventfd_write(stop_fd, 1);
    pthread_join(thread, NULL);
    eventfd_read(stop_fd, &ignored);
}

static void follow(const struct bench *bench, int place)
{
    bind_thread(pthread_self(), place);
    if (bench->where == FOLLOWS && bench->who == THREAD)
        bind_thread(thread, place);
    if (bench->where == FOLLOWS && bench->who == CONTEXT)
        pv_context_assign(workers, context, (unsigned)place);
}

static double now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

static double measure(const struct bench *bench)
{
    double start, end;

    counting = bench->counting;
    bind_thread(pthread_self(), 0);
    must(!madvise(memory, (size_t)(FAULTS + 1) * PAGE, MADV_DONTNEED), "madvise");
    start_server(bench);
    start = now();
    for (int i = 0; i < FAULTS; i++) {
        if (bench->moving && i % MOVE_EVERY == 0)
            follow(bench, i / MOVE_EVERY % 2);
        *(volatile char *)(memory + (size_t)i * PAGE) = 1;
    }
    end = now();
    stop_server(bench);
    return (end - start) / FAULTS;
}

static void open_uffd(void)
{
    struct uffdio_api api = {.api = UFFD_API};
    struct uffdio_register range = {.mode = UFFDIO_REGISTER_MODE_MISSING};
    size_t bytes = (size_t)(FAULTS + 1) * PAGE;

    uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    must(uffd >= 0 && !ioctl(uffd, UFFDIO_API, &api), "userfaultfd");
    memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    must(memory != MAP_FAILED && !madvise(memory, bytes, MADV_NOHUGEPAGE), "mmap");
    range.range.start = (uintptr_t)memory;
    range.range.len = bytes;
    must(!ioctl(uffd, UFFDIO_REGISTER, &range), "UFFDIO_REGISTER");
}

int main(int argc, char **argv)
{
    cpu_set_t set;
    int found = 0;

    sched_getaffinity(0, sizeof set, &set);
    for (int cpu = 0; cpu < CPU_SETSIZE && found < 2; cpu++)
        if (CPU_ISSET(cpu, &set))
            cpus[found++] = cpu;
    cpus[1] = found < 2 ? cpus[0] : cpus[1];
    stop_fd = eventfd(0, EFD_CLOEXEC);
    make_counters();
    open_uffd();
    for (int round = 0; round < (argc > 1 ? atoi(argv[1]) : 1); round++)
        for (unsigned i = 0; i < sizeof CASES / sizeof *CASES; i++)
            printf("%s %.1f\n", CASES[i].name, measure(&CASES[i]));
    return 0;
}
