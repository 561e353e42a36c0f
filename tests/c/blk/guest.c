/* The guest of tests/integration/test_blk.py and tools/bench/block.py: a static /init that works on raw disks, 4 KiB at
 * a time, O_DIRECT, by Linux's native asynchronous I/O. The kernel command line says what it does:
 *
 * blk.verify=DISK   writes for ever, 16 at once; each block carries its number and its generation. Now and then all
 *                   blocks are read and compared with what was acknowledged. Prints "verified <writes>" each time, and
 *                   "BAD ..." when a byte is wrong or a request failed.
 * blk.bench=A,B     random reads on both disks in turns, depth 1 and 16; prints "bench <disk> <depth> <iops>"; powers off
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define BLOCK 4096U
#define DEPTH 16U
#define BLOCKS 1024U
#define SPAN (64U << 20)
#define ROUNDS 3
#define SECONDS 1.5

static uint8_t buffers[DEPTH][BLOCK] __attribute__((aligned(4096)));
static aio_context_t context;

static double now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static uint64_t next_random(void)
{
    static uint64_t x = 88172645463325252ULL;

    x ^= x << 13;
    x ^= x >> 7;
    return x ^= x << 17;
}

static int open_disk(const char *name)
{
    char path[64];
    int fd;

    snprintf(path, sizeof(path), "/dev/%s", name);
    for (unsigned tries = 0; (fd = open(path, O_RDWR | O_DIRECT)) < 0 && tries < 500; tries++) {
        if (errno == EACCES || errno == EROFS)
            return open(path, O_RDONLY | O_DIRECT);
        usleep(10000);
    }
    if (fd < 0)
        printf("BAD no %s\n", path);
    return fd;
}

static void submit(int fd, unsigned slot, bool write, uint64_t offset)
{
    struct iocb cb = {.aio_data = slot, .aio_lio_opcode = write ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD,
        .aio_fildes = (uint32_t)fd, .aio_buf = (uintptr_t)buffers[slot], .aio_nbytes = BLOCK, .aio_offset = (int64_t)offset};
    struct iocb *list = &cb;

    if (syscall(SYS_io_submit, context, 1L, &list) != 1)
        printf("BAD submit: %s\n", strerror(errno));
}

/* Slots that have ended; how many. */
static unsigned collect(unsigned *slots)
{
    struct io_event events[DEPTH];
    long count = syscall(SYS_io_getevents, context, 1L, (long)DEPTH, events, NULL);

    for (long i = 0; i < count; i++) {
        slots[i] = (unsigned)events[i].data;
        if (events[i].res != BLOCK)
            printf("BAD request: %lld\n", (long long)events[i].res);
    }
    return count < 0 ? 0 : (unsigned)count;
}

/* ---- verify ------------------------------------------------------------------------------------------------------ */

static uint32_t generation[BLOCKS];
static unsigned block_of[DEPTH];
static bool busy[BLOCKS];

static void write_one(int fd, unsigned slot)
{
    unsigned block = (unsigned)(next_random() % BLOCKS);
    uint32_t *words = (uint32_t *)buffers[slot];

    while (busy[block])
        block = (block + 1) % BLOCKS;
    busy[block] = true;
    block_of[slot] = block;
    generation[block]++;
    for (unsigned i = 0; i < BLOCK / 4; i += 2) {
        words[i] = block;
        words[i + 1] = generation[block];
    }
    submit(fd, slot, true, block * (uint64_t)BLOCK);
}

static void check_all(int fd)
{
    static uint32_t words[BLOCK / 4] __attribute__((aligned(4096)));

    for (unsigned block = 0; block < BLOCKS; block++) {
        if (generation[block] == 0)
            continue;
        if (pread(fd, words, BLOCK, block * (off_t)BLOCK) != BLOCK)
            printf("BAD read of block %u: %s\n", block, strerror(errno));
        for (unsigned i = 0; i < BLOCK / 4; i += 2)
            if (words[i] != block || words[i + 1] != generation[block]) {
                printf("BAD block %u: %u of %u instead of %u\n", block, words[i + 1], words[i], generation[block]);
                break;
            }
    }
}

