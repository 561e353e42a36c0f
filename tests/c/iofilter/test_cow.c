/* Linked clones and snapshots: against a plain array, through kills and power cuts, with faults from both sides. */
#include <fcntl.h>
#include <sys/mount.h>
#include <sys/stat.h>

#include "chain.h"
#include "crashy.h"
#include "iofilter/filters/common/map.h"
#include "model.h"

#define SIZE (2 * MIB + 3 * KIB) /* the last cluster is short */

static struct pv_loop loop;
static char folder[] = "/tmp/pv-cow-XXXXXX";
static char state[64], live[80], settings[256], delta[64];

static void forget(void)
{
    unlink(state);
    unlink(live);
    unlink(delta);
}

static struct pv_instance *publish(struct pv_instance *disk)
{
    struct pv_fail fail;

    CHECK(!pv_instance_publish(disk, &fail));
    return disk;
}

static void close_published(struct pv_instance *disk)
{
    pv_instance_withdraw(disk);
    disk_close(disk);
}

/* A base of that size with that pattern on it. */
static struct pv_instance *base_disk(const uint8_t *bytes, uint64_t size)
{
    struct pv_instance *base = publish(memory_disk("base", size, &loop));

    CHECK(!disk_write(base, 0, bytes, size));
    return base;
}

/* ---- against a model ---- */

static void a_clone_is_as_a_disk(const char *more, uint64_t base_size)
{
    unsigned seed = 7;
    uint8_t *bytes = pattern(base_size, 1), *model = calloc(1, SIZE);
    struct pv_instance *base = base_disk(bytes, base_size), *clone = memory_disk("clone", SIZE, &loop);
    struct pv_filter *filter;

    memcpy(model, bytes, base_size);
    snprintf(settings, sizeof settings, "base=disk:base state=%s%s", state, more);
    create("linkedclone", settings, SIZE);
    filter = attach(clone, "linkedclone", settings);
    check_all(clone, model, SIZE);
    CHECK(figure(filter, "clusters_allocated") == 0);
    for (int i = 0; i < 60; i++) {
        random_batch(clone, model, SIZE, &seed);
        if (i % 10 == 9)
            check_all(clone, model, SIZE);
    }
    CHECK(figure(filter, "clusters_copied_up") > 0 && figure(filter, "split_reads") > 0);
    disk_close(clone);
    check_all(base, bytes, base_size); /* never written to */
    close_published(base);
    free(bytes);
    free(model);
    forget();
}

static void a_snapshot_is_as_a_disk(void)
{
    unsigned seed = 11;
    uint8_t *bytes = pattern(SIZE, 2), *model = malloc(SIZE);
    struct pv_instance *disk = memory_disk("disk", SIZE, &loop);
    struct call below;
    uint8_t *seen = malloc(SIZE);
    int fd = open(delta, O_RDWR | O_CREAT, 0600);

    CHECK(model && seen && fd >= 0 && !ftruncate(fd, SIZE / 512 * 512) && !close(fd));
    memcpy(model, bytes, SIZE);
    CHECK(!disk_write(disk, 0, bytes, SIZE));
    snprintf(settings, sizeof settings, "delta=file:%s state=%s cluster=8K", delta, state);
    create("snapshot", settings, SIZE);
    attach(disk, "snapshot", settings);
    for (int i = 0; i < 40; i++)
        random_batch(disk, model, SIZE, &seed);
    check_all(disk, model, SIZE);
    memset(&below, 0, sizeof below); /* a handle at the filter: the disk as it was */
    below.segment = (struct iovec){seen, SIZE};
    below.io = (struct pv_io){.type = PV_IO_READ, .length = SIZE, .iov = &below.segment, .iov_count = 1, .done = call_done, .owner = &below};
    pv_instance_submit(disk, &below.io, 1);
    CHECK(!call_wait(&below, &loop) && !memcmp(seen, bytes, SIZE));
    detach(disk, 0); /* back to it */
    check_all(disk, bytes, SIZE);
    disk_close(disk);
    free(bytes);
    free(model);
    free(seen);
    forget();
}

