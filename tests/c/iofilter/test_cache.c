/* The filter `cache`: what it serves is what the disk has, whoever else uses it, is late, or is killed. */
#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "crashy.h"
#include "model.h"

#define SIZE (4 * MIB)

static struct pv_loop loop;
static char file[] = "/dev/shm/pv-cache-XXXXXX";
static char settings[200];

static void new_file(void)
{
    int fd;

    strcpy(file, "/dev/shm/pv-cache-XXXXXX");
    fd = mkstemp(file);
    CHECK(fd >= 0 && !close(fd));
    snprintf(settings, sizeof settings, "file=%s id=base size=8M", file);
}

/* A read-only disk with these bytes. */
static struct pv_instance *base(uint8_t *bytes)
{
    struct pv_data *data = crashy_data(bytes, bytes, SIZE);

    data->read_only = true;
    return disk_on("base", data, &loop);
}

static void it_is_as_a_disk(void)
{
    struct pv_instance *disk = memory_disk("d", SIZE, &loop);
    uint8_t *model = calloc(1, SIZE);
    struct pv_filter *filter;
    unsigned seed = 3;

    new_file();
    attach(disk, "delay", "us=5 jitter_us=300 types=read,write");
    filter = attach(disk, "cache", settings);
    for (int i = 0; i < 60; i++)
        random_batch(disk, model, SIZE, &seed);
    check_all(disk, model, SIZE);
    for (int i = 0; i < 2; i++)
        for (uint64_t at = 0; at < SIZE; at += 64 * KIB) {
            uint8_t seen[64 * KIB];

            CHECK(!disk_read(disk, at, seen, sizeof seen) && !memcmp(seen, model + at, sizeof seen));
        }
    CHECK(figure(filter, "hits") > 20 && figure(filter, "fills") > 100);
    disk_close(disk);
    free(model);
    unlink(file);
}

/* Data that answers reads late: with what was there when they came. */
struct late {
    struct pv_data data;
    uint8_t bytes[64 * KIB];
    struct pv_io *held[8];
    uint8_t kept[8][4096];
    unsigned count;
};

static void late_submit(struct pv_data *data, struct pv_io *io)
{
    struct late *late = (struct late *)data;

    if (io->type == PV_IO_READ) {
        memcpy(late->kept[late->count], late->bytes + io->offset, 4096);
        late->held[late->count++] = io;
        return;
    }
    if (io->type == PV_IO_WRITE)
        pv_iov_copy_out(io->iov, io->iov_count, 0, late->bytes + io->offset, io->length);
    pv_io_end(io, 0);
}

static void late_close(struct pv_data *data)
{
    (void)data;
}

static void let_go(struct late *late)
{
    while (late->count) {
        struct pv_io *io = late->held[--late->count];

        pv_iov_copy_in(io->iov, io->iov_count, 0, late->kept[late->count], 4096);
        pv_io_end(io, 0);
    }
}

/* A read that a write overtakes: what it brings is of no use any more, and must not stay in the cache. */
static void a_late_read_fills_nothing(void)
{
    static const struct pv_data_class class = {.name = "late", .submit = late_submit, .close = late_close};
    static struct late late = {.data = {.class = &class, .size = 64 * KIB, .block_size = 512}};
    struct pv_instance *disk = disk_on("late", &late.data, &loop);
    uint8_t old[4096], new[4096], seen[4096];
    struct call read;

    new_file();
    attach(disk, "cache", settings);
    memset(new, 5, sizeof new);
    call_start(&read, disk, PV_IO_READ, 0, old, 4096, 0);
    CHECK(late.count == 1 && !disk_write(disk, 0, new, 4096));
    let_go(&late);
    CHECK(read.over && old[0] == 0);
    call_start(&read, disk, PV_IO_READ, 0, seen, 4096, 0);
    let_go(&late);
    CHECK(read.over && seen[0] == 5);
    call_start(&read, disk, PV_IO_READ, 0, seen, 4096, 0);
    CHECK(read.over && late.count == 0 && seen[0] == 5); /* and that one is in the cache */
    disk_close(disk);
    unlink(file);
}

