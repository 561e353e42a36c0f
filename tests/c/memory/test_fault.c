/* The fault server with real userfaultfds: touches from several threads and mappings, removal, short sources, succession. */
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../../../csrc/common/cleanup.h"
#include "../../../csrc/memory/fault.h"

#define CHECK(condition)                                                                   \
    do {                                                                                   \
        if (!(condition)) {                                                                \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);                \
            exit(1);                                                                       \
        }                                                                                  \
    } while (0)

enum { PAGES = 512, WORDS = PV_PAGE_SIZE / 8 };
#define BYTES ((uint64_t)PAGES * PV_PAGE_SIZE)

struct vm {
    int db_fd, template, ram;
    struct pv_pfdb *db;
    struct pv_space *space;
    struct pv_fault *server;
    uint64_t *map, *second; /* two mappings of RAM, each with a userfaultfd of its own */
    pthread_t thread;
    int result, err;
};

static uint64_t pattern(uint64_t page) { return page * 0x9e3779b97f4a7c15u + 1; }

static int make_template(void)
{
    int fd = memfd_create("template", MFD_CLOEXEC);
    uint64_t words[WORDS];

    CHECK(fd >= 0);
    for (uint64_t page = 0; page < PAGES; page++) {
        for (int i = 0; i < WORDS; i++)
            words[i] = pattern(page);
        CHECK(write(fd, words, sizeof words) == sizeof words);
    }
    return fd;
}

/* RAM: the first half and the last quarter from the template, zeroes between. */
static void map_sources(struct vm *vm)
{
    uint32_t file, zero;
    int err = 0;

    CHECK(!pv_pfdb_add(vm->db, PV_SOURCE_FILE, 3, 0, PAGES, &file, &err));
    CHECK(!pv_pfdb_add(vm->db, PV_SOURCE_ZERO, 0, 0, PAGES / 4, &zero, &err));
    CHECK(!pv_space_map(vm->space, 0, PAGES / 2, file, 0, &err));
    CHECK(!pv_space_map(vm->space, BYTES / 2, PAGES / 4, zero, 0, &err));
    CHECK(!pv_space_map(vm->space, BYTES / 4 * 3, PAGES / 4, file, PAGES / 4 * 3, &err));
}

static uint64_t expected(uint64_t page)
{
    return page >= PAGES / 2 && page < PAGES / 4 * 3 ? 0 : pattern(page);
}

static void *map_ram(struct vm *vm)
{
    void *map = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, vm->ram, 0);

    CHECK(map != MAP_FAILED);
    return map;
}

static void make_server(struct vm *vm, uint32_t around)
{
    struct pv_fault_config config = {vm->db, vm->space, BYTES, around, PAGES};
    int err = 0;

    CHECK(!pv_fault_create(&config, &vm->server, &err));
    CHECK(!pv_fault_add_source(vm->server, 3, PV_SOURCE_FILE, vm->template, 0, &err));
}

static struct vm *make_vm(uint32_t around)
{
    struct vm *vm = calloc(1, sizeof *vm);
    int err = 0;

    CHECK(vm);
    vm->db_fd = memfd_create("pfdb", MFD_CLOEXEC);
    vm->ram = memfd_create("ram", MFD_CLOEXEC);
    CHECK(vm->ram >= 0 && !ftruncate(vm->ram, BYTES));
    vm->template = make_template();
    CHECK(!pv_pfdb_create(vm->db_fd, 8, 4 * PAGES, &vm->db, &err) && !pv_space_create(vm->db, &vm->space, &err));
    map_sources(vm);
    make_server(vm, around);
    vm->map = map_ram(vm);
    vm->second = map_ram(vm);
    CHECK(!pv_fault_open_own(vm->server, -1, &err));
    CHECK(!pv_fault_register_own(vm->server, vm->map, BYTES, 0, &err));
    CHECK(!pv_fault_map_hook(vm->server, 1, vm->second, BYTES, 0));
    return vm;
}

