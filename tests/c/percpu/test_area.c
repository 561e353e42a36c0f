/* Areas, handles, memory, iteration: what is promised in percpu.h, and what happens to bad input. */
#include <fcntl.h>
#include <sys/mman.h>

#include "check.h"
#include "percpu/rooms.h"

static void run_on(int cpu)
{
    cpu_set_t set;

    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    CHECK(!sched_setaffinity(0, sizeof set, &set));
}

static uint64_t memory_of(const struct pv_percpu *areas)
{
    struct pv_percpu_stats stats;

    pv_percpu_get_stats(areas, &stats);
    return stats.memory_bytes;
}

static void test_same_handle_on_every_cpu(void)
{
    struct pv_percpu *areas = areas_for(0);
    pv_percpu_handle handle = item(areas, 8);
    struct pv_percpu_ref ref = get(areas, handle);
    int cpus[64], count = usable_cpus(cpus, 64);
    cpu_set_t all;

    CHECK(!sched_getaffinity(0, sizeof all, &all));
    for (int i = 0; i < count; i++) {
        run_on(cpus[i]);
        CHECK(!pv_percpu_add(ref, i + 1));
    }
    for (int i = 0; i < count && PV_HAS_SEQUENCES && pv_rseq_origin() != PV_RSEQ_NONE; i++)
        CHECK(*(int64_t *)pv_percpu_at(ref, (uint32_t)cpus[i]) == i + 1);
    CHECK(sum_of(areas, handle) == count * (count + 1) / 2);
    CHECK(!sched_setaffinity(0, sizeof all, &all));
    pv_percpu_destroy(areas);
}

static void test_load_store_cas(void)
{
    struct pv_percpu *areas = areas_for(0);
    struct pv_percpu_ref ref = get(areas, item(areas, 8));
    int cpus[64];
    uint64_t seen;
    cpu_set_t all;

    CHECK(!sched_getaffinity(0, sizeof all, &all));
    usable_cpus(cpus, 64);
    run_on(cpus[0]);
    CHECK(!pv_percpu_store(ref, 5) && !pv_percpu_load(ref, &seen) && seen == 5);
    CHECK(pv_percpu_cas(ref, 4, 9, &seen) == 0 && seen == 5);
    CHECK(pv_percpu_cas(ref, 5, UINT64_MAX, &seen) == 1);
    CHECK(!pv_percpu_add(ref, 2) && !pv_percpu_load(ref, &seen) && seen == 1); /* modulo 2^64 */
    CHECK(!pv_percpu_add(ref, INT64_MIN) && !pv_percpu_load(ref, &seen) && seen == (1ULL << 63) + 1);
    CHECK(!sched_setaffinity(0, sizeof all, &all));
    pv_percpu_destroy(areas);
}

static void test_memory_for_cpus_in_use_only(void)
{
    struct pv_percpu *areas = areas_for(4096);
    pv_percpu_handle handle = item(areas, 4096);
    uint64_t before = memory_of(areas);

    CHECK(pv_percpu_next(areas, get(areas, handle), 0) == -1 && sum_of(areas, handle) == 0);
    CHECK(memory_of(areas) == before && before <= 12 * 4096);
    CHECK(!pv_percpu_add(get(areas, handle), 7));
    CHECK(sum_of(areas, handle) == 7);
    CHECK(memory_of(areas) <= before + 3 * 4096); /* a page, and one more should the thread have been moved */
    pv_percpu_destroy(areas);
}

