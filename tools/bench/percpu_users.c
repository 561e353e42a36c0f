/* What would gain from per-CPU areas and contexts, on the data plane as it is: its fault server, block device, vsock device.
 *
 *     percpu_users                     every case once: lines "user case nanoseconds", what one operation takes; and "user cpu nanoseconds",
 *                                      of the serving thread's CPU
 *     percpu_users count USER CASE N   for callgrind: N operations
 *
 * Built twice, with the counters that are shipped and with per-CPU ones (percpu_users.h). The asker, which stands for a vCPU, is the main thread. The
 * server is a thread, or a context: what it waits by (epoll_wait, epoll_pwait2, poll) is then put in its worker's hands, so its own code is the same.
 * "moving": the asker changes its CPU every MOVE_EVERY operations, and the server is brought after it, where it is.
 *
 * callgrind knows no rseq. So each server's thread is told there that it is on CPU 0 for ever (pretend_registered): then the sequences run as
 * they are, and nothing can interrupt them, for callgrind runs one thread at a time. Nor does it know userfaultfd: the messages then come
 * through a pipe, and a copy is a look at the page.
 */
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <sched.h>
#include <semaphore.h>
#include <stdarg.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "blk/blk.h"
#include "blk/driver/driver.h"
#include "common/loop.h"
#include "frontend.h"
#include "harness.h"
#include "iofilter/instance.h"
#include "memory/fault.h"
#include "percpu/context.h"
#include "percpu/delay.h"
#include "percpu/trace.h"
#include "percpu_users.h"

enum { OPERATIONS = 2000, MOVE_EVERY = 50, PAGES = OPERATIONS + 1, DISK_BYTES = 8 << 20, SPIN_NS = 50000 };
enum where { ANYWHERE, SAME, FOLLOWS };
static const struct bench {
    const char *name;
    bool context, moving, traced;
    enum where where;
} CASES[] = {
    {"anywhere", false, false, false, ANYWHERE},
    {"same", false, false, false, SAME},
    {"traced", false, false, true, SAME},
    {"context", true, false, false, SAME},
    {"anywhere_moving", false, true, false, ANYWHERE},
    {"follows_moving", false, true, false, FOLLOWS},
    {"context_moving", true, true, false, FOLLOWS},
};
enum { CASE_COUNT = sizeof CASES / sizeof *CASES };

struct pv_percpu_ref users_counts;
static struct pv_trace trace;
static const struct bench *bench;
static bool counting; /* under callgrind */
static int cpus[2];