static void neighbours_do_not_undo_one_another(const char *cluster)
{
    uint8_t *bytes = pattern(MIB, 1), *model = malloc(MIB);
    struct pv_instance *base = base_disk(bytes, MIB), *clone = memory_disk("clone", MIB, &loop);

    snprintf(settings, sizeof settings, "base=disk:base state=%s cluster=%s", state, cluster);
    create("linkedclone", settings, MIB);
    attach(clone, "delay", "us=0 jitter_us=1000 types=read,write");
    attach(clone, "linkedclone", settings);
    memcpy(model, bytes, MIB);
    for (uint64_t block = 0; block < 512 * KIB; block += 32 * KIB) {
        write_neighbours(clone, block);
        CHECK(!disk_read(clone, block, model + block, 4096));
    }
    check_all(clone, model, MIB); /* what lies around them is the base's */
    disk_close(clone);
    close_published(base);
    free(bytes);
    free(model);
    forget();
}

/* ---- closed, killed, cut ---- */

static void copy_file(const char *from, const char *to)
{
    char command[200];

    snprintf(command, sizeof command, "cp --sparse=always %s %s", from, to);
    CHECK(!system(command));
}

/* What a kill leaves: both files as they are at this instant. (A process that is really killed: the crash checker.) */
static void acknowledged_survives_a_kill(void)
{
    uint8_t *now = calloc(1, SIZE), *durable = calloc(1, SIZE), *bytes = pattern(SIZE, 3), *model = malloc(SIZE);
    struct pv_instance *base = base_disk(bytes, SIZE), *clone;
    char kept[80], kept_live[90], again[256];
    unsigned seed = 5;

    memcpy(model, bytes, SIZE);
    snprintf(settings, sizeof settings, "base=disk:base state=%s", state);
    create("linkedclone", settings, SIZE);
    clone = disk_on("clone", crashy_data(now, durable, SIZE), &loop);
    attach(clone, "linkedclone", settings);
    for (int i = 0; i < 10; i++)
        random_batch(clone, model, SIZE, &seed);
    snprintf(kept, sizeof kept, "%s.kept", state);
    snprintf(kept_live, sizeof kept_live, "%s.live", kept);
    copy_file(state, kept);
    copy_file(live, kept_live);
    disk_close(clone);
    snprintf(again, sizeof again, "base=disk:base state=%s", kept);
    clone = disk_on("clone", crashy_data(now, durable, SIZE), &loop);
    attach(clone, "linkedclone", again);
    check_all(clone, model, SIZE);
    disk_close(clone);
    unlink(kept);
    unlink(kept_live);
    close_published(base);
    free(now);
    free(durable);
    free(bytes);
    free(model);
    forget();
}

/* Rounds of: write, flush, write on, cut. A sector is what it was at the flush, or what a later write made it. */
static void flushed_survives_a_power_cut(const char *cluster)
{
    static char boots[40][20];
    uint8_t *now = calloc(1, SIZE), *durable = calloc(1, SIZE), *bytes = pattern(SIZE, 3), *model = malloc(SIZE), *before = malloc(SIZE);
    uint8_t *seen = malloc(SIZE);
    struct pv_instance *base = base_disk(bytes, SIZE), *clone;
    unsigned seed = 99;

    memcpy(model, bytes, SIZE);
    snprintf(settings, sizeof settings, "base=disk:base state=%s cluster=%s", state, cluster);
    create("linkedclone", settings, SIZE);
    for (int round = 0; round < 40; round++) {
        snprintf(boots[round], sizeof boots[round], "boot%d", round);
        pv_boot_id_for_tests = boots[round];
        clone = disk_on("clone", crashy_data(now, durable, SIZE), &loop);
        attach(clone, "linkedclone", settings);
        CHECK(!disk_read(clone, 0, model, SIZE));
        if (round)
            for (uint64_t at = 0; at < SIZE; at += 512) /* `before` was flushed, `seen` came later */
                CHECK(!memcmp(model + at, before + at, 512) || !memcmp(model + at, seen + at, 512));
        random_batch(clone, model, SIZE, &seed);
        CHECK(!disk_do(clone, PV_IO_FLUSH, 0, NULL, 0, 0));
        memcpy(before, model, SIZE);
        for (int i = 0; i < 8; i++) { /* no flush, no FUA: one write to each of some sectors */
            uint64_t at = (uint64_t)(rand_r(&seed) % (SIZE / 512)) * 512;
            uint8_t *data = pattern(512, (unsigned)rand_r(&seed));

            CHECK(!disk_write(clone, at, data, 512));
            memcpy(model + at, data, 512);
            free(data);
        }
        memcpy(seen, model, SIZE);
        disk_close(clone);
        crashy_power_cut(now, durable, SIZE, &seed);
    }
    pv_boot_id_for_tests = NULL;
    close_published(base);
    free(now);
    free(durable);
    free(bytes);
    free(model);
    free(before);
    free(seen);
    forget();
}

