/* The framework itself: the way down and up, redirects on one loop and between two, quiet instances, bad requests,
 * both kinds of data. */
#include <fcntl.h>
#include <pthread.h>

#include "disk.h"

/* ---- filters of the test's own ---- */

enum mode { PASS, REFUSE, HOLD, REDIRECT, SPLIT };

struct probe {
    struct pv_filter filter;
    enum mode mode;
    unsigned requests, completions, failed;
    struct pv_link held;
    struct pv_target *target;
};

static void release_held(struct probe *probe)
{
    while (!pv_list_empty(&probe->held)) {
        struct pv_io *io = pv_member(probe->held.next, struct pv_io, link);

        pv_list_remove(&io->link);
        pv_io_pass(&probe->filter, io);
    }
}

static void half_done(struct pv_io *child)
{
    struct pv_io *parent = child->owner;
    struct pv_filter *filter = parent->instance->filters[parent->at];

    if (child->error)
        parent->error = child->error;
    free(child->private[0]);
    pv_child_free(filter, child);
    if (!--parent->frames[filter->at].word)
        pv_io_end(parent, parent->error);
}

static void split(struct pv_filter *filter, struct pv_io *io)
{
    io->frames[filter->at].word = 2;
    for (unsigned i = 0; i < 2; i++) {
        struct pv_io *child = pv_io_child(filter, io);
        struct iovec *iov = calloc(io->iov_count, sizeof(*iov));

        child->type = io->type;
        child->offset = io->offset + i * io->length / 2;
        child->length = io->length / 2;
        child->iov = iov;
        child->iov_count = pv_iov_cut(io->iov, io->iov_count, i * io->length / 2, io->length / 2, iov, io->iov_count);
        child->private[0] = iov;
        child->done = half_done;
        pv_child_pass(filter, child);
    }
}

static void probe_request(struct pv_filter *filter, struct pv_io *io)
{
    struct probe *probe = (struct probe *)filter;

    probe->requests++;
    CHECK(io->frames[filter->at].word == 0);
    io->frames[filter->at].word = 42;
    if (probe->mode == REFUSE)
        pv_io_end(io, EPERM);
    else if (probe->mode == REDIRECT)
        pv_io_redirect(filter, io, probe->target);
    else if (probe->mode == SPLIT)
        split(filter, io);
    else if (probe->mode == HOLD && filter->instance->state == PV_RUNNING)
        pv_list_append(&probe->held, &io->link);
    else
        pv_io_pass(filter, io);
}

static void probe_completed(struct pv_filter *filter, struct pv_io *io)
{
    struct probe *probe = (struct probe *)filter;

    CHECK(io->frames[filter->at].word == 42);
    probe->completions++;
    probe->failed += io->error != 0;
}

static void probe_drain(struct pv_filter *filter)
{
    release_held((struct probe *)filter);
}

static int probe_open(struct pv_filter *filter, const struct pv_settings *settings, struct pv_fail *fail)
{
    (void)settings;
    (void)fail;
    pv_list_init(&((struct probe *)filter)->held);
    return 0;
}

static const struct pv_filter_class probe_class = {.name = "probe", .open = probe_open, .order = PV_CACHING, .size = sizeof(struct probe), .types = 0xff,
    .request = probe_request, .completed = probe_completed, .drain = probe_drain};
static const struct pv_filter_class early_class = {.name = "early", .open = probe_open, .order = PV_INSPECTION, .size = sizeof(struct probe),
    .types = 0xff, .request = probe_request, .completed = probe_completed, .drain = probe_drain};

static struct probe *add(struct pv_instance *disk, const char *name, unsigned at, enum mode mode)
{
    struct pv_settings none = {NULL, 0};
    struct pv_fail fail;
    struct probe *probe = (struct probe *)pv_filter_open_class(disk, &probe_class, name, &none, &fail);

    CHECK(probe);
    probe->mode = mode;
    disk_quiesce(disk);
    CHECK(!pv_instance_insert(disk, &probe->filter, at, &fail));
    pv_instance_resume(disk);
    return probe;
}

/* ---- tests ---- */