static double now(clockid_t clock)
{
    struct timespec t;

    CHECK(!clock_gettime(clock, &t));
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

static void bind_thread(pthread_t which, int place)
{
    cpu_set_t set;

    CPU_ZERO(&set);
    for (int i = 0; i < 2; i++)
        if (place < 0 || place == i)
            CPU_SET(cpus[i], &set);
    CHECK(!pthread_setaffinity_np(which, sizeof set, &set));
}

/* ---- the server: a thread, or a context -------------------------------------------------------------------------- */

static struct server {
    void (*run)(void *argument);
    void *argument;
    pthread_t thread; /* that runs it; of a context: that started it */
    struct pv_workers *workers;
    struct pv_context *context;
    unsigned place; /* the context's worker */
    sem_t ready;
    double cpu_ns;
} server;

static void pretend_registered(void)
{
    if (counting)
        *(uint32_t *)((char *)__builtin_thread_pointer() + pv_rseq_offset + PV_RSEQ_CPU_ID) = 0;
}

static bool in_context(void)
{
    return pv_delay_state.area && !pv_delay_state.depth; /* a worker's thread, and not in its scheduler */
}

int __real_epoll_wait(int epoll, struct epoll_event *events, int most, int timeout);
int __wrap_epoll_wait(int epoll, struct epoll_event *events, int most, int timeout);
int __wrap_epoll_wait(int epoll, struct epoll_event *events, int most, int timeout)
{
    int count;

    if (!in_context() || !timeout)
        return __real_epoll_wait(epoll, events, most, timeout);
    while (!(count = __real_epoll_wait(epoll, events, most, 0)))
        pv_context_wait(epoll);
    return count;
}

typedef const struct timespec *limit;
int __real_epoll_pwait2(int epoll, struct epoll_event *events, int most, limit timeout, const sigset_t *mask);
int __wrap_epoll_pwait2(int epoll, struct epoll_event *events, int most, limit timeout, const sigset_t *mask);
int __wrap_epoll_pwait2(int epoll, struct epoll_event *events, int most, limit timeout, const sigset_t *mask)
{
    if (!in_context() && !counting) /* callgrind has no such call */
        return __real_epoll_pwait2(epoll, events, most, timeout, mask);
    return __wrap_epoll_wait(epoll, events, most, !timeout || timeout->tv_sec || timeout->tv_nsec ? -1 : 0);
}

int __real_poll(struct pollfd *polled, nfds_t count, int timeout);
int __wrap_poll(struct pollfd *polled, nfds_t count, int timeout);
int __wrap_poll(struct pollfd *polled, nfds_t count, int timeout)
{
    int found;

    if (!in_context() || !timeout)
        return __real_poll(polled, count, timeout);
    while (!(found = __real_poll(polled, count, 0)))
        pv_context_wait(polled[count - 1].fd); /* the fault server's userfaultfd; it is stopped by a move */
    return found;
}

void __wrap_pv_fault_count(_Atomic(uint64_t) *counter, uint64_t n);
void __wrap_pv_fault_count(_Atomic(uint64_t) *counter, uint64_t n)
{
    users_count(counter, n);
}

static void run_in_context(void *ignored)
{
    (void)ignored;
    pretend_registered();
    sem_post(&server.ready);
    server.run(server.argument);
}

/* Runs the server to its end, in this thread or in a context. */
static void serve(void (*run)(void *), void *argument)
{
    int err;

    server.run = run;
    server.place = 0;
    server.argument = argument;
    server.thread = pthread_self();
    if (bench->context) {
        CHECK(!pv_workers_start(2, cpus, &server.workers, &err));
        CHECK(!pv_context_start(server.workers, 0, run_in_context, NULL, &server.context, &err));
        pv_workers_stop(server.workers);
        return;
    }
    bind_thread(pthread_self(), bench->where == ANYWHERE ? -1 : 0);
    pretend_registered();
    sem_post(&server.ready);
    run(argument);
    server.cpu_ns = now(CLOCK_THREAD_CPUTIME_ID);
}

static void follow(int place)
{
    bind_thread(pthread_self(), place);
    if (bench->where == FOLLOWS && bench->context)
        pv_context_assign(server.workers, server.context, server.place = (unsigned)place);
    else if (bench->where == FOLLOWS)
        bind_thread(server.thread, place);
}

/* ---- block ------------------------------------------------------------------------------------------------------- */

static struct {
    struct pv_loop loop;
    struct pv_blk *blk;
    struct drv drv;
    pthread_t thread;
} block;

static void block_loop(void *ignored)
{
    int err;

    (void)ignored;
    CHECK(!pv_loop_run(&block.loop, &err));
}

static void *block_thread(void *ignored)
{
    (void)ignored;
    serve(block_loop, NULL);
    return NULL;
}

static void block_up(void)
{
    struct pv_blk_config config = {.queues = 1, .serial = "bench"};
    struct pv_fail fail;
    struct pv_data *data = pv_data_memory(DISK_BYTES, &fail);
    struct pv_instance *instance = data ? pv_instance_new("bench", data, &fail) : NULL;
    int err, pair[2];

    CHECK(instance && !pv_loop_open(&block.loop, bench->where == ANYWHERE && !counting ? SPIN_NS : 0, &err));
    pv_instance_attach_loop(instance, &block.loop);
    CHECK(!pv_blk_new(&block.loop, &config, &block.blk, &err) && !pv_blk_insert(block.blk, instance, &err));
    CHECK(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) && !pv_blk_connect(block.blk, pair[0], &err));
    CHECK(!pthread_create(&block.thread, NULL, block_thread, NULL));
    sem_wait(&server.ready);
    CHECK(!drv_open(&block.drv, 1) && !drv_adopt(&block.drv, pair[1], UINT64_MAX) && !drv_start(&block.drv, true));
}

static void block_once(unsigned i)
{
    CHECK(drv_do(&block.drv, 0, VIRTIO_BLK_T_IN, i * 7919 % (DISK_BYTES / 4096) * 8, 4096) == VIRTIO_BLK_S_OK);
}

/* The device and its disk stay: small, and this program ends soon. */
static void block_down(void)
{
    pv_loop_stop(&block.loop);
    CHECK(!pthread_join(block.thread, NULL));
    drv_close(&block.drv);
}

/* ---- vsock ------------------------------------------------------------------------------------------------------- */

static struct {
    struct fe fe;
    uint32_t port, forwarded;
    int fd;
} vsock;

int __real_pv_vsock_run(struct pv_vsock *device, int *err);
int __wrap_pv_vsock_run(struct pv_vsock *device, int *err);