static void test_freed_handles(void)
{
    struct pv_percpu *areas = areas_for(0);
    pv_percpu_handle handle = item(areas, 8), other;
    struct pv_percpu_ref ref = get(areas, handle), again;
    struct pv_percpu_node node, *popped;
    uint64_t value = 0;
    int64_t sum;
    int err = 0;

    CHECK(!pv_percpu_add(ref, 3) && !pv_percpu_free(areas, handle, &err));
    CHECK(pv_percpu_add(ref, 1) == -1 && pv_percpu_load(ref, &value) == -1 && pv_percpu_store(ref, 1) == -1);
    CHECK(pv_percpu_cas(ref, 0, 1, &value) == -1 && pv_percpu_push(ref, &node) == -1);
    CHECK(pv_percpu_pop(ref, &popped) == -1 && pv_percpu_take(ref, &popped) == -1);
    CHECK(pv_percpu_stack_push(ref, 4, &node) == -1 && pv_percpu_stack_pop(ref, (void **)&popped) == -1);
    CHECK(pv_percpu_free(areas, handle, &err) == -1 && err == ESTALE);
    CHECK(pv_percpu_get(areas, handle, &again, &err) == -1 && err == ESTALE);
    CHECK(pv_percpu_sum(areas, handle, &sum, &err) == -1 && err == ESTALE);
    other = item(areas, 8);
    CHECK(get(areas, other).base == ref.base && sum_of(areas, other) == 0); /* the same memory, zero again */
    CHECK(pv_percpu_add(ref, 1) == -1 && sum_of(areas, other) == 0);
    pv_percpu_destroy(areas);
}

/* A slot is used again when all others have been: its handles of before stay invalid. */
static void test_slot_used_again(void)
{
    struct pv_percpu *areas = areas_for(1);
    pv_percpu_handle first = item(areas, 8), handle;
    struct pv_percpu_ref ref;
    int err = 0;

    CHECK(!pv_percpu_free(areas, first, &err));
    do {
        handle = item(areas, 8);
        CHECK(handle != first);
        CHECK(pv_percpu_get(areas, first, &ref, &err) == -1 && err == ESTALE);
        CHECK((uint32_t)handle == (uint32_t)first || !pv_percpu_free(areas, handle, &err));
    } while ((uint32_t)handle != (uint32_t)first);
    CHECK(pv_percpu_free(areas, first, &err) == -1 && err == ESTALE && sum_of(areas, handle) == 0);
    pv_percpu_destroy(areas);
}

static void test_bad_handles(void)
{
    struct pv_percpu *areas = areas_for(0);
    pv_percpu_handle handle = item(areas, 8), bad[] = {0, handle + 1, handle + (1ULL << 32), UINT64_MAX, PV_PERCPU_SLOTS};
    struct pv_percpu_ref ref;
    int err = 0;

    for (unsigned i = 0; i < sizeof bad / sizeof *bad; i++)
        CHECK(pv_percpu_get(areas, bad[i], &ref, &err) == -1 && err == ESTALE);
    CHECK(pv_percpu_alloc(areas, 0, &handle, &err) == -1 && err == EINVAL);
    CHECK(pv_percpu_alloc(areas, PV_PERCPU_MAX_BYTES + 1, &handle, &err) == -1 && err == EINVAL);
    CHECK(pv_percpu_create(65537, &areas, &err) == -1 && err == EINVAL);
    pv_percpu_destroy(areas);
}

static void test_until_full(void)
{
    struct pv_percpu *areas = areas_for(0);
    pv_percpu_handle handle, last = 0;
    int err = 0, count = 0;

    while (!pv_percpu_alloc(areas, 4096, &handle, &err)) {
        last = handle;
        count++;
    }
    CHECK(count == PV_PERCPU_MAX_BYTES / 4096 && err == ENOMEM);
    CHECK(!pv_percpu_free(areas, last, &err) && !pv_percpu_alloc(areas, 4000, &handle, &err) && handle != last);
    pv_percpu_destroy(areas);
    areas = areas_for(0);
    for (count = 0; !pv_percpu_alloc(areas, 8, &handle, &err); count++)
        ;
    CHECK(count == PV_PERCPU_SLOTS && err == ENOSPC);
    pv_percpu_destroy(areas);
}