static void *serve(void *argument)
{
    struct vm *vm = argument;

    vm->result = pv_fault_run(vm->server, &vm->err);
    return NULL;
}

static void start(struct vm *vm) { CHECK(!pthread_create(&vm->thread, NULL, serve, vm)); }

static void stop(struct vm *vm)
{
    pv_fault_stop(vm->server);
    pthread_join(vm->thread, NULL);
    CHECK(vm->result == 0);
}

static void free_vm(struct vm *vm)
{
    pv_fault_destroy(vm->server);
    pv_space_destroy(vm->space);
    pv_pfdb_close(vm->db);
    munmap(vm->map, BYTES);
    munmap(vm->second, BYTES);
    close(vm->ram);
    close(vm->template);
    close(vm->db_fd);
    free(vm);
}

static void check_page(const uint64_t *map, uint64_t page)
{
    const volatile uint64_t *words = map + page * WORDS;

    CHECK(words[0] == expected(page) && words[WORDS - 1] == expected(page));
}

struct toucher {
    const uint64_t *map;
    unsigned seed;
};

static void *touch_all(void *argument)
{
    struct toucher *t = argument;
    uint64_t step = 2 * (t->seed % 100) + 1, page = t->seed; /* odd: visits every page */

    for (int i = 0; i < PAGES; i++, page += step)
        check_page(t->map, page % PAGES);
    return NULL;
}

static void test_every_page_from_every_side(uint32_t around)
{
    struct vm *vm = make_vm(around);
    struct toucher touchers[4] = {{vm->map, 1}, {vm->second, 1}, {vm->map, 77}, {vm->second, 300}};
    pthread_t threads[4];
    struct pv_fault_stats stats;

    start(vm);
    for (int i = 0; i < 4; i++)
        CHECK(!pthread_create(&threads[i], NULL, touch_all, &touchers[i]));
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
    stop(vm);
    pv_fault_stats(vm->server, &stats);
    CHECK(stats.pages_copied + stats.pages_zeroed == PAGES);
    CHECK(stats.pages_zeroed == PAGES / 4);
    CHECK(around == 1 ? stats.faults >= PAGES : stats.faults < PAGES / 2);
    free_vm(vm);
}

static void test_guest_writes_are_kept(void)
{
    struct vm *vm = make_vm(16);

    start(vm);
    vm->map[5 * WORDS + 3] = 42;
    CHECK(vm->second[5 * WORDS + 3] == 42 && vm->second[5 * WORDS + 4] == pattern(5));
    stop(vm);
    free_vm(vm);
}

static void test_prefetch(void)
{
    struct vm *vm = make_vm(1);
    uint32_t list[] = {7, 8, 9, 100, PAGES / 2, 3, 3, PAGES + 5, 4}, recorded[8];
    struct pv_fault_stats stats;

    start(vm);
    CHECK(pv_fault_prefetch(vm->server, list, 9) == 7); /* list[4] is one of zeroes */
    for (uint64_t i = 0; i < 5; i++)
        check_page(vm->map, list[i]);
    check_page(vm->second, 4);
    pv_fault_stats(vm->server, &stats);
    CHECK(stats.prefetched == 7 && stats.pages_zeroed == 1 && stats.faults == 0);
    check_page(vm->map, 200);
    check_page(vm->map, 10);
    stop(vm);
    CHECK(pv_fault_recorded(vm->server, recorded, 8) == 2 && recorded[0] == 200 && recorded[1] == 10);
    free_vm(vm);
}

/* QEMU's side asks for REMOVE events; here the preloaded library's part is played by hand. */
static int register_with_events(void *map)
{
    int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_EVENT_REMOVE};
    struct uffdio_register registration = {{(uintptr_t)map, BYTES}, UFFDIO_REGISTER_MODE_MISSING, 0};

    CHECK(uffd >= 0 && !ioctl(uffd, UFFDIO_API, &api) && !ioctl(uffd, UFFDIO_REGISTER, &registration));
    return uffd;
}