static void vsock_loop(void *device)
{
    int err;

    CHECK(!__real_pv_vsock_run(device, &err));
}

int __wrap_pv_vsock_run(struct pv_vsock *device, int *err)
{
    *err = 0;
    serve(vsock_loop, device);
    return 0;
}

static void vsock_up(void)
{
    fe_init(&vsock.fe);
    fe_open(&vsock.fe);
    sem_wait(&server.ready);
    fe_connect(&vsock.fe);
    fe_start(&vsock.fe);
    vsock.fd = host_open(&vsock.fe, 1024, &vsock.port);
    vsock.forwarded = 0;
}

/* A program of the host says 64 bytes, the guest says them again. */
static void vsock_once(unsigned i)
{
    static struct packet packet;
    uint8_t data[64] = {(uint8_t)i};

    host_write(vsock.fd, data, sizeof data);
    do
        fe_take(&vsock.fe, &packet);
    while (packet.hdr.op != VIRTIO_VSOCK_OP_RW);
    vsock.forwarded += packet.hdr.len;
    if (i % 512 == 0)
        fe_credit(&vsock.fe, 1024, vsock.port, 1U << 18, vsock.forwarded);
    fe_data(&vsock.fe, 1024, vsock.port, packet.data, packet.hdr.len);
    host_read(vsock.fd, data, sizeof data);
    CHECK(data[0] == (uint8_t)i);
}

static void vsock_down(void)
{
    struct packet *packet = malloc(sizeof *packet);

    close(vsock.fd);
    do
        fe_take(&vsock.fe, packet);
    while (packet->hdr.op != VIRTIO_VSOCK_OP_SHUTDOWN);
    free(packet);
    fe_down(&vsock.fe);
}

/* ---- faults ------------------------------------------------------------------------------------------------------ */

static struct {
    struct pv_fault *server;
    struct pv_pfdb *db;
    struct pv_space *space;
    volatile char *map;
    pthread_t thread;
    int pipe[2], served;
} fault;

static void fault_loop(void *ignored)
{
    int err;

    (void)ignored;
    CHECK(!pv_fault_run(fault.server, &err));
}

static void *fault_thread(void *ignored)
{
    (void)ignored;
    serve(fault_loop, NULL);
    return NULL;
}

int __real_ioctl(int fd, unsigned long request, ...);
int __wrap_ioctl(int fd, unsigned long request, ...);
int __wrap_ioctl(int fd, unsigned long request, ...)
{
    struct uffdio_copy *copy;
    void *argument;
    va_list rest;

    va_start(rest, request);
    argument = va_arg(rest, void *);
    va_end(rest);
    if (!counting || request != UFFDIO_COPY)
        return __real_ioctl(fd, request, argument);
    copy = argument;
    copy->copy = (int64_t)copy->len;
    eventfd_write(fault.served, 1);
    return 0;
}

static int template_file(void)
{
    int file = memfd_create("template", MFD_CLOEXEC);
    char page[PV_PAGE_SIZE];

    memset(page, 1, sizeof page);
    for (int i = 0; i < PAGES; i++)
        CHECK(write(file, page, sizeof page) == sizeof page);
    return file;
}

static void make_database(void)
{
    uint32_t vad;
    int err;

    CHECK(!pv_pfdb_create(memfd_create("pfdb", MFD_CLOEXEC), 2, PAGES + 1, &fault.db, &err));
    CHECK(!pv_space_create(fault.db, &fault.space, &err));
    CHECK(!pv_pfdb_add(fault.db, PV_SOURCE_FILE, 0, 0, PAGES, &vad, &err) && !pv_space_map(fault.space, 0, PAGES, vad, 0, &err));
}

static void fault_up(void)
{
    static int file = -1;
    size_t bytes = (size_t)PAGES * PV_PAGE_SIZE;
    int err, ram = memfd_create("ram", MFD_CLOEXEC);
    struct pv_fault_config config;

    if (file < 0) {
        file = template_file();
        make_database();
    }
    config = (struct pv_fault_config){fault.db, fault.space, bytes, 1, PAGES};
    CHECK(!ftruncate(ram, (off_t)bytes));
    fault.map = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, ram, 0);
    close(ram);
    CHECK(fault.map != MAP_FAILED && !pv_fault_create(&config, &fault.server, &err));
    CHECK(!pv_fault_add_source(fault.server, 0, PV_SOURCE_FILE, file, 0, &err));
    if (counting) {
        fault.served = eventfd(0, EFD_CLOEXEC);
        CHECK(!pipe2(fault.pipe, O_CLOEXEC | O_NONBLOCK));
        CHECK(!pv_fault_add_range(fault.server, fault.pipe[0], (uintptr_t)fault.map, bytes, 0, &err));
    } else {
        CHECK(!pv_fault_open_own(fault.server, -1, &err));
        CHECK(!pv_fault_register_own(fault.server, (void *)fault.map, bytes, 0, &err));
    }
    CHECK(!pthread_create(&fault.thread, NULL, fault_thread, NULL));
    sem_wait(&server.ready);
}

