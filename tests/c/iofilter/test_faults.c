/* The filters that make a disk worse on purpose, or slower: error, delay, throttle. */
#include <pthread.h>

#include "chain.h"

static struct pv_loop loop;
static uint8_t block[64 * KIB], seen[64 * KIB];

static uint64_t ms_since(uint64_t start_ns)
{
    return (pv_loop_clock_ns() - start_ns) / 1000000;
}

static void bad_settings_are_refused(void)
{
    struct pv_instance *disk = memory_disk("d", MIB, &loop);

    refused(disk, "error", "error=EAGAIN", "must be EIO");
    refused(disk, "error", "types=read,", "a list of read");
    refused(disk, "error", "probability=1.5", "from 0 to 1");
    refused(disk, "error", "when=never", "before");
    refused(disk, "delay", "us=-5", "whole number");
    refused(disk, "delay", "types=reads", "a list of read");
    refused(disk, "throttle", "", "neither iops nor bytes");
    refused(disk, "throttle", "iops=0", "from 1");
    disk_close(disk);
}

static void errors_hit_their_range(void)
{
    struct pv_instance *disk = memory_disk("d", MIB, &loop);
    struct pv_filter *filter = attach(disk, "error", "types=write offset=8K length=4K error=ENOSPC");

    memset(block, 7, sizeof block);
    CHECK(!disk_write(disk, 0, block, 8192) && !disk_write(disk, 12 * KIB, block, 4096));
    CHECK(disk_write(disk, 4096, block, 4608) == ENOSPC && disk_write(disk, 11776, block, 512) == ENOSPC);
    CHECK(!disk_read(disk, 0, seen, 16 * KIB) && seen[8191] == 7 && seen[8192] == 0 && seen[12 * KIB - 1] == 0);
    CHECK(figure(filter, "failed") == 2);
    detach(disk, 0);
    CHECK(!disk_write(disk, 8192, block, 4096));
    disk_close(disk);
}

static void errors_can_come_afterwards(void)
{
    struct pv_instance *disk = memory_disk("d", MIB, &loop);

    attach(disk, "error", "types=write when=after skip=1 count=1");
    memset(block, 9, sizeof block);
    CHECK(!disk_write(disk, 0, block, 512) && disk_write(disk, 4096, block, 512) == EIO && !disk_write(disk, 8192, block, 512));
    CHECK(!disk_read(disk, 4096, seen, 512) && seen[0] == 9);
    disk_close(disk);
}

static unsigned failures(const char *settings, uint64_t *pattern)
{
    struct pv_instance *disk = memory_disk("d", MIB, &loop);
    unsigned failed = 0;

    attach(disk, "error", settings);
    *pattern = 0;
    for (unsigned i = 0; i < 1000; i++) {
        bool fails = disk_read(disk, 0, seen, 512) == EIO;

        failed += fails;
        *pattern = *pattern * 31 + fails;
    }
    disk_close(disk);
    return failed;
}

static void a_seed_repeats_itself(void)
{
    uint64_t first, again, other;
    unsigned count = failures("types=read probability=0.3 seed=5", &first);

    CHECK(count > 230 && count < 370);
    CHECK(failures("types=read probability=0.3 seed=5", &again) == count && again == first);
    failures("types=read probability=0.3 seed=6", &other);
    CHECK(other != first);
    CHECK(failures("types=read probability=0", &other) == 0);
}

static void delays_are_kept_in_order(void)
{
    struct pv_instance *disk = memory_disk("d", MIB, &loop);
    struct call calls[8], flush;
    uint64_t start;

    attach(disk, "delay", "us=50000 types=read");
    start = pv_loop_clock_ns();
    for (unsigned i = 0; i < 8; i++)
        call_start(&calls[i], disk, PV_IO_READ, i * 512, seen + i * 512, 512, 0);
    call_start(&flush, disk, PV_IO_FLUSH, 0, NULL, 0, 0);
    CHECK(flush.over && !calls[0].over);
    for (unsigned i = 0; i < 8; i++)
        CHECK(!call_wait(&calls[i], &loop) && (i == 7 || !calls[7].over || calls[i + 1].over));
    CHECK(ms_since(start) >= 50);
    disk_close(disk);
}

