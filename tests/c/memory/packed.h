/* For tests: data of whole pages, and a compressed file of it in zstd's seekable format. */
#ifndef PACKED_H
#define PACKED_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>
#include <zstd.h>

#include "../../../csrc/memory/pfdb.h"

#define CHECK(condition)                                                                   \
    do {                                                                                   \
        if (!(condition)) {                                                                \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);                \
            exit(1);                                                                       \
        }                                                                                  \
    } while (0)

enum { UNIT_PAGES = 4, UNITS = 40, LAST_PAGES = 3, PAGES = UNIT_PAGES * (UNITS - 1) + LAST_PAGES };
#define UNIT ((size_t)UNIT_PAGES * PV_PAGE_SIZE)
#define BYTES ((size_t)PAGES * PV_PAGE_SIZE)

static unsigned char data[BYTES];
static unsigned char packed[2 * BYTES];
static size_t packed_bytes;

static void put32(size_t at, uint32_t value)
{
    for (int i = 0; i < 4; i++)
        packed[at + (size_t)i] = (unsigned char)(value >> 8 * i);
}

static void pack(int checksum)
{
    ZSTD_CCtx *context = ZSTD_createCCtx();
    uint32_t sizes[UNITS][2];
    size_t at = 0;

    CHECK(context && !ZSTD_isError(ZSTD_CCtx_setParameter(context, ZSTD_c_checksumFlag, checksum)));
    for (size_t i = 0; i < UNITS; i++) {
        size_t length = i + 1 < UNITS ? UNIT : BYTES - i * UNIT;
        size_t n = ZSTD_compress2(context, packed + at, sizeof packed - at, data + i * UNIT, length);

        CHECK(!ZSTD_isError(n));
        sizes[i][0] = (uint32_t)n;
        sizes[i][1] = (uint32_t)length;
        at += n;
    }
    ZSTD_freeCCtx(context);
    put32(at, 0x184D2A5E);
    put32(at + 4, UNITS * 8 + 9);
    at += 8;
    for (size_t i = 0; i < UNITS; i++, at += 8) {
        put32(at, sizes[i][0]);
        put32(at + 4, sizes[i][1]);
    }
    put32(at, UNITS);
    packed[at + 4] = 0;
    put32(at + 5, 0x8F92EAB1);
    packed_bytes = at + 9;
}

static inline int file_of(size_t bytes)
{
    int fd = memfd_create("packed", MFD_CLOEXEC);

    CHECK(fd >= 0 && write(fd, packed, bytes) == (ssize_t)bytes);
    return fd;
}

static void make_data(void)
{
    for (size_t i = 0; i < BYTES; i++)
        data[i] = (unsigned char)(i % 7 ? i / PV_PAGE_SIZE : (size_t)random());
}

#endif