static void fault_once(unsigned i)
{
    struct uffd_msg message = {.event = UFFD_EVENT_PAGEFAULT};
    eventfd_t ignored;

    if (!counting) {
        CHECK(fault.map[(size_t)i % PAGES * PV_PAGE_SIZE] == 1);
        return;
    }
    message.arg.pagefault.address = (uintptr_t)fault.map + (size_t)i % PAGES * PV_PAGE_SIZE;
    CHECK(write(fault.pipe[1], &message, sizeof message) == sizeof message);
    eventfd_read(fault.served, &ignored);
}

static void fault_down(void)
{
    pv_fault_stop(fault.server);
    if (bench->context)
        pv_context_assign(server.workers, server.context, !server.place);
    CHECK(!pthread_join(fault.thread, NULL));
    pv_fault_destroy(fault.server);
    munmap((void *)fault.map, (size_t)PAGES * PV_PAGE_SIZE);
}

/* ---- cases ------------------------------------------------------------------------------------------------------- */

static const struct user {
    const char *name;
    void (*up)(void), (*once)(unsigned i), (*down)(void);
} USERS[] = {
    {"fault", fault_up, fault_once, fault_down},
    {"block", block_up, block_once, block_down},
    {"vsock", vsock_up, vsock_once, vsock_down},
};
enum { USER_COUNT = sizeof USERS / sizeof *USERS };

/* All operations; how long one took. */
static double operate(const struct user *user, unsigned operations)
{
    double start;

    user->up();
    if (bench->traced)
        pv_trace_use(&trace.hook);
    start = now(CLOCK_MONOTONIC);
    for (unsigned i = 0; i < operations; i++) {
        if (bench->moving && i % MOVE_EVERY == 0)
            follow((int)(i / MOVE_EVERY % 2));
        user->once(i);
    }
    start = now(CLOCK_MONOTONIC) - start;
    pv_trace_use(NULL);
    bind_thread(pthread_self(), 0);
    user->down();
    return start / operations;
}

static void set_up(void)
{
    struct pv_percpu *areas;
    pv_percpu_handle handle;
    cpu_set_t set;
    int err, found = 0;

    sched_getaffinity(0, sizeof set, &set);
    for (int cpu = 0; cpu < CPU_SETSIZE && found < 2; cpu++)
        if (CPU_ISSET(cpu, &set))
            cpus[found++] = cpu;
    cpus[1] = found < 2 ? cpus[0] : cpus[1];
    bind_thread(pthread_self(), 0);
    sem_init(&server.ready, 0, 0);
    CHECK(!pv_percpu_create(0, &areas, &err) && !pv_percpu_alloc(areas, 4096, &handle, &err));
    CHECK(!pv_percpu_get(areas, handle, &users_counts, &err) && !pv_trace_create(areas, 4096, &trace, &err));
}

static int count(const char *user, const char *name, unsigned operations)
{
    counting = true;
    set_up();
    for (int u = 0; u < USER_COUNT; u++)
        for (int c = 0; c < CASE_COUNT; c++)
            if (!strcmp(USERS[u].name, user) && !strcmp(CASES[c].name, name)) {
                bench = &CASES[c];
                operate(&USERS[u], operations);
                return 0;
            }
    fprintf(stderr, "percpu_users: no such user or case\n");
    return 2;
}

int main(int argc, char **argv)
{
    if (argc == 5 && !strcmp(argv[1], "count"))
        return count(argv[2], argv[3], (unsigned)atoi(argv[4]));
    set_up();
    for (int u = 0; u < USER_COUNT; u++)
        for (int c = 0; c < CASE_COUNT; c++) {
            bench = &CASES[c];
            printf("%s %s %.1f\n", USERS[u].name, bench->name, operate(&USERS[u], OPERATIONS));
            if (bench->where == SAME && !bench->context)
                printf("%s %s_cpu %.1f\n", USERS[u].name, bench->name, server.cpu_ns / OPERATIONS);
            fflush(stdout);
        }
    return 0;
}