static void a_clean_close_leaves_one_file(void)
{
    uint8_t *bytes = pattern(MIB, 1);
    struct pv_instance *base = base_disk(bytes, MIB), *clone = memory_disk("clone", MIB, &loop);

    snprintf(settings, sizeof settings, "base=disk:base state=%s", state);
    create("linkedclone", settings, MIB);
    attach(clone, "linkedclone", settings);
    CHECK(!disk_write(clone, 4096, bytes, 4096) && !access(live, F_OK));
    CHECK(!disk_do(clone, PV_IO_FLUSH, 0, NULL, 0, 0));
    disk_close(clone);
    CHECK(access(live, F_OK) && !access(state, F_OK));
    close_published(base);
    free(bytes);
    forget();
}

/* ---- faults ---- */

static void scribble(off_t at)
{
    int fd = open(state, O_RDWR);

    CHECK(fd >= 0 && pwrite(fd, "garbage", 7, at) == 7 && !close(fd));
}

static void bad_state_is_refused(void)
{
    uint8_t *bytes = pattern(MIB, 1);
    struct pv_instance *base = base_disk(bytes, MIB), *clone = memory_disk("clone", MIB, &loop), *other;
    char wrong[256];

    snprintf(settings, sizeof settings, "base=disk:base state=%s", state);
    refused(clone, "linkedclone", settings, "No such file");
    refused(clone, "linkedclone", "base=disk:base", "state is not set");
    refused(clone, "linkedclone", "state=/tmp/x", "base is not set");
    create("linkedclone", settings, MIB);
    snprintf(wrong, sizeof wrong, "base=disk:none state=%s", state);
    refused(clone, "linkedclone", wrong, "no disk none");
    snprintf(wrong, sizeof wrong, "base=nonsense state=%s", state);
    refused(clone, "linkedclone", wrong, "disk:NAME");
    snprintf(wrong, sizeof wrong, "delta=disk:base state=%s", state);
    refused(clone, "snapshot", wrong, "belongs to a filter linkedclone");
    attach(clone, "linkedclone", settings);
    other = memory_disk("other", MIB, &loop);
    pv_map_patience_ms = 20;
    refused(other, "linkedclone", settings, "another process has this disk open");
    pv_map_patience_ms = 5000;
    for (uint64_t i = 0; i < 2; i++) /* two generations of the first page: both slots are in use */
        CHECK(!disk_write(clone, i * 4096, bytes, 4096) && !disk_do(clone, PV_IO_FLUSH, 0, NULL, 0, 0));
    disk_close(clone);
    scribble(2 * 4096 + 100);
    attach(other, "linkedclone", settings); /* one damaged copy: the other is taken */
    disk_close(other);
    scribble(3 * 4096 + 100);
    other = memory_disk("other", MIB, &loop);
    unlink(live);
    refused(other, "linkedclone", settings, "both copies are damaged");
    scribble(100);
    scribble(4096);
    refused(other, "linkedclone", settings, "its head is damaged");
    disk_close(other);
    close_published(base);
    free(bytes);
    forget();
}