static void test_way_down_and_up(struct pv_loop *loop)
{
    struct pv_instance *disk = memory_disk("a", MIB, loop);
    struct probe *lower = add(disk, "lower", 0, PASS), *upper = add(disk, "upper", 0, PASS);
    char out[8192], in[8192];

    memset(out, 'x', sizeof(out));
    CHECK(disk_write(disk, 4096, out, sizeof(out)) == 0);
    CHECK(disk_read(disk, 4096, in, sizeof(in)) == 0 && !memcmp(in, out, sizeof(in)));
    CHECK(upper->requests == 2 && upper->completions == 2 && lower->requests == 2 && lower->completions == 2);
    lower->mode = REFUSE; /* only who saw it and passed it on hears of it */
    CHECK(disk_read(disk, 0, in, 4096) == EPERM);
    CHECK(upper->failed == 1 && lower->completions == 2);
    upper->mode = SPLIT;
    lower->mode = PASS;
    memset(in, 0, sizeof(in));
    CHECK(disk_read(disk, 4096, in, sizeof(in)) == 0 && !memcmp(in, out, sizeof(in)));
    CHECK(lower->requests == 5);
    disk_close(disk);
}

static void test_bad_requests(struct pv_loop *loop)
{
    struct pv_instance *disk = memory_disk("a", MIB, loop);
    struct probe *probe = add(disk, "p", 0, PASS);
    char data[1024];

    CHECK(disk_read(disk, 1, data, 512) == EINVAL && disk_read(disk, 0, data, 511) == EINVAL);
    CHECK(disk_read(disk, MIB, data, 512) == EINVAL && disk_write(disk, MIB - 512, data, 1024) == ENOSPC);
    CHECK(disk_read(disk, UINT64_MAX - 511, data, 1024) == EINVAL);
    CHECK(disk_do(disk, PV_IO_FLUSH, 512, NULL, 0, 0) == EINVAL && disk_do(disk, (enum pv_io_type)99, 0, NULL, 0, 0) == EINVAL);
    CHECK(disk_read(disk, 0, data, PV_IO_LENGTH_MAX + 512) == EINVAL);
    disk->read_only = true;
    CHECK(disk_write(disk, 0, data, 512) == EROFS && disk_do(disk, PV_IO_DISCARD, 0, NULL, 512, 0) == EROFS);
    CHECK(disk_do(disk, PV_IO_FLUSH, 0, NULL, 0, 0) == 0);
    CHECK(probe->requests == 1 && disk->stats.errors == 10);
    disk_close(disk);
}

static void test_quiet_holds_and_keeps_order(struct pv_loop *loop)
{
    struct pv_instance *disk = memory_disk("a", MIB, loop);
    struct probe *probe = add(disk, "p", 0, HOLD), *second;
    struct call calls[8];
    char data[8][512];
    struct pv_fail fail;

    for (int i = 0; i < 4; i++)
        call_start(&calls[i], disk, PV_IO_READ, 512u * (unsigned)i, data[i], 512, 0);
    CHECK(disk->in_flight == 4);
    disk_quiesce(disk); /* what is held is let go */
    for (int i = 0; i < 4; i++)
        CHECK(calls[i].over);
    for (int i = 4; i < 8; i++)
        call_start(&calls[i], disk, PV_IO_READ, 0, data[i], 512, 0);
    CHECK(disk->in_flight == 0 && probe->requests == 4);
    probe->mode = PASS;
    pv_instance_resume(disk);
    for (int i = 4; i < 8; i++)
        CHECK(calls[i].over);
    second = add(disk, "q", 1, HOLD);
    call_start(&calls[0], disk, PV_IO_READ, 0, data[0], 512, 0);
    CHECK(pv_instance_remove(disk, 1, &fail) == NULL && fail.error == EBUSY);
    disk_quiesce(disk);
    CHECK(pv_instance_remove(disk, 1, &fail) == &second->filter);
    pv_filter_close(&second->filter);
    pv_instance_resume(disk);
    disk_close(disk);
}

static void test_class_order(struct pv_loop *loop)
{
    struct pv_instance *disk = memory_disk("a", MIB, loop);
    struct pv_settings none = {NULL, 0};
    struct pv_fail fail;
    struct pv_filter *early;

    add(disk, "p", 0, PASS);
    early = pv_filter_open_class(disk, &early_class, "e", &none, &fail);
    disk_quiesce(disk);
    CHECK(pv_instance_insert(disk, early, 1, &fail) == -1 && fail.error == EINVAL);
    CHECK(pv_instance_insert(disk, early, 0, &fail) == 0);
    early = pv_filter_open_class(disk, &early_class, "e", &none, &fail);
    CHECK(pv_instance_insert(disk, early, 0, &fail) == -1 && fail.error == EEXIST);
    pv_filter_close(early);
    pv_instance_resume(disk);
    disk_close(disk);
}

