/* A userfaultfd fault end to end: our server beside a bare handler that looks nothing up, at each placement of the handler.
 *
 * faults [ROUNDS]: one line a case and round: handler, placement, microseconds a touched page. The cases take turns. Both copy the
 * same pages of the same file, one page a fault, in the same scattered order; the toucher stays on the first allowed CPU.
 * Placements: "same" CPU as the toucher, "free" (the kernel's choice, as in vmx), "other" CPU.
 */
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

#include "../../csrc/memory/fault.h"

enum { PAGES = 8192, STEP = 1237 }; /* the step is odd: every page is visited */
#define BYTES ((size_t)PAGES * PV_PAGE_SIZE)

struct bench {
    int file;
    const char *data;
    struct pv_pfdb *db;
    struct pv_space *space;
    cpu_set_t allowed;
    int cpus[2];
};

struct handler {
    const struct bench *bench;
    struct pv_fault *server; /* NULL: the bare one */
    int uffd, stop;
    uintptr_t start;
    const char *placement;
};

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static void stay_on(int cpu)
{
    cpu_set_t set;

    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    if (sched_setaffinity(0, sizeof set, &set))
        die("sched_setaffinity");
}

static void serve_bare(const struct handler *h)
{
    struct pollfd polled[2] = {{h->stop, POLLIN, 0}, {h->uffd, POLLIN, 0}};
    struct uffd_msg message;

    while (poll(polled, 2, -1) >= 0 && !polled[0].revents) {
        struct uffdio_copy copy = {.len = PV_PAGE_SIZE};

        if (read(h->uffd, &message, sizeof message) != sizeof message)
            continue;
        copy.dst = message.arg.pagefault.address & ~(uint64_t)(PV_PAGE_SIZE - 1);
        copy.src = (uintptr_t)h->bench->data + (copy.dst - h->start);
        if (ioctl(h->uffd, UFFDIO_COPY, &copy))
            die("UFFDIO_COPY");
    }
}

static void *serve(void *argument)
{
    const struct handler *h = argument;
    int err;

    if (!strcmp(h->placement, "same"))
        stay_on(h->bench->cpus[0]);
    else if (!strcmp(h->placement, "other"))
        stay_on(h->bench->cpus[1]);
    else
        sched_setaffinity(0, sizeof h->bench->allowed, &h->bench->allowed);
    if (!h->server)
        serve_bare(h);
    else if (pv_fault_run(h->server, &err))
        fprintf(stderr, "%s\n", pv_fault_reason(h->server));
    return NULL;
}

static void start_bare(struct handler *h, void *map)
{
    struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_MISSING_SHMEM};
    struct uffdio_register registration = {{(uintptr_t)map, BYTES}, UFFDIO_REGISTER_MODE_MISSING, 0};

    h->uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    h->stop = eventfd(0, EFD_CLOEXEC);
    if (h->uffd < 0 || h->stop < 0 || ioctl(h->uffd, UFFDIO_API, &api) || ioctl(h->uffd, UFFDIO_REGISTER, &registration))
        die("userfaultfd");
}

static void start_ours(struct handler *h, void *map)
{
    struct pv_fault_config config = {h->bench->db, h->bench->space, BYTES, 1, PAGES};
    int err = 0;

    if (pv_fault_create(&config, &h->server, &err) || pv_fault_add_source(h->server, 0, PV_SOURCE_FILE, h->bench->file, 0, &err) ||
        pv_fault_open_own(h->server, -1, &err) || pv_fault_register_own(h->server, map, BYTES, 0, &err)) {
        errno = err;
        die("fault server");
    }
}

static void end(struct handler *h)
{
    if (h->server) {
        pv_fault_destroy(h->server);
    } else {
        close(h->uffd);
        close(h->stop);
    }
}

static double touch_all(const char *map)
{
    struct timespec start, stop;

    clock_gettime(CLOCK_MONOTONIC, &start);
    for (size_t i = 0, page = 0; i < PAGES; i++, page = (page + STEP) % PAGES)
        if (*(const volatile char *)(map + page * PV_PAGE_SIZE) != (char)(page % 127 + 1))
            abort();
    clock_gettime(CLOCK_MONOTONIC, &stop);
    return ((double)(stop.tv_sec - start.tv_sec) * 1e6 + (double)(stop.tv_nsec - start.tv_nsec) / 1e3) / PAGES;
}

static void measure(const struct bench *bench, int ours, const char *placement)
{
    struct handler h = {.bench = bench, .placement = placement};
    int ram = memfd_create("ram", MFD_CLOEXEC);
    pthread_t thread;
    void *map;

    if (ram < 0 || ftruncate(ram, BYTES))
        die("memfd");
    map = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, ram, 0);
    if (map == MAP_FAILED)
        die("mmap");
    h.start = (uintptr_t)map;
    (ours ? start_ours : start_bare)(&h, map);
    pthread_create(&thread, NULL, serve, &h);
    printf("%s %s %.2f\n", ours ? "server" : "bare", placement, touch_all(map));
    if (ours)
        pv_fault_stop(h.server);
    else
        eventfd_write(h.stop, 1);
    pthread_join(thread, NULL);
    end(&h);
    munmap(map, BYTES);
    close(ram);
}

/* 64 VADs, as a template has pieces. */
static void set_up(struct bench *bench)
{
    int err = 0, count = 0;
    char page[PV_PAGE_SIZE];

    bench->file = memfd_create("template", MFD_CLOEXEC);
    for (int i = 0; i < PAGES; i++) {
        memset(page, i % 127 + 1, sizeof page);
        if (write(bench->file, page, sizeof page) != sizeof page)
            die("template");
    }
    bench->data = mmap(NULL, BYTES, PROT_READ, MAP_SHARED | MAP_POPULATE, bench->file, 0);
    if (pv_pfdb_create(memfd_create("pfdb", MFD_CLOEXEC), 65, PAGES + 1, &bench->db, &err) ||
        pv_space_create(bench->db, &bench->space, &err))
        die("database");
    for (uint64_t i = 0; i < 64; i++) {
        uint64_t at = i * BYTES / 64;
        uint32_t vad;

        if (pv_pfdb_add(bench->db, PV_SOURCE_FILE, 0, at, PAGES / 64, &vad, &err) ||
            pv_space_map(bench->space, at, PAGES / 64, vad, 0, &err))
            die("mapping");
    }
    sched_getaffinity(0, sizeof bench->allowed, &bench->allowed);
    for (int cpu = 0; cpu < CPU_SETSIZE && count < 2; cpu++)
        if (CPU_ISSET(cpu, &bench->allowed))
            bench->cpus[count++] = cpu;
    if (count == 1)
        bench->cpus[1] = bench->cpus[0];
    stay_on(bench->cpus[0]);
}

int main(int argc, char **argv)
{
    static const char *const placements[] = {"same", "free", "other"};
    struct bench bench = {0};

    set_up(&bench);
    for (int round = argc > 1 ? atoi(argv[1]) : 3; round > 0; round--)
        for (int p = 0; p < 3; p++)
            for (int ours = 0; ours < 2; ours++)
                measure(&bench, ours, placements[p]);
    return 0;
}
