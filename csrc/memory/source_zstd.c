/* Compressed files: zstd's seekable format (frames, then a table of their sizes in a skippable frame).
 *
 * Only files in which damage shows are taken: every frame must carry a checksum. All frames but the last hold as many bytes, a
 * multiple of the page size, so that a page's frame follows from its number. See contrib/seekable_format in zstd's sources.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <zstd.h>

#include "../common/cleanup.h"
#include "source_kinds.h"

#define TABLE_MAGIC 0x184D2A5Eu
#define FOOTER_MAGIC 0x8F92EAB1u
#define FRAME_MAGIC 0xFD2FB528u
#define FOOTER 9u
#define TABLE_HEAD 8u
#define MAX_FRAME (4u << 20)
#define FRAME_CHECKSUM 4u /* in the frame header's descriptor, after the magic number */

struct zstd {
    const unsigned char *file;
    uint64_t file_bytes;
    ZSTD_DCtx *context;
    uint32_t frames;
    uint64_t *starts; /* [frames + 1]: where each lies */
};

static uint32_t le32(const unsigned char *bytes)
{
    return bytes[0] | (uint32_t)bytes[1] << 8 | (uint32_t)bytes[2] << 16 | (uint32_t)bytes[3] << 24;
}

static void free_zstd(struct zstd *z)
{
    ZSTD_freeDCtx(z->context);
    if (z->file)
        munmap((void *)z->file, z->file_bytes);
    free(z->starts);
    free(z);
}

static void close_zstd(struct pv_source *source)
{
    free_zstd(source->state);
}

static int load_frame(struct pv_source *source, uint64_t unit, char *to, char why[PV_SOURCE_WHY])
{
    struct zstd *z = source->state;
    uint64_t at = z->starts[unit], left = source->bytes - unit * source->unit_bytes;
    uint64_t expected = left < source->unit_bytes ? left : source->unit_bytes;
    size_t got = ZSTD_decompressDCtx(z->context, to, expected, z->file + at, z->starts[unit + 1] - at);

    if (ZSTD_isError(got))
        return pv_source_why(why, "frame %llu at byte %llu: %s", (unsigned long long)unit, (unsigned long long)at,
                             ZSTD_getErrorName(got));
    if (got != expected)
        return pv_source_why(why, "frame %llu at byte %llu holds %zu bytes, not %llu", (unsigned long long)unit,
                             (unsigned long long)at, got, (unsigned long long)expected);
    return 0;
}

/* One frame's row of the table; the frame must begin like one and carry a checksum. */
static int take_row(struct pv_source *source, struct zstd *z, const unsigned char *row, uint32_t i, uint64_t end, char *why)
{
    uint32_t packed = le32(row), unpacked = le32(row + 4);
    uint64_t at = z->starts[i];

    if (!i)
        source->unit_bytes = unpacked;
    if (!unpacked || unpacked % PV_PAGE_SIZE || unpacked > MAX_FRAME || unpacked > source->unit_bytes ||
        (unpacked != source->unit_bytes && i + 1 < z->frames))
        return pv_source_why(why, "frame %u of %u bytes: not the same whole pages as the others", i, unpacked);
    if (packed < 6 || packed > end - at || le32(z->file + at) != FRAME_MAGIC)
        return pv_source_why(why, "frame %u at byte %llu is no zstd frame", i, (unsigned long long)at);
    if (!(z->file[at + 4] & FRAME_CHECKSUM))
        return pv_source_why(why, "frame %u has no checksum: damage would not show", i);
    z->starts[i + 1] = at + packed;
    source->bytes += unpacked;
    return 0;
}

static int read_table(struct pv_source *source, struct zstd *z, char *why)
{
    const unsigned char *footer = z->file + z->file_bytes - FOOTER, *row;
    uint64_t row_bytes, table;

    if (z->file_bytes < FOOTER + TABLE_HEAD || le32(footer + 5) != FOOTER_MAGIC || footer[4] & 0x7c)
        return pv_source_why(why, "no seek table at the end: truncated, or not zstd's seekable format");
    z->frames = le32(footer);
    row_bytes = footer[4] & 0x80 ? 12 : 8;
    table = TABLE_HEAD + row_bytes * z->frames + FOOTER;
    if (!z->frames || table > z->file_bytes || le32(z->file + z->file_bytes - table) != TABLE_MAGIC ||
        le32(z->file + z->file_bytes - table + 4) != table - TABLE_HEAD)
        return pv_source_why(why, "the seek table of %u frames makes no sense", z->frames);
    z->starts = calloc((size_t)z->frames + 1, sizeof *z->starts);
    if (!z->starts)
        return pv_source_why(why, "no memory for %u frames", z->frames);
    row = z->file + z->file_bytes - table + TABLE_HEAD;
    for (uint32_t i = 0; i < z->frames; i++, row += row_bytes)
        if (take_row(source, z, row, i, z->file_bytes - table, why))
            return -1;
    if (z->starts[z->frames] != z->file_bytes - table)
        return pv_source_why(why, "the frames end at byte %llu, not where the seek table begins",
                             (unsigned long long)z->starts[z->frames]);
    return 0;
}

static int map_whole(struct zstd *z, int fd)
{
    struct stat status;
    void *map;

    if (fstat(fd, &status))
        return -1;
    z->file_bytes = (uint64_t)status.st_size;
    map = mmap(NULL, z->file_bytes, PROT_READ, MAP_SHARED, fd, 0);
    if (map == MAP_FAILED)
        return -1;
    z->file = map;
    return 0;
}

int pv_source_open_zstd(struct pv_source *source, int fd, int *err, char why[PV_SOURCE_WHY])
{
    static const struct pv_source_ops ops = {.load = load_frame, .close = close_zstd};
    struct zstd *z = calloc(1, sizeof *z);

    *err = ENOMEM;
    if (!z || !(z->context = ZSTD_createDCtx())) {
        free(z);
        return pv_source_why(why, "no memory");
    }
    if (map_whole(z, fd)) {
        *err = errno;
        pv_source_why(why, "%s", strerror(errno));
        free_zstd(z);
        return -1;
    }
    *err = EBADMSG;
    if (read_table(source, z, why)) {
        free_zstd(z);
        return -1;
    }
    source->state = z;
    source->ops = &ops;
    return 0;
}
