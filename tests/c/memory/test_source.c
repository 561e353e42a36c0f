/* Sources: whole and damaged compressed files, other processes that answer, end and lie; the bounded cache. */
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>
#include <zstd.h>

#include "../../../csrc/memory/source.h"
#include "packed.h"

/* 0 when every page comes back as it was, -1 when the source refused to open or to give one; wrong data is a failed test. */
static int read_all(int fd, char why[PV_SOURCE_WHY])
{
    struct pv_source *source;
    int err = 0, result = 0;

    if (pv_source_open(PV_SOURCE_ZSTD, fd, 0, &source, &err, why)) {
        CHECK(err && why[0]);
        return -1;
    }
    CHECK(pv_source_bytes(source) <= BYTES);
    for (uint64_t page = 0; page < PAGES && !result; page++) {
        struct pv_piece piece;

        why[0] = 0;
        result = pv_source_get(source, page * PV_PAGE_SIZE, PV_PAGE_SIZE, &piece, why);
        CHECK(!result ? !memcmp(piece.data, data + page * PV_PAGE_SIZE, PV_PAGE_SIZE) : why[0] != 0);
        if (!result)
            pv_source_put(source, &piece);
    }
    pv_source_close(source);
    return result;
}

static int read_packed(size_t bytes, char *why)
{
    int fd = file_of(bytes), result = read_all(fd, why);

    close(fd);
    return result;
}

static void test_whole_and_damaged_files(void)
{
    char why[PV_SOURCE_WHY];
    unsigned refused = 0;

    pack(1);
    CHECK(!read_packed(packed_bytes, why));
    for (size_t cut = 1; cut < packed_bytes; cut += 97)
        CHECK(read_packed(packed_bytes - cut, why) == -1);
    CHECK(read_packed(0, why) == -1);
    for (int i = 0; i < 400; i++) {
        size_t at = (size_t)random() % packed_bytes;
        unsigned char bit = (unsigned char)(1 << random() % 8);

        packed[at] ^= bit;
        refused += read_packed(packed_bytes, why) == -1; /* or the data is right all the same: read_all has looked */
        packed[at] ^= bit;
    }
    CHECK(refused > 380);
    packed[100] ^= 16;
    CHECK(read_packed(packed_bytes, why) == -1 && strstr(why, "frame 0 at byte 0"));
    pack(0);
    CHECK(read_packed(packed_bytes, why) == -1 && strstr(why, "no checksum"));
}

static void test_cache_is_bounded_and_shared(void)
{
    struct pv_source *source;
    struct pv_piece held[PV_SOURCE_SLOTS], more;
    char why[PV_SOURCE_WHY];
    uint64_t loaded, found;
    int err, fd;

    pack(1);
    fd = file_of(packed_bytes);
    CHECK(!pv_source_open(PV_SOURCE_ZSTD, fd, 0, &source, &err, why));
    for (uint64_t i = 0; i < PV_SOURCE_SLOTS; i++)
        CHECK(!pv_source_get(source, i * UNIT, UINT64_MAX, &held[i], why) && held[i].bytes == UNIT);
    CHECK(!pv_source_get(source, UNIT + PV_PAGE_SIZE, UINT64_MAX, &more, why) && more.bytes == UNIT - PV_PAGE_SIZE);
    pv_source_put(source, &more);
    CHECK(pv_source_get(source, 30 * UNIT, UNIT, &more, why) == -1 && strstr(why, "in use"));
    for (uint64_t i = 0; i < PV_SOURCE_SLOTS; i++) {
        CHECK(!memcmp(held[i].data, data + i * UNIT, UNIT));
        pv_source_put(source, &held[i]);
    }
    CHECK(!pv_source_get(source, (UNITS - 1) * UNIT, UINT64_MAX, &more, why) && more.bytes == LAST_PAGES * PV_PAGE_SIZE);
    pv_source_put(source, &more);
    CHECK(pv_source_get(source, BYTES, PV_PAGE_SIZE, &more, why) == -1 && strstr(why, "ends at byte"));
    pv_source_counts(source, &loaded, &found);
    CHECK(loaded == PV_SOURCE_SLOTS + 1 && found == 1);
    pv_source_close(source);
    close(fd);
}

struct reader {
    struct pv_source *source;
    unsigned seed;
};

static void *read_randomly(void *argument)
{
    struct reader *r = argument;
    char why[PV_SOURCE_WHY];

    for (int i = 0; i < 500; i++) {
        uint64_t page = (uint64_t)rand_r(&r->seed) % PAGES;
        struct pv_piece piece;

        CHECK(!pv_source_get(r->source, page * PV_PAGE_SIZE, PV_PAGE_SIZE, &piece, why));
        CHECK(!memcmp(piece.data, data + page * PV_PAGE_SIZE, PV_PAGE_SIZE));
        pv_source_put(r->source, &piece);
    }
    return NULL;
}

static void test_readers_at_once(void)
{
    struct reader readers[4];
    struct pv_source *source;
    pthread_t threads[4];
    char why[PV_SOURCE_WHY];
    int err, fd = file_of(packed_bytes);

    CHECK(!pv_source_open(PV_SOURCE_ZSTD, fd, 0, &source, &err, why));
    for (unsigned i = 0; i < 4; i++) {
        readers[i] = (struct reader){source, i};
        CHECK(!pthread_create(&threads[i], NULL, read_randomly, &readers[i]));
    }
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
    pv_source_close(source);
    close(fd);
}

/* Answers two questions, then ends in the middle of the third answer. */
static void *answer_for_a_while(void *argument)
{
    int fd = *(int *)argument;
    uint64_t ask[2];

    for (int i = 0; i < 3; i++) {
        CHECK(recv(fd, ask, sizeof ask, MSG_WAITALL) == sizeof ask && ask[0] + ask[1] <= BYTES);
        CHECK(send(fd, data + ask[0], i < 2 ? ask[1] : 1000, MSG_NOSIGNAL) > 0);
    }
    close(fd);
    return NULL;
}

static void test_another_process(void)
{
    struct pv_source *source;
    struct pv_piece piece;
    char why[PV_SOURCE_WHY];
    pthread_t thread;
    int err, pair[2];

    CHECK(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair));
    CHECK(pv_source_open(PV_SOURCE_REMOTE, pair[0], 100, &source, &err, why) == -1 && err == EINVAL);
    CHECK(!pv_source_open(PV_SOURCE_REMOTE, pair[0], BYTES, &source, &err, why));
    CHECK(!pthread_create(&thread, NULL, answer_for_a_while, &pair[1]));
    for (uint64_t offset = PV_PAGE_SIZE; offset < 20 * PV_PAGE_SIZE; offset += 16 * PV_PAGE_SIZE) {
        CHECK(!pv_source_get(source, offset, UINT64_MAX, &piece, why) && !memcmp(piece.data, data + offset, piece.bytes));
        pv_source_put(source, &piece);
    }
    CHECK(pv_source_get(source, 100 * PV_PAGE_SIZE, PV_PAGE_SIZE, &piece, why) == -1 && strstr(why, "has ended"));
    pthread_join(thread, NULL);
    pv_source_close(source);
    close(pair[0]);
}

int main(void)
{
    make_data();
    test_whole_and_damaged_files();
    test_cache_is_bounded_and_shared();
    test_readers_at_once();
    test_another_process();
    puts("source: all passed");
    return 0;
}