static void verify(const char *name)
{
    unsigned slots[DEPTH], under_way = 0;
    unsigned long writes = 0;
    int fd = open_disk(name);

    for (unsigned i = 0; i < DEPTH; i++, under_way++)
        write_one(fd, i);
    puts("writing");
    for (;;) {
        unsigned count = collect(slots);

        writes += count;
        under_way -= count;
        for (unsigned i = 0; i < count; i++)
            busy[block_of[slots[i]]] = false;
        if (writes / 2000 != (writes - count) / 2000) {
            while (under_way > 0) {
                unsigned more = collect(slots);

                under_way -= more;
                writes += more;
            }
            memset(busy, 0, sizeof(busy));
            if (fsync(fd) < 0)
                printf("BAD fsync: %s\n", strerror(errno));
            check_all(fd);
            printf("verified %lu\n", writes);
            fflush(stdout);
            for (unsigned i = 0; i < DEPTH; i++, under_way++)
                write_one(fd, i);
        } else {
            for (unsigned i = 0; i < count; i++, under_way++)
                write_one(fd, slots[i]);
        }
    }
}

/* ---- bench ------------------------------------------------------------------------------------------------------- */

static double iops(int fd, unsigned depth)
{
    unsigned slots[DEPTH];
    double begun = now(), end = begun + SECONDS;
    unsigned long done = 0;

    for (unsigned i = 0; i < depth; i++)
        submit(fd, i, false, next_random() % (SPAN / BLOCK) * BLOCK);
    while (now() < end) {
        unsigned count = collect(slots);

        done += count;
        for (unsigned i = 0; i < count; i++)
            submit(fd, slots[i], false, next_random() % (SPAN / BLOCK) * BLOCK);
    }
    for (unsigned left = depth; left > 0;)
        left -= collect(slots);
    return (double)done / (now() - begun);
}

static void bench(char *names)
{
    static const unsigned DEPTHS[] = {1, DEPTH};
    const char *name[2] = {strtok(names, ","), strtok(NULL, ",")};
    int fd[2] = {open_disk(name[0]), open_disk(name[1])};

    for (unsigned round = 0; round <= ROUNDS; round++)
        for (unsigned d = 0; d < 2; d++)
            for (unsigned i = 0; i < 2; i++) {
                double rate = iops(fd[i], DEPTHS[d]);

                if (round > 0) /* the first translates the code */
                    printf("bench %s %u %.0f\n", name[i], DEPTHS[d], rate);
                fflush(stdout);
            }
    puts("bench is over");
    fflush(stdout);
    reboot(RB_POWER_OFF);
}

/* ---- start ------------------------------------------------------------------------------------------------------- */

static void load_modules(void)
{
    FILE *list = fopen("/etc/modules", "r");
    char name[200], path[256];

    while (list && fscanf(list, "%199s", name) == 1) {
        snprintf(path, sizeof(path), "/modules/%s%s", name, strstr(name, ".ko") ? "" : ".ko");
        int fd = open(path, O_RDONLY);

        if (fd < 0 || syscall(SYS_finit_module, fd, "", 0) < 0)
            fprintf(stderr, "module %s: %s\n", path, strerror(errno));
        close(fd);
    }
}

static void prepare(void)
{
    mkdir("/proc", 0755);
    mkdir("/dev", 0755);
    mount("proc", "/proc", "proc", 0, NULL);
    mount("dev", "/dev", "devtmpfs", 0, NULL);
    int console = open("/dev/console", O_RDWR);

    for (int fd = 0; fd < 3; fd++)
        dup2(console, fd);
    load_modules();
}

static char *argument(char *line, const char *name)
{
    char *at = strstr(line, name);

    if (!at)
        return NULL;
    at += strlen(name);
    at[strcspn(at, " \n")] = '\0';
    return at;
}

int main(void)
{
    static char line[4096];
    char *value;
    FILE *file;

    prepare();
    file = fopen("/proc/cmdline", "r");
    if (!file || !fgets(line, sizeof(line), file) || syscall(SYS_io_setup, DEPTH, &context) < 0)
        printf("BAD start: %s\n", strerror(errno));
    if ((value = argument(line, "blk.verify=")))
        verify(value);
    if ((value = argument(line, "blk.bench=")))
        bench(value);
    puts("BAD nothing to do");
    for (;;)
        pause();
}