static void test_redirect_on_one_loop(struct pv_loop *loop)
{
    struct pv_instance *base = memory_disk("base", MIB, loop), *clone = memory_disk("clone", MIB, loop);
    struct probe *probe = add(clone, "r", 0, REDIRECT), *below = add(base, "b", 0, PASS);
    struct pv_fail fail;
    char data[512], in[512];

    memset(data, 'b', sizeof(data));
    CHECK(disk_write(base, 0, data, 512) == 0);
    probe->target = pv_target_local(clone, base, &fail);
    CHECK(probe->target && !pv_target_local(base, clone, &fail) && fail.error == ELOOP);
    CHECK(!pv_target_local(base, base, &fail) && fail.error == ELOOP);
    CHECK(disk_read(clone, 0, in, 512) == 0 && !memcmp(in, data, 512));
    CHECK(below->requests == 2 && below->completions == 2 && probe->completions == 1);
    CHECK(clone->stats.redirects_out == 1 && base->stats.redirects_in == 1);
    below->mode = REFUSE;
    CHECK(disk_read(clone, 0, in, 512) == EPERM && probe->failed == 1);
    pv_target_free(probe->target);
    disk_close(clone);
    disk_close(base);
}

static void *run_loop(void *loop)
{
    int err;

    CHECK(!pv_loop_run(loop, &err));
    return NULL;
}

static void attach_there(void *disk)
{
    struct pv_instance *instance = disk;

    pv_instance_attach_loop(instance, instance->resize_context);
}

static void quiesce_there(void *disk)
{
    struct pv_fail fail;
    static bool quiet;

    CHECK(!pv_instance_quiesce(disk, now_quiet, &quiet, &fail));
    CHECK(quiet);
    pv_instance_detach_loop(disk);
}

static void test_redirect_between_loops(struct pv_loop *loop)
{
    struct pv_loop other;
    struct pv_fail fail;
    struct pv_instance *base = pv_instance_new("base", pv_data_memory(MIB, &fail), &fail), *clone = memory_disk("clone", MIB, loop);
    struct probe *probe = add(clone, "r", 0, REDIRECT);
    struct call calls[64];
    static char data[64][512];
    pthread_t thread;
    int err;

    CHECK(!pv_loop_open(&other, 20000, &err));
    CHECK(!pthread_create(&thread, NULL, run_loop, &other));
    base->resize_context = &other;
    pv_loop_call(&other, attach_there, base);
    probe->target = pv_target_local(clone, base, &fail);
    for (unsigned round = 0; round < 200; round++) {
        for (unsigned i = 0; i < 64; i++) {
            memset(data[i], (int)(round + i), 512);
            call_start(&calls[i], clone, PV_IO_WRITE, 512ull * i, data[i], 512, 0);
        }
        for (unsigned i = 0; i < 64; i++)
            CHECK(call_wait(&calls[i], loop) == 0);
    }
    for (unsigned i = 0; i < 64; i++) {
        char in[512];

        CHECK(disk_read(clone, 512ull * i, in, 512) == 0 && !memcmp(in, data[i], 512));
    }
    pv_target_free(probe->target);
    disk_close(clone);
    pv_loop_call(&other, quiesce_there, base);
    CHECK(!pv_instance_free(base, &fail));
    pv_loop_stop(&other);
    CHECK(!pthread_join(thread, NULL));
    pv_loop_close(&other);
}

static void file_round(struct pv_instance *disk)
{
    static char out[64 * 1024], in[64 * 1024];
    char zeroes[4096] = {0};

    for (unsigned i = 0; i < sizeof(out); i++)
        out[i] = (char)(i * 7 + i / 256);
    CHECK(disk_do(disk, PV_IO_WRITE, 65536, out, sizeof(out), PV_IO_FUA) == 0);
    CHECK(disk_do(disk, PV_IO_FLUSH, 0, NULL, 0, 0) == 0);
    CHECK(disk_read(disk, 65536, in, sizeof(in)) == 0 && !memcmp(in, out, sizeof(in)));
    CHECK(disk_do(disk, PV_IO_WRITE_ZEROES, 65536, NULL, 4096, PV_IO_FUA) == 0);
    CHECK(disk_read(disk, 65536, in, 4096) == 0 && !memcmp(in, zeroes, 4096));
    CHECK(disk_do(disk, PV_IO_DISCARD, 65536, NULL, 16384, 0) == 0);
    CHECK(disk_do(disk, PV_IO_WRITE_ZEROES, 65536 + 16384, NULL, 4096, PV_IO_UNMAP) == 0);
    CHECK(disk_read(disk, 65536 + 16384, in, 8192) == 0 && !memcmp(in, zeroes, 4096) && !memcmp(in + 4096, out + 20480, 4096));
}

