/* For tests: a disk on a loop of the test's own thread, and requests that wait for their end. */
#ifndef TEST_DISK_H
#define TEST_DISK_H

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "iofilter/instance.h"

#define CHECK(condition)                                                    \
    do {                                                                    \
        if (!(condition)) {                                                 \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
            abort();                                                        \
        }                                                                   \
    } while (0)

#define KIB 1024ull
#define MIB (1024 * KIB)

/* A request with one segment; `over` is set by its end. */
struct call {
    struct pv_io io;
    struct iovec segment;
    bool over;
};

static inline void call_done(struct pv_io *io)
{
    ((struct call *)io->owner)->over = true;
}

static inline void call_start(struct call *call, struct pv_instance *disk, enum pv_io_type type, uint64_t offset, void *data,
    uint64_t length, uint32_t flags)
{
    memset(call, 0, sizeof(*call));
    call->segment = (struct iovec){data, length};
    call->io = (struct pv_io){.type = type, .flags = flags, .offset = offset, .length = length, .done = call_done, .owner = call};
    if (type <= PV_IO_WRITE) {
        call->io.iov = &call->segment;
        call->io.iov_count = 1;
    }
    pv_instance_submit(disk, &call->io, 0);
}

static inline void turn(struct pv_loop *loop)
{
    int err;

    CHECK(!pv_loop_turn(loop, 10000000, &err));
}

static inline int call_wait(struct call *call, struct pv_loop *loop)
{
    while (!call->over)
        turn(loop);
    return call->io.error;
}

/* 0 or a positive errno. */
static inline int disk_do(struct pv_instance *disk, enum pv_io_type type, uint64_t offset, void *data, uint64_t length, uint32_t flags)
{
    struct call call;

    call_start(&call, disk, type, offset, data, length, flags);
    return call_wait(&call, disk->loop);
}

static inline int disk_read(struct pv_instance *disk, uint64_t offset, void *data, uint64_t length)
{
    return disk_do(disk, PV_IO_READ, offset, data, length, 0);
}

static inline int disk_write(struct pv_instance *disk, uint64_t offset, const void *data, uint64_t length)
{
    return disk_do(disk, PV_IO_WRITE, offset, (void *)(uintptr_t)data, length, 0);
}

static inline void now_quiet(struct pv_instance *disk, void *context)
{
    (void)disk;
    *(bool *)context = true;
}

static inline void disk_quiesce(struct pv_instance *disk)
{
    struct pv_fail fail;
    bool quiet = false;

    CHECK(!pv_instance_quiesce(disk, now_quiet, &quiet, &fail));
    while (!quiet)
        turn(disk->loop);
}

static inline struct pv_instance *disk_on(const char *name, struct pv_data *data, struct pv_loop *loop)
{
    struct pv_fail fail;
    struct pv_instance *disk;

    CHECK(data);
    disk = pv_instance_new(name, data, &fail);
    CHECK(disk);
    pv_instance_attach_loop(disk, loop);
    return disk;
}

static inline struct pv_instance *memory_disk(const char *name, uint64_t size, struct pv_loop *loop)
{
    struct pv_fail fail;

    return disk_on(name, pv_data_memory(size, &fail), loop);
}

static inline void disk_close(struct pv_instance *disk)
{
    struct pv_fail fail = {0};

    disk_quiesce(disk);
    pv_instance_detach_loop(disk);
    if (pv_instance_free(disk, &fail)) {
        fprintf(stderr, "%s\n", fail.text);
        abort();
    }
}

/* A file without a name, of that size. */
static inline int scratch_file(uint64_t size)
{
    int fd = memfd_create("disk", MFD_CLOEXEC);

    CHECK(fd >= 0 && !ftruncate(fd, (off_t)size));
    return fd;
}

#endif
