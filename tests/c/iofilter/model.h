/* For tests of filters that change what lies below: the same requests to a disk and to a plain array. */
#ifndef TEST_MODEL_H
#define TEST_MODEL_H

#include "chain.h"

static inline uint8_t *pattern(uint64_t size, unsigned seed)
{
    uint8_t *bytes = malloc(size);

    CHECK(bytes);
    for (uint64_t i = 0; i < size; i++)
        bytes[i] = (uint8_t)(rand_r(&seed) >> 8);
    return bytes;
}

static inline void create(const char *class, const char *text, uint64_t size)
{
    struct settings_text parsed;
    struct pv_fail fail;

    if (pv_filter_create(class, settings_of(&parsed, text), size, &fail)) {
        fprintf(stderr, "%s: %s\n", class, fail.text);
        abort();
    }
}

#define BATCH 24

/* A batch of requests at once, no two of which overlap, of all kinds; then all of the disk is compared. */
static inline void random_batch(struct pv_instance *disk, uint8_t *model, uint64_t size, unsigned *seed)
{
    static struct call calls[BATCH];
    static uint8_t *data[BATCH];
    uint64_t room = size / BATCH / 512 * 512;

    for (unsigned i = 0; i < BATCH; i++) {
        uint64_t length = (1 + (uint64_t)rand_r(seed) % (room / 512 / (rand_r(seed) % 4 ? 16 : 1))) * 512;
        uint64_t at = i * room + (uint64_t)rand_r(seed) % ((room - length) / 512 + 1) * 512;
        enum pv_io_type type = (enum pv_io_type[]){PV_IO_READ, PV_IO_WRITE, PV_IO_WRITE, PV_IO_FLUSH, PV_IO_WRITE_ZEROES}[rand_r(seed) % 5];

        data[i] = pattern(length, (unsigned)rand_r(seed));
        if (type == PV_IO_FLUSH)
            call_start(&calls[i], disk, type, 0, NULL, 0, 0);
        else
            call_start(&calls[i], disk, type, at, data[i], length, rand_r(seed) % 8 || type == PV_IO_READ ? 0 : PV_IO_FUA);
    }
    for (unsigned i = 0; i < BATCH; i++) {
        struct pv_io *io = &calls[i].io;

        CHECK(!call_wait(&calls[i], disk->loop));
        if (io->type == PV_IO_READ)
            CHECK(!memcmp(data[i], model + io->offset, io->length));
        else if (io->type == PV_IO_WRITE)
            memcpy(model + io->offset, data[i], io->length);
        else if (io->type == PV_IO_WRITE_ZEROES)
            memset(model + io->offset, 0, io->length);
        free(data[i]);
    }
}

static inline void check_all(struct pv_instance *disk, const uint8_t *model, uint64_t size)
{
    uint8_t *seen = malloc(size);

    CHECK(seen && !disk_read(disk, 0, seen, size));
    for (uint64_t i = 0; i < size; i++)
        if (seen[i] != model[i]) {
            fprintf(stderr, "byte %llu is %d, not %d\n", (unsigned long long)i, seen[i], model[i]);
            abort();
        }
    free(seen);
}

/* Writes to different sectors of one block, all under way at once: none may undo another. The data below should be slow. */
static inline void write_neighbours(struct pv_instance *disk, uint64_t block)
{
    static struct call calls[8];
    static uint8_t data[8][512];
    uint8_t seen[4096];

    for (unsigned i = 0; i < 8; i++) {
        memset(data[i], (int)(i + 1 + block / 4096), 512);
        call_start(&calls[i], disk, PV_IO_WRITE, block + i * 512, data[i], 512, 0);
    }
    for (unsigned i = 0; i < 8; i++)
        CHECK(!call_wait(&calls[i], disk->loop));
    CHECK(!disk_read(disk, block, seen, 4096));
    for (unsigned i = 0; i < 8; i++)
        CHECK(!memcmp(seen + i * 512, data[i], 512));
}

#endif