static void test_a_removed_page_is_zero_from_then_on(void)
{
    struct vm *vm = make_vm(16);
    uint64_t *third = map_ram(vm);
    struct pv_fault_stats stats;
    int err = 0;

    CHECK(!pv_fault_add_range(vm->server, register_with_events(third), (uintptr_t)third, BYTES, 0, &err));
    start(vm);
    CHECK(third[WORDS] == pattern(1));
    CHECK(!madvise(third, 8 * PV_PAGE_SIZE, MADV_REMOVE));
    CHECK(third[WORDS] == 0 && vm->map[2 * WORDS] == 0 && vm->second[7 * WORDS] == 0 && third[8 * WORDS] == pattern(8));
    stop(vm);
    pv_fault_stats(vm->server, &stats);
    CHECK(stats.removed_pages == 8);
    munmap(third, BYTES);
    free_vm(vm);
}

/* In a child, because its toucher stays suspended: that is the promise. */
static void *touch_one(void *argument)
{
    const volatile uint64_t *word = argument;

    CHECK(*word == 0 && !"a page was invented");
    return NULL;
}

static void expect_reason(int truncate_template, uint64_t page, const char *reason)
{
    struct vm *vm = make_vm(1);
    pthread_t thread;
    uint64_t unmapped;

    if (truncate_template) {
        pv_fault_destroy(vm->server);
        CHECK(!ftruncate(vm->template, 10 * PV_PAGE_SIZE + 100));
        make_server(vm, 1);
        CHECK(!pv_fault_open_own(vm->server, -1, &vm->err));
        CHECK(!pv_fault_register_own(vm->server, vm->map, BYTES, 0, &vm->err));
    } else {
        CHECK(!pv_space_unmap(vm->space, page << PV_PAGE_SHIFT, 1, &unmapped, &vm->err) && unmapped == 1);
    }
    CHECK(!pthread_create(&thread, NULL, touch_one, vm->map + page * WORDS));
    CHECK(pv_fault_run(vm->server, &vm->err) == -1 && vm->err == EIO);
    CHECK(strstr(pv_fault_reason(vm->server), reason));
    _exit(0);
}