static void a_drain_lets_go(void)
{
    struct pv_instance *disk = memory_disk("d", MIB, &loop);
    struct call delayed, throttled[3];

    attach(disk, "delay", "us=3600000000 types=read");
    attach(disk, "throttle", "iops=1 burst_iops=1 types=write");
    call_start(&delayed, disk, PV_IO_READ, 0, seen, 512, 0);
    for (unsigned i = 0; i < 3; i++)
        call_start(&throttled[i], disk, PV_IO_WRITE, i * 512, block, 512, 0);
    turn(&loop);
    CHECK(!delayed.over && !throttled[2].over);
    disk_quiesce(disk);
    CHECK(delayed.over && !delayed.io.error && throttled[2].over && !throttled[2].io.error);
    pv_instance_resume(disk);
    disk_close(disk);
}

/* n requests of that size; ms they took. */
static uint64_t run(struct pv_instance *disk, unsigned n, uint64_t length)
{
    struct call calls[64];
    uint64_t start = pv_loop_clock_ns();

    for (unsigned i = 0; i < n; i++)
        call_start(&calls[i], disk, PV_IO_WRITE, 0, block, length, 0);
    for (unsigned i = 0; i < n; i++)
        CHECK(!call_wait(&calls[i], disk->loop));
    return ms_since(start);
}

static void a_throttle_bounds(void)
{
    struct pv_instance *disk = memory_disk("d", MIB, &loop);
    struct pv_filter *filter = attach(disk, "throttle", "iops=200 burst_iops=20");
    struct settings_text parsed;
    struct pv_fail fail;

    CHECK(run(disk, 60, 512) >= 190); /* 20 at once, 40 at 5 ms each: less the last */
    CHECK(figure(filter, "held_requests") >= 39);
    disk_quiesce(disk);
    CHECK(!filter->class->set(filter, settings_of(&parsed, "bytes=1M burst_bytes=64K"), &fail));
    CHECK(filter->class->set(filter, settings_of(&parsed, "bytes=1"), &fail) == -1);
    pv_instance_resume(disk);
    CHECK(run(disk, 4, 64 * KIB) >= 120); /* 64 KiB at once, three more at 62.5 ms each: less the last */
    disk_close(disk);
}

static void a_group_is_shared(void)
{
    struct pv_instance *a = memory_disk("a", MIB, &loop), *b = memory_disk("b", MIB, &loop);
    uint64_t start = pv_loop_clock_ns();

    attach(a, "throttle", "iops=200 burst_iops=1 group=g");
    refused(b, "throttle", "iops=300 burst_iops=1 group=g", "other rates");
    attach(b, "throttle", "iops=200 burst_iops=1 group=g");
    run(a, 20, 512);
    run(b, 20, 512);
    CHECK(ms_since(start) >= 185);
    disk_close(a);
    disk_close(b);
}

struct worker {
    pthread_t thread;
    unsigned index;
};

/* Disks of one group on loops of their own: together they keep the bound. */
static void *work(void *argument)
{
    struct pv_loop own;
    struct pv_instance *disk;
    int err;

    (void)argument;
    CHECK(!pv_loop_open(&own, 0, &err));
    disk = memory_disk("w", MIB, &own);
    attach(disk, "throttle", "iops=400 burst_iops=1 group=threads");
    run(disk, 40, 512);
    disk_close(disk);
    pv_loop_close(&own);
    return NULL;
}

static void a_group_spans_threads(void)
{
    struct worker workers[2];
    struct pv_instance *disk = memory_disk("w", MIB, &loop);
    uint64_t start = pv_loop_clock_ns();

    attach(disk, "throttle", "iops=400 burst_iops=1 group=threads"); /* keeps the group */
    for (unsigned i = 0; i < 2; i++)
        CHECK(!pthread_create(&workers[i].thread, NULL, work, &workers[i]));
    for (unsigned i = 0; i < 2; i++)
        CHECK(!pthread_join(workers[i].thread, NULL));
    CHECK(ms_since(start) >= 190);
    disk_close(disk);
}

int main(void)
{
    int err;

    CHECK(!pv_loop_open(&loop, 0, &err));
    bad_settings_are_refused();
    errors_hit_their_range();
    errors_can_come_afterwards();
    a_seed_repeats_itself();
    delays_are_kept_in_order();
    a_drain_lets_go();
    a_throttle_bounds();
    a_group_is_shared();
    a_group_spans_threads();
    pv_loop_close(&loop);
    return 0;
}
