/* Where a disk's bytes are, below its last filter: a file, an NBD server, memory (for tests), zeroes. */
#ifndef PV_DATA_H
#define PV_DATA_H

#include "filter.h"

struct pv_data;

struct pv_data_class {
    const char *name;
    void (*submit)(struct pv_data *data, struct pv_io *io); /* ends it with pv_io_end, at once or later */
    void (*attached)(struct pv_data *data, struct pv_loop *loop); /* on the loop, before the first request; or NULL */
    void (*detach)(struct pv_data *data); /* on the loop, after the last. May be NULL */
    void (*close)(struct pv_data *data);  /* frees it; any thread */
    int (*resize)(struct pv_data *data, uint64_t size, struct pv_fail *fail); /* NULL: has the size it has */
};

struct pv_data {
    const struct pv_data_class *class;
    struct pv_loop *loop;
    uint64_t size;       /* bytes */
    uint32_t block_size; /* 512 or 4096: what offsets and lengths must be multiples of */
    bool read_only;
};

/* A file or a block device; io_uring, or a pool of threads where the kernel has none. The descriptor becomes the
 * data's own (also on failure it is closed). */
enum {
    PV_FILE_READ_ONLY = 1,
    PV_FILE_DIRECT = 2, /* O_DIRECT */
    PV_FILE_POOL = 4,   /* threads, even where io_uring works */
    PV_FILE_QUEUED = 8, /* nothing is done at once, even where it could be (tests) */
};
struct pv_data *pv_data_file(int fd, unsigned how, struct pv_fail *fail);
/* An anonymous memory area: for tests and benches. */
struct pv_data *pv_data_memory(uint64_t size, struct pv_fail *fail);

#endif
