/* Fuzz target: a compressed file, its seek table above all. Whatever it holds: refused, or read within its bounds.
 *
 * Input: the file. When its first byte is odd, the input's own last rows are given a footer that fits them, so that the fuzzer gets beyond
 * the magic numbers; all else is as it is in the file.
 */
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../../../csrc/memory/source.h"

enum { ROOM = 1 << 16, ROWS = 4, TABLE = 8 + 8 * ROWS + 9 };

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void put32(unsigned char *at, uint32_t value)
{
    for (int i = 0; i < 4; i++)
        at[i] = (unsigned char)(value >> 8 * i);
}

/* The last bytes become a table of ROWS rows, the rows being what they were. */
static void give_footer(unsigned char *file, size_t size)
{
    unsigned char *table = file + size - TABLE;

    put32(table, 0x184D2A5E);
    put32(table + 4, TABLE - 8);
    put32(table + TABLE - 9, ROWS);
    table[TABLE - 5] = 0;
    put32(table + TABLE - 4, 0x8F92EAB1);
}

static void read_all(struct pv_source *source)
{
    for (uint64_t at = 0; at < pv_source_bytes(source) && at < 64 << 20; at += 16 * PV_PAGE_SIZE) {
        char why[PV_SOURCE_WHY];
        struct pv_piece piece;

        if (pv_source_get(source, at, UINT64_MAX, &piece, why))
            continue;
        if (!piece.bytes || piece.bytes % PV_PAGE_SIZE || piece.bytes > pv_source_bytes(source) - at)
            __builtin_trap();
        if (memchr(piece.data, 0, piece.bytes) == piece.data + piece.bytes) /* never: it reads, as far as the first zero */
            __builtin_trap();
        pv_source_put(source, &piece);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static unsigned char file[ROOM];
    char why[PV_SOURCE_WHY];
    struct pv_source *source;
    int err, fd;

    if (size < 2 || size - 1 > ROOM)
        return 0;
    memcpy(file, data + 1, size - 1);
    if (data[0] & 1 && size - 1 >= TABLE)
        give_footer(file, size - 1);
    fd = memfd_create("fuzz", MFD_CLOEXEC);
    if (fd < 0 || write(fd, file, size - 1) != (ssize_t)(size - 1))
        __builtin_trap();
    if (!pv_source_open(PV_SOURCE_ZSTD, fd, 0, &source, &err, why)) {
        read_all(source);
        pv_source_close(source);
    }
    close(fd);
    return 0;
}
