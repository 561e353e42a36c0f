/* For tests: data that forgets at a power cut what was not flushed, as a disk with a volatile cache does: each sector that was written
 * since the last flush is then, at random, what it was at that flush or what it was last. */
#ifndef TEST_CRASHY_H
#define TEST_CRASHY_H

#include "disk.h"

struct crashy {
    struct pv_data data;
    uint8_t *now, *durable; /* outlive the data: the "platter" */
    unsigned flushes;
};

static inline void crashy_submit(struct pv_data *data, struct pv_io *io)
{
    struct crashy *crashy = (struct crashy *)data;

    if (io->type == PV_IO_READ)
        pv_iov_copy_in(io->iov, io->iov_count, 0, crashy->now + io->offset, io->length);
    else if (io->type == PV_IO_WRITE)
        pv_iov_copy_out(io->iov, io->iov_count, 0, crashy->now + io->offset, io->length);
    else if (io->type != PV_IO_FLUSH)
        memset(crashy->now + io->offset, 0, io->length);
    if (io->type == PV_IO_FLUSH) {
        memcpy(crashy->durable, crashy->now, data->size);
        crashy->flushes++;
    } else if (io->flags & PV_IO_FUA) {
        memcpy(crashy->durable + io->offset, crashy->now + io->offset, io->length);
    }
    pv_io_end(io, 0);
}

static inline void crashy_close(struct pv_data *data)
{
    free(data);
}

static inline struct pv_data *crashy_data(uint8_t *now, uint8_t *durable, uint64_t size)
{
    static const struct pv_data_class class = {.name = "crashy", .submit = crashy_submit, .close = crashy_close};
    struct crashy *crashy = calloc(1, sizeof *crashy);

    CHECK(crashy);
    crashy->data = (struct pv_data){.class = &class, .size = size, .block_size = PV_SECTOR};
    crashy->now = now;
    crashy->durable = durable;
    return &crashy->data;
}

static inline void crashy_power_cut(uint8_t *now, uint8_t *durable, uint64_t size, unsigned *seed)
{
    for (uint64_t at = 0; at < size; at += PV_SECTOR)
        if (rand_r(seed) % 2)
            memcpy(now + at, durable + at, PV_SECTOR);
    memcpy(durable, now, size);
}

#endif