static void bases_share_and_others_do_not(void)
{
    uint8_t *bytes = pattern(SIZE, 1), seen[4096];
    struct pv_instance *a = base(bytes), *b = base(bytes), *other = base(bytes), *writable = memory_disk("w", SIZE, &loop);
    struct pv_filter *fa, *fb, *fo, *fw;
    char text[200];

    new_file();
    fa = attach(a, "cache", settings);
    fb = attach(b, "cache", settings);
    fw = attach(writable, "cache", settings);
    snprintf(text, sizeof text, "file=%s id=other size=8M", file);
    fo = attach(other, "cache", text);
    CHECK(!disk_read(a, 8192, seen, 4096) && figure(fa, "misses") == 1 && figure(fa, "fills") == 1);
    CHECK(!disk_read(b, 8192, seen, 4096) && figure(fb, "hits") == 1 && !memcmp(seen, bytes + 8192, 4096));
    CHECK(!disk_read(b, 8192 + 512, seen, 512) && figure(fb, "hits") == 2 && !memcmp(seen, bytes + 8192 + 512, 512));
    CHECK(!disk_read(other, 8192, seen, 4096) && figure(fo, "hits") == 0);
    CHECK(!disk_read(writable, 8192, seen, 4096) && figure(fw, "hits") == 0 && seen[0] == 0);
    disk_close(a);
    disk_close(b);
    disk_close(other);
    disk_close(writable);
    free(bytes);
    unlink(file);
}

/* What a late writer, a killed one or a broken memory leaves: a miss, never wrong data. */
static void what_does_not_fit_is_a_miss(void)
{
    uint8_t *bytes = pattern(SIZE, 1), seen[4096];
    struct pv_instance *disk = base(bytes);
    struct pv_filter *filter;
    uint64_t slots = 8 * MIB / 4096, hits;
    uint8_t *memory;
    int fd;

    new_file();
    filter = attach(disk, "cache", settings);
    fd = open(file, O_RDWR);
    memory = mmap(NULL, 4096 + slots * (64 + 4096), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    CHECK(fd >= 0 && memory != MAP_FAILED);
    CHECK(!disk_read(disk, 0, seen, 4096) && !disk_read(disk, 0, seen, 4096) && figure(filter, "hits") == 1);
    for (uint64_t i = 0; i < slots; i++)
        memory[4096 + slots * 64 + i * 4096 + 99] ^= 1;
    CHECK(!disk_read(disk, 0, seen, 4096) && !memcmp(seen, bytes, 4096) && figure(filter, "hits") == 1);
    CHECK(!disk_read(disk, 0, seen, 4096) && figure(filter, "hits") == 2); /* filled anew */
    for (uint64_t i = 0; i < slots; i++)
        *(uint64_t *)(void *)(memory + 4096 + i * 64) |= 1; /* killed in a fill, long ago: claimed_ns is 0, or now */
    hits = figure(filter, "hits");
    CHECK(!disk_read(disk, 0, seen, 4096) && !memcmp(seen, bytes, 4096) && figure(filter, "hits") == hits);
    CHECK(!disk_read(disk, 64 * KIB, seen, 4096) && !disk_read(disk, 64 * KIB, seen, 4096) && figure(filter, "hits") == hits + 1);
    munmap(memory, 4096 + slots * (64 + 4096));
    close(fd);
    disk_close(disk);
    free(bytes);
    unlink(file);
}

/* Reads of a disk that has more than the cache holds, for ever, each compared. */
static void hammer(uint8_t *bytes, unsigned seed)
{
    struct pv_instance *disk;
    uint8_t seen[16 * KIB];
    int err;

    CHECK(!pv_loop_open(&loop, 0, &err));
    disk = base(bytes);
    attach(disk, "cache", settings);
    for (;;) {
        uint64_t at = (uint64_t)rand_r(&seed) % (SIZE / 4096 - 4) * 4096;

        CHECK(!disk_read(disk, at, seen, sizeof seen) && !memcmp(seen, bytes + at, sizeof seen));
    }
}

static pid_t start_hammer(uint8_t *bytes, unsigned seed)
{
    pid_t pid = fork();

    CHECK(pid >= 0);
    if (!pid)
        hammer(bytes, seed);
    return pid;
}

/* Three at once, one of them killed at a random instant, forty times: those that live never see a wrong byte. */
static void processes_may_be_killed(void)
{
    uint8_t *bytes = pattern(SIZE, 1), seen[4096];
    struct pv_instance *disk;
    struct pv_filter *filter;
    pid_t pids[3];
    unsigned seed = 5;

    new_file();
    snprintf(settings, sizeof settings, "file=%s id=base size=2M", file);
    for (unsigned i = 0; i < 3; i++)
        pids[i] = start_hammer(bytes, i);
    for (unsigned round = 0; round < 40; round++) {
        unsigned which = round % 3;
        int status;

        usleep(1000 + (unsigned)rand_r(&seed) % 20000);
        CHECK(!kill(pids[which], SIGKILL) && waitpid(pids[which], &status, 0) == pids[which]);
        CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL); /* not a failed comparison */
        pids[which] = start_hammer(bytes, round + 10);
    }
    disk = base(bytes);
    filter = attach(disk, "cache", settings);
    for (uint64_t at = 0; at < SIZE; at += 4096)
        CHECK(!disk_read(disk, at, seen, 4096) && !memcmp(seen, bytes + at, 4096));
    CHECK(figure(filter, "hits") > 0 && figure(filter, "fills") > 0);
    disk_close(disk);
    for (unsigned i = 0; i < 3; i++) {
        int status;

        kill(pids[i], SIGKILL);
        CHECK(waitpid(pids[i], &status, 0) == pids[i] && WTERMSIG(status) == SIGKILL);
    }
    free(bytes);
    unlink(file);
}