/* Made for one CPU: threads on others take the shared area. */
static void test_more_cpus_than_expected(void)
{
    struct pv_percpu *areas = areas_for(1);
    pv_percpu_handle handle = item(areas, 8);
    int cpus[64], count = usable_cpus(cpus, 64);
    cpu_set_t all;

    CHECK(!sched_getaffinity(0, sizeof all, &all));
    for (int i = 0; i < count; i++) {
        run_on(cpus[i]);
        CHECK(!pv_percpu_add(get(areas, handle), 1));
    }
    CHECK(sum_of(areas, handle) == count);
    CHECK(count == 1 || *(int64_t *)pv_percpu_at(get(areas, handle), 1) > 0);
    CHECK(!sched_setaffinity(0, sizeof all, &all));
    pv_percpu_destroy(areas);
}

static void test_fork_and_attach(void)
{
    struct pv_percpu *areas = areas_for(0), *second;
    pv_percpu_handle handle = item(areas, 8);
    struct pv_percpu_ref ref = get(areas, handle);
    int status, err;

    for (int child = 0; child < 2; child++) {
        pid_t pid = fork();

        CHECK(pid >= 0);
        if (pid == 0) { /* one uses what it inherited, one maps the areas anew, elsewhere */
            CHECK(!child || !pv_percpu_attach(pv_percpu_fd(areas), &second, &err));
            for (int i = 0; i < 100000; i++)
                CHECK(!pv_percpu_add(child ? get(second, handle) : ref, 1));
            _exit(0);
        }
        for (int i = 0; i < 100000; i++)
            CHECK(!pv_percpu_add(ref, 1));
        CHECK(waitpid(pid, &status, 0) == pid && status == 0);
    }
    CHECK(sum_of(areas, handle) == 400000);
    pv_percpu_destroy(areas);
}

/* As somebody would make it who means to shrink it later. */
static int unsealed_copy(const struct pv_percpu *areas)
{
    int fd = memfd_create("copy", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    char start[64];

    CHECK(pread(pv_percpu_fd(areas), start, sizeof start, 0) == sizeof start);
    CHECK(!ftruncate(fd, lseek(pv_percpu_fd(areas), 0, SEEK_END)) && pwrite(fd, start, sizeof start, 0) == sizeof start);
    return fd;
}

/* Sums are right though somebody closed the descriptor. */
static void test_descriptor_closed(void)
{
    struct pv_percpu *areas = areas_for(4);
    pv_percpu_handle handle = item(areas, 8);
    int fd = pv_percpu_fd(areas), spare = dup(fd);

    CHECK(!pv_percpu_add(get(areas, handle), 5) && !close(fd));
    CHECK(sum_of(areas, handle) == 5);
    CHECK(dup2(spare, fd) == fd && !close(spare));
    pv_percpu_destroy(areas);
}

static void test_attach_to_nonsense(void)
{
    struct pv_percpu *areas = areas_for(2), *out;
    char zeroes[64] = {0};
    int err = 0, fd = memfd_create("nonsense", MFD_CLOEXEC);

    CHECK(pv_percpu_attach(-1, &out, &err) == -1 && err == EBADF);
    CHECK(pv_percpu_attach(fd, &out, &err) == -1 && err == EINVAL);
    CHECK(!ftruncate(fd, 100 << 20) && pv_percpu_attach(fd, &out, &err) == -1 && err == EINVAL);
    CHECK(ftruncate(pv_percpu_fd(areas), 4 << 20) && errno == EPERM); /* cannot be cut short */
    CHECK(ftruncate(pv_percpu_fd(areas), 100 << 20) && errno == EPERM);
    CHECK(pwrite(fd, zeroes, sizeof zeroes, 0) == sizeof zeroes);
    close(fd);
    fd = unsealed_copy(areas);
    CHECK(pv_percpu_attach(fd, &out, &err) == -1 && err == EINVAL);
    CHECK(!fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) && !pv_percpu_attach(fd, &out, &err));
    pv_percpu_destroy(out);
    close(fd);
    pv_percpu_destroy(areas);
}