static void in_a_child(void (*body)(void))
{
    pid_t pid = fork();
    int status;

    CHECK(pid >= 0);
    if (!pid) {
        body();
        _exit(0);
    }
    CHECK(waitpid(pid, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

/* A source that ends while it is asked: the server stops with the reason, and nobody sees an invented page. */
static void remote_source_ends(void)
{
    struct vm *vm = make_vm(1);
    uint32_t vad;
    uint64_t unmapped;
    pthread_t thread;
    int pair[2];

    CHECK(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair));
    CHECK(!pv_fault_add_source(vm->server, 5, PV_SOURCE_REMOTE, pair[0], BYTES, &vm->err));
    CHECK(!pv_pfdb_add(vm->db, PV_SOURCE_REMOTE, 5, 0, 4, &vad, &vm->err));
    CHECK(!pv_space_unmap(vm->space, 0, 4, &unmapped, &vm->err));
    CHECK(!pv_space_map(vm->space, 0, 4, vad, 0, &vm->err));
    close(pair[1]);
    CHECK(!pthread_create(&thread, NULL, touch_one, vm->map));
    CHECK(pv_fault_run(vm->server, &vm->err) == -1 && vm->err == EIO);
    CHECK(strstr(pv_fault_reason(vm->server), "source 5: the other side"));
    _exit(0);
}

static void *remap_all(void *argument)
{
    struct vm *vm = argument;
    uint64_t unmapped;
    uint32_t vad;
    int err;

    CHECK(!pv_pfdb_add(vm->db, PV_SOURCE_FILE, 3, 0, PAGES / 2, &vad, &err));
    for (int i = 0; i < 2000; i++) {
        uint64_t at = (uint64_t)(i % 32) * 8 << PV_PAGE_SHIFT; /* pages that were touched already, below the storm's */

        CHECK(!pv_space_unmap(vm->space, at, 8, &unmapped, &err) && unmapped == 8);
        CHECK(!pv_space_map(vm->space, at, 8, vad, (uint32_t)(i % 32) * 8, &err));
    }
    return NULL;
}

/* Mappings change while every page is asked for: a mapper never makes a fault wrong, nor a fault a mapper wait for ever. */
static void test_unmap_under_load(void)
{
    struct vm *vm = make_vm(1);
    struct toucher touchers[2] = {{vm->map, 3}, {vm->second, 150}};
    pthread_t threads[2], mapper;

    start(vm);
    for (uint64_t page = 0; page < 256; page++)
        check_page(vm->map, page);
    CHECK(!pthread_create(&mapper, NULL, remap_all, vm));
    for (int i = 0; i < 2; i++)
        CHECK(!pthread_create(&threads[i], NULL, touch_all, &touchers[i]));
    for (int i = 0; i < 2; i++)
        pthread_join(threads[i], NULL);
    pthread_join(mapper, NULL);
    stop(vm);
    free_vm(vm);
}

/* Another process that takes the question and never answers it. */
static void remote_source_is_silent(void)
{
    struct vm *vm = make_vm(1);
    uint32_t vad;
    uint64_t unmapped;
    pthread_t thread;
    int pair[2];

    CHECK(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair));
    CHECK(!pv_fault_add_source(vm->server, 5, PV_SOURCE_REMOTE, pair[0], BYTES, &vm->err));
    CHECK(!pv_pfdb_add(vm->db, PV_SOURCE_REMOTE, 5, 0, 4, &vad, &vm->err));
    CHECK(!pv_space_unmap(vm->space, 0, 4, &unmapped, &vm->err));
    CHECK(!pv_space_map(vm->space, 0, 4, vad, 0, &vm->err));
    CHECK(!pthread_create(&thread, NULL, touch_one, vm->map));
    CHECK(pv_fault_run(vm->server, &vm->err) == -1 && vm->err == EIO);
    CHECK(strstr(pv_fault_reason(vm->server), "source 5: the other side did not answer in"));
    _exit(0);
}

struct meeting {
    const struct vm *vm;
    const uint64_t *map;
    pthread_barrier_t *barrier;
};

static void *touch_together(void *argument)
{
    struct meeting *m = argument;

    for (uint64_t page = 0; page < PAGES; page++) {
        pthread_barrier_wait(m->barrier);
        check_page(m->map, page);
    }
    return NULL;
}

/* Every page is asked for by six threads at the same moment, through both mappings: one copy is made, the others find it there. */
static void test_many_threads_on_one_page(void)
{
    enum { THREADS = 6 };
    struct vm *vm = make_vm(1);
    struct meeting meetings[THREADS];
    struct pv_fault_stats stats;
    pthread_barrier_t barrier;
    pthread_t threads[THREADS];

    pthread_barrier_init(&barrier, NULL, THREADS);
    start(vm);
    for (int i = 0; i < THREADS; i++) {
        meetings[i] = (struct meeting){vm, i % 2 ? vm->second : vm->map, &barrier};
        CHECK(!pthread_create(&threads[i], NULL, touch_together, &meetings[i]));
    }
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    stop(vm);
    pv_fault_stats(vm->server, &stats);
    CHECK(stats.pages_copied + stats.pages_zeroed == PAGES);
    CHECK(stats.faults - stats.already_there <= PAGES); /* what came second was told EEXIST and only woken */
    pthread_barrier_destroy(&barrier);
    free_vm(vm);
}

struct storm {
    const uint64_t *map;
    _Atomic(int) *over;
    unsigned seed;
};

static void *touch_until_over(void *argument)
{
    struct storm *s = argument;

    while (!atomic_load(s->over)) {
        uint64_t page = (uint64_t)rand_r(&s->seed) % (PAGES / 2), word = *(const volatile uint64_t *)(s->map + page * WORDS);

        CHECK(word == 0 || word == pattern(page));
    }
    return NULL;
}

/* Pages are removed (the mapping changes: EAGAIN) while they are being touched: a removed page never has the template's data again. */
static void test_removal_under_load(void)
{
    struct vm *vm = make_vm(1);
    uint64_t *third = map_ram(vm);
    _Atomic(int) over = 0;
    struct storm storms[2] = {{third, &over, 1}, {vm->map, &over, 2}};
    pthread_t threads[2];
    unsigned seed = 3;
    int err = 0;

    CHECK(!pv_fault_add_range(vm->server, register_with_events(third), (uintptr_t)third, BYTES, 0, &err));
    start(vm);
    for (int i = 0; i < 2; i++)
        CHECK(!pthread_create(&threads[i], NULL, touch_until_over, &storms[i]));
    for (int i = 0; i < 1000; i++) {
        uint64_t page = (uint64_t)rand_r(&seed) % (PAGES / 2 - 4);

        CHECK(!madvise(third + page * WORDS, 4 * PV_PAGE_SIZE, MADV_REMOVE));
        for (uint64_t p = page; p < page + 4; p++)
            CHECK(*(volatile uint64_t *)(third + p * WORDS) == 0);
    }
    atomic_store(&over, 1);
    for (int i = 0; i < 2; i++)
        pthread_join(threads[i], NULL);
    stop(vm);
    munmap(third, BYTES);
    free_vm(vm);
}

static void *remap_odd_blocks(void *argument)
{
    struct vm *vm = argument;
    uint64_t unmapped;
    uint32_t vad;
    int err;

    CHECK(!pv_pfdb_add(vm->db, PV_SOURCE_FILE, 3, 0, PAGES / 2, &vad, &err));
    for (int i = 0; i < 1000; i++) {
        uint32_t page = (uint32_t)(i % 16) * 16 + 8;

        CHECK(!pv_space_unmap(vm->space, (uint64_t)page << PV_PAGE_SHIFT, 8, &unmapped, &err) && unmapped == 8);
        CHECK(!pv_space_map(vm->space, (uint64_t)page << PV_PAGE_SHIFT, 8, vad, page, &err));
    }
    return NULL;
}

/* Pages that are not there yet lose their mapping and get another while faults on their neighbours would fill them as well. */
static void test_unmap_of_absent_pages_under_load(void)
{
    struct vm *vm = make_vm(16);
    pthread_t mapper;

    start(vm);
    CHECK(!pthread_create(&mapper, NULL, remap_odd_blocks, vm));
    for (uint64_t block = 0; block < PAGES / 2; block += 16)
        for (uint64_t page = block; page < block + 8; page++)
            check_page(page % 2 ? vm->map : vm->second, page);
    pthread_join(mapper, NULL);
    for (uint64_t page = 0; page < PAGES; page++)
        check_page(vm->map, page);
    stop(vm);
    free_vm(vm);
}

static void short_source(void) { expect_reason(1, 10, "ends at byte 40960"); }
static void unmapped_page(void) { expect_reason(0, 33, "nothing is mapped at guest address 0x21000"); }

/* A predecessor reads a fault and dies; its successor, with the same descriptor, wakes the range and serves. */
static void test_succession(void)
{
    struct vm *vm = make_vm(16);
    int uffd = register_with_events(vm->second = map_ram(vm)), err = 0;
    struct toucher toucher = {vm->second, 9};
    struct pollfd polled = {uffd, POLLIN, 0};
    struct uffd_msg lost;
    pthread_t thread;

    CHECK(!pthread_create(&thread, NULL, touch_all, &toucher));
    CHECK(poll(&polled, 1, 5000) == 1 && read(uffd, &lost, sizeof lost) == sizeof lost);
    CHECK(!pv_fault_add_range(vm->server, uffd, (uintptr_t)vm->second, BYTES, 0, &err));
    pv_fault_wake_all(vm->server);
    start(vm);
    pthread_join(thread, NULL);
    stop(vm);
    free_vm(vm);
}

static void test_bad_input(void)
{
    struct vm *vm = make_vm(1);
    struct pv_fault_config config = {vm->db, vm->space, BYTES, 3, 0};
    struct pv_fault *server;
    int err, last = -1;

#define REFUSED(code, call) (err = 0, (call) == -1 && err == (code))
    CHECK(REFUSED(EINVAL, pv_fault_create(&config, &server, &err)));
    config.around_pages = 1;
    config.ram_bytes = 100;
    CHECK(REFUSED(EINVAL, pv_fault_create(&config, &server, &err)));
    CHECK(REFUSED(EEXIST, pv_fault_add_source(vm->server, 3, PV_SOURCE_FILE, vm->template, 0, &err)));
    CHECK(REFUSED(EINVAL, pv_fault_add_source(vm->server, PV_FAULT_SOURCES, PV_SOURCE_FILE, vm->template, 0, &err)));
    CHECK(REFUSED(EBADF, pv_fault_add_source(vm->server, 4, PV_SOURCE_FILE, -1, 0, &err)));
    CHECK(REFUSED(EINVAL, pv_fault_add_range(vm->server, 0, PV_PAGE_SIZE, BYTES, PV_PAGE_SIZE, &err)));
    CHECK(REFUSED(EINVAL, pv_fault_add_range(vm->server, 0, 1, PV_PAGE_SIZE, 0, &err)));
    CHECK(REFUSED(EINVAL, pv_fault_add_range(vm->server, 0, UINT64_MAX - PV_PAGE_SIZE + 1, PV_PAGE_SIZE, 0, &err)));
    for (int i = 0; i < PV_FAULT_UFFDS - 1; i++)
        CHECK(!pv_fault_add_range(vm->server, last = dup(vm->ram), PV_PAGE_SIZE, PV_PAGE_SIZE, 0, &err));
    CHECK(REFUSED(ENOSPC, pv_fault_add_range(vm->server, 0, PV_PAGE_SIZE, PV_PAGE_SIZE, 0, &err)));
    for (int i = 2 + PV_FAULT_UFFDS - 1; i < PV_FAULT_RANGES; i++)
        CHECK(!pv_fault_add_range(vm->server, last, PV_PAGE_SIZE * (uint64_t)i, PV_PAGE_SIZE, 0, &err));
    pv_fault_map_hook(vm->server, 0, vm->second, BYTES, 0);
    CHECK(!pv_fault_add_range(vm->server, last, BYTES, PV_PAGE_SIZE, 0, &err));
    CHECK(pv_fault_map_hook(vm->server, 1, vm->second, BYTES, 0) == ENOSPC);
    free_vm(vm);
}

int main(void)
{
    int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);

    if (uffd < 0) {
        printf("fault: SKIPPED: userfaultfd: %s\n", strerror(errno));
        return 0;
    }
    close(uffd);
    test_bad_input();
    test_every_page_from_every_side(1);
    test_every_page_from_every_side(16);
    test_guest_writes_are_kept();
    test_prefetch();
    test_a_removed_page_is_zero_from_then_on();
    test_unmap_under_load();
    test_unmap_of_absent_pages_under_load();
    test_many_threads_on_one_page();
    test_removal_under_load();
    in_a_child(remote_source_ends);
    in_a_child(remote_source_is_silent);
    in_a_child(short_source);
    in_a_child(unmapped_page);
    for (int i = 0; i < 50; i++)
        test_succession();
    puts("fault: all passed");
    return 0;
}