static uint64_t read_all(struct pv_instance *disk)
{
    uint64_t start = pv_loop_clock_ns();
    uint8_t seen[4096];

    for (uint64_t at = 0; at < SIZE; at += 16 * 4096)
        CHECK(!disk_read(disk, at, seen, 4096));
    return pv_loop_clock_ns() - start;
}

static void a_hit_is_fast(void)
{
    uint8_t *bytes = pattern(SIZE, 1);
    struct pv_instance *disk = base(bytes);
    uint64_t misses, hits;

    new_file();
    attach(disk, "delay", "us=100 types=read");
    attach(disk, "cache", settings);
    misses = read_all(disk);
    hits = read_all(disk);
    CHECK(hits * 3 < misses);
    disk_close(disk);
    free(bytes);
    unlink(file);
}

static void bad_settings_are_refused(void)
{
    struct pv_instance *disk = memory_disk("d", SIZE, &loop), *other = memory_disk("o", SIZE, &loop);
    char text[200];

    new_file();
    refused(disk, "cache", "id=x", "file is not set");
    refused(disk, "cache", "file=/dev/shm/x", "id is not set");
    refused(disk, "cache", "file=/nonesuch/x id=x", "No such file");
    refused(disk, "cache", "file=/dev/null id=x size=1", "must be from");
    attach(disk, "cache", settings);
    snprintf(text, sizeof text, "file=%s id=base size=16M", file);
    refused(other, "cache", text, "is there already with a size of 8388608");
    disk_close(disk);
    disk_close(other);
    unlink(file);
}

int main(void)
{
    int err;

    CHECK(!pv_loop_open(&loop, 0, &err));
    it_is_as_a_disk();
    a_late_read_fills_nothing();
    bases_share_and_others_do_not();
    what_does_not_fit_is_a_miss();
    processes_may_be_killed();
    a_hit_is_fast();
    bad_settings_are_refused();
    pv_loop_close(&loop);
    return 0;
}