static _Noreturn void use_for_ever(struct pv_percpu *areas, struct pv_percpu_ref ref, uint64_t *progress)
{
    pv_percpu_handle made;
    int err;

    for (;; __atomic_store_n(progress, *progress + 1, __ATOMIC_RELAXED)) {
        CHECK(!pv_percpu_add(ref, 1));
        if (*progress % 64 == 0 && !pv_percpu_alloc(areas, 64, &made, &err)) /* so that it dies with the lock held now and then */
            CHECK(!pv_percpu_free(areas, made, &err));
    }
}

/* A process that is killed in the middle of everything: what it had committed is there, and nothing waits for it. */
static void test_killed(void)
{
    struct pv_percpu *areas = areas_for(0);
    pv_percpu_handle handle = item(areas, 8), made;
    struct pv_percpu_ref ref = get(areas, handle);
    uint64_t *progress = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    int status, err;

    CHECK(progress != MAP_FAILED);
    for (int round = 0; round < 20; round++) {
        int64_t before = sum_of(areas, handle);
        pid_t pid;

        *progress = 0;
        pid = fork();
        CHECK(pid >= 0);
        if (pid == 0)
            use_for_ever(areas, ref, progress);
        while (__atomic_load_n(progress, __ATOMIC_RELAXED) < 1000)
            sched_yield();
        CHECK(!kill(pid, SIGKILL) && waitpid(pid, &status, 0) == pid);
        CHECK((uint64_t)(sum_of(areas, handle) - before) - *progress <= 1); /* the last may have been added and not yet noted */
    }
    CHECK(!pv_percpu_alloc(areas, 64, &made, &err));
    munmap(progress, 4096);
    pv_percpu_destroy(areas);
}

/* While an item is freed others use it: each operation either counted before, or says -1. */
struct freeing {
    struct pv_percpu_ref ref;
    _Atomic(int) freed;
};

static void *use_until_freed(void *argument)
{
    struct freeing *freeing = argument;

    while (!pv_percpu_add(freeing->ref, 1))
        ;
    CHECK(freeing->freed);
    return NULL;
}

static void test_freed_while_used(void)
{
    struct pv_percpu *areas = areas_for(0);

    for (int round = 0; round < 200; round++) {
        pv_percpu_handle handle = item(areas, 8), next;
        struct freeing freeing = {.ref = get(areas, handle)};
        pthread_t users[2];
        int err;

        for (int i = 0; i < 2; i++)
            CHECK(!pthread_create(&users[i], NULL, use_until_freed, &freeing));
        while (sum_of(areas, handle) < 100)
            sched_yield();
        freeing.freed = 1;
        CHECK(!pv_percpu_free(areas, handle, &err));
        next = item(areas, 8);
        CHECK(get(areas, next).base == freeing.ref.base);
        for (int i = 0; i < 2; i++)
            CHECK(!pthread_join(users[i], NULL));
        CHECK(!PV_HAS_SEQUENCES || pv_rseq_origin() == PV_RSEQ_NONE || sum_of(areas, next) == 0);
        CHECK(!pv_percpu_free(areas, next, &err));
    }
    pv_percpu_destroy(areas);
}

static void test_slice(void)
{
    int why = pv_slice_supported();

    printf("time-slice extension: %s\n", why ? strerror(why) : "yes");
    if (why)
        return;
    for (int i = 0; i < 1000; i++) {
        pv_slice_begin();
        pv_slice_end();
    }
}

int main(void)
{
    static const char *const ORIGINS[] = {"nobody", "glibc", "this library"};

    setvbuf(stdout, NULL, _IOLBF, 0);
    test_same_handle_on_every_cpu();
    printf("threads are registered by %s\n", ORIGINS[pv_rseq_origin()]);
    test_load_store_cas();
    test_memory_for_cpus_in_use_only();
    test_freed_handles();
    test_slot_used_again();
    test_bad_handles();
    test_until_full();
    test_more_cpus_than_expected();
    test_fork_and_attach();
    test_attach_to_nonsense();
    test_descriptor_closed();
    test_killed();
    test_freed_while_used();
    test_slice();
    return 0;
}