/* Half of all writes to the clone's file fail, some of the base's reads too: what was refused is not there, and nothing else is harmed. */
static void failed_writes_leave_the_base_to_be_seen(void)
{
    uint8_t *bytes = pattern(MIB, 1), *model = malloc(MIB), *data = malloc(64 * KIB);
    struct pv_instance *base = base_disk(bytes, MIB), *clone = memory_disk("clone", MIB, &loop);
    unsigned seed = 3, failed = 0, good = 0;

    snprintf(settings, sizeof settings, "base=disk:base state=%s cluster=16K", state);
    create("linkedclone", settings, MIB);
    attach(base, "error", "types=read probability=0.3 seed=2");
    attach(clone, "error", "types=write probability=0.5 seed=4");
    attach(clone, "linkedclone", settings);
    memcpy(model, bytes, MIB);
    for (int i = 0; i < 500; i++) {
        uint64_t length = (1 + (uint64_t)rand_r(&seed) % 100) * 512, at = (uint64_t)rand_r(&seed) % ((MIB - length) / 512) * 512;

        memset(data, rand_r(&seed), length);
        if (disk_write(clone, at, data, length)) {
            failed++;
            continue;
        }
        good++;
        memcpy(model + at, data, length);
    }
    CHECK(failed > 100 && good > 50);
    detach(clone, 1);
    detach(base, 0);
    check_all(clone, model, MIB);
    disk_close(clone);
    close_published(base);
    free(bytes);
    free(model);
    free(data);
    forget();
}

/* The file system with the clone's maps is full: what has no room is refused, and nothing else is harmed; then there is room again. */
static void a_full_disk_refuses_and_recovers(void)
{
    static uint8_t data[4096], seen[4096];
    struct pv_instance *base, *clone;
    char filler[100];
    unsigned good = 0, late = 40;
    int fd;

    if (mount("tmpfs", folder, "tmpfs", 0, "size=96k")) {
        printf("skipped: no mounts here, so no file system that is full\n");
        return;
    }
    base = publish(memory_disk("base", 4096 * MIB, &loop));
    clone = memory_disk("clone", 4096 * MIB, &loop);
    snprintf(settings, sizeof settings, "base=disk:base state=%s", state);
    create("linkedclone", settings, 4096 * MIB);
    attach(clone, "linkedclone", settings);
    snprintf(filler, sizeof filler, "%s/filler", folder);
    fd = open(filler, O_RDWR | O_CREAT, 0600);
    memset(data, 7, sizeof data);
    CHECK(fd >= 0 && !disk_write(clone, 0, data, 4096) && !disk_do(clone, PV_IO_FLUSH, 0, NULL, 0, 0));
    while (write(fd, seen, sizeof seen) == sizeof seen)
        ;
    for (unsigned i = 1; i < late; i++) { /* each in a page of the map of its own */
        int error = disk_write(clone, i * 128 * MIB % (4096 * MIB) + 4096, data, 4096);

        CHECK(!error || error == ENOSPC);
        good += !error;
        CHECK(!disk_read(clone, i * 128 * MIB % (4096 * MIB) + 4096, seen, 4096) && seen[0] == (error ? 0 : 7));
    }
    CHECK(good < late - 1);
    CHECK(!disk_read(clone, 0, seen, 4096) && seen[0] == 7);
    CHECK(!close(fd) && !unlink(filler));
    CHECK(!disk_write(clone, 2048 * MIB + 4096, data, 4096) && !disk_do(clone, PV_IO_FLUSH, 0, NULL, 0, 0));
    CHECK(!disk_read(clone, 2048 * MIB + 4096, seen, 4096) && seen[0] == 7);
    disk_close(clone);
    close_published(base);
    CHECK(!umount(folder));
}

int main(void)
{
    int err;

    CHECK(mkdtemp(folder) && !pv_loop_open(&loop, 0, &err));
    snprintf(state, sizeof state, "%s/map", folder);
    snprintf(live, sizeof live, "%s/map.live", folder);
    snprintf(delta, sizeof delta, "%s/delta", folder);
    a_clone_is_as_a_disk("", SIZE);
    a_clone_is_as_a_disk(" cluster=64K", SIZE);
    a_clone_is_as_a_disk(" cluster=16K", MIB + 1536); /* a base that is smaller */
    neighbours_do_not_undo_one_another("4K");
    neighbours_do_not_undo_one_another("64K");
    a_snapshot_is_as_a_disk();
    acknowledged_survives_a_kill();
    flushed_survives_a_power_cut("4K");
    flushed_survives_a_power_cut("64K");
    a_clean_close_leaves_one_file();
    bad_state_is_refused();
    failed_writes_leave_the_base_to_be_seen();
    a_full_disk_refuses_and_recovers();
    pv_loop_close(&loop);
    CHECK(!rmdir(folder));
    return 0;
}