static void test_file(struct pv_loop *loop, unsigned how)
{
    struct pv_fail fail;
    int fd = scratch_file(MIB), again = dup(fd);
    struct pv_instance *disk = disk_on("f", pv_data_file(fd, how, &fail), loop);
    struct call calls[600];
    static char data[600][512];

    file_round(disk);
    for (unsigned i = 0; i < 600; i++) { /* more than the ring takes at once */
        memset(data[i], (int)i, 512);
        call_start(&calls[i], disk, PV_IO_WRITE, 512ull * i, data[i], 512, 0);
    }
    for (unsigned i = 0; i < 600; i++)
        CHECK(call_wait(&calls[i], loop) == 0);
    CHECK(!ftruncate(again, 4096)); /* cut under us: an error, never zeroes */
    CHECK(disk_read(disk, 8192, data[0], 512) == EIO);
    CHECK(!ftruncate(again, MIB));
    disk_quiesce(disk);
    CHECK(!pv_instance_resize(disk, 2 * MIB, &fail) && disk->size == 2 * MIB);
    pv_instance_resume(disk);
    CHECK(disk_write(disk, 2 * MIB - 512, data[0], 512) == 0);
    disk_close(disk);
    close(again);
}

/* What the page cache has not is read by the ring; both at once, and in turns. */
static void test_cold_file(struct pv_loop *loop)
{
    enum { BLOCKS = 64 };
    struct pv_fail fail;
    int fd = open("/var/tmp", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600), again = dup(fd);
    struct pv_instance *disk;
    struct call calls[BLOCKS];
    static uint8_t data[BLOCKS][4096];

    CHECK(fd >= 0 && !ftruncate(fd, BLOCKS * 65536));
    disk = disk_on("f", pv_data_file(fd, 0, &fail), loop);
    for (unsigned i = 0; i < BLOCKS; i++) {
        memset(data[i], (int)i + 1, 4096);
        CHECK(!disk_write(disk, i * 65536ull, data[i], 4096));
    }
    for (unsigned round = 0; round < 4; round++) {
        memset(data, 0, sizeof(data));
        CHECK(!fsync(again) && !posix_fadvise(again, 0, 0, POSIX_FADV_DONTNEED));
        for (unsigned i = 0; i < BLOCKS; i++) {
            if (i % 4 == round) /* is there again, beside others that are not */
                CHECK(!disk_read(disk, i * 65536ull, data[i], 4096));
            call_start(&calls[i], disk, PV_IO_READ, i * 65536ull, data[i], 4096, 0);
        }
        for (unsigned i = 0; i < BLOCKS; i++)
            CHECK(!call_wait(&calls[i], loop) && data[i][0] == i + 1 && data[i][4095] == i + 1);
    }
    disk_close(disk);
    close(again);
}

/* Too long to be done at once. */
static void test_long_requests(struct pv_loop *loop)
{
    struct pv_fail fail;
    struct pv_instance *disk = disk_on("f", pv_data_file(scratch_file(4 * MIB), 0, &fail), loop);
    uint8_t *out = malloc(4 * MIB), *in = calloc(1, 4 * MIB);

    for (unsigned i = 0; i < 4 * MIB; i++)
        out[i] = (uint8_t)(i ^ i >> 12);
    CHECK(!disk_write(disk, 0, out, 4 * MIB) && !disk_read(disk, 0, in, 4 * MIB) && !memcmp(in, out, 4 * MIB));
    free(out);
    free(in);
    disk_close(disk);
}

static void test_refused_files(void)
{
    struct pv_fail fail;
    int pipes[2];

    CHECK(!pipe(pipes));
    CHECK(!pv_data_file(pipes[0], 0, &fail) && fail.error == EINVAL);
    close(pipes[1]);
}

int main(void)
{
    struct pv_loop loop;
    int err;

    CHECK(!pv_loop_open(&loop, 20000, &err));
    test_way_down_and_up(&loop);
    test_bad_requests(&loop);
    test_quiet_holds_and_keeps_order(&loop);
    test_class_order(&loop);
    test_redirect_on_one_loop(&loop);
    test_redirect_between_loops(&loop);
    test_file(&loop, 0);
    test_file(&loop, PV_FILE_QUEUED);
    test_file(&loop, PV_FILE_QUEUED | PV_FILE_POOL);
    test_cold_file(&loop);
    test_long_requests(&loop);
    test_refused_files();
    pv_loop_close(&loop);
    return 0;
}
