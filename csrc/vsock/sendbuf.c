#include "sendbuf.h"

#include <stdlib.h>
#include <string.h>

#include "common/iov.h"

#define FIRST_CAPACITY 4096

static int grow(struct pv_sendbuf *buf, size_t needed, size_t limit)
{
    size_t capacity = buf->capacity ? buf->capacity : FIRST_CAPACITY;
    struct iovec old[2];
    unsigned pieces = pv_sendbuf_iov(buf, old);
    uint8_t *fresh;

    while (capacity < needed)
        capacity *= 2;
    if (capacity > limit && limit >= needed)
        capacity = limit;
    fresh = malloc(capacity);
    if (!fresh)
        return -1;
    pv_iov_copy_out(old, pieces, 0, fresh, buf->used);
    free(buf->data);
    buf->data = fresh;
    buf->capacity = capacity;
    buf->start = 0;
    return 0;
}

int pv_sendbuf_append(struct pv_sendbuf *buf, const struct iovec *iov, unsigned count, size_t len, size_t limit)
{
    struct iovec room[2];
    size_t end, first;

    if (len == 0)
        return 0;
    if (buf->used + len > buf->capacity && grow(buf, buf->used + len, limit) < 0)
        return -1;
    end = (buf->start + buf->used) % buf->capacity;
    first = buf->capacity - end < len ? buf->capacity - end : len;
    room[0] = (struct iovec){.iov_base = buf->data + end, .iov_len = first};
    room[1] = (struct iovec){.iov_base = buf->data, .iov_len = len - first};
    size_t skip = 0;

    for (unsigned i = 0; i < 2 && room[i].iov_len > 0; i++) {
        struct iovec piece[64];

        for (size_t done = 0; done < room[i].iov_len;) {
            unsigned n = pv_iov_cut(iov, count, skip, room[i].iov_len - done, piece, 64);
            size_t got = pv_iov_copy_out(piece, n, 0, (uint8_t *)room[i].iov_base + done, room[i].iov_len - done);

            done += got;
            skip += got;
        }
    }
    buf->used += len;
    return 0;
}

unsigned pv_sendbuf_iov(const struct pv_sendbuf *buf, struct iovec out[2])
{
    size_t first;

    if (buf->used == 0)
        return 0;
    first = buf->capacity - buf->start < buf->used ? buf->capacity - buf->start : buf->used;
    out[0] = (struct iovec){.iov_base = buf->data + buf->start, .iov_len = first};
    if (first == buf->used)
        return 1;
    out[1] = (struct iovec){.iov_base = buf->data, .iov_len = buf->used - first};
    return 2;
}

void pv_sendbuf_consume(struct pv_sendbuf *buf, size_t len)
{
    buf->used -= len;
    if (buf->used == 0) {
        pv_sendbuf_free(buf);
        return;
    }
    buf->start = (buf->start + len) % buf->capacity;
}

void pv_sendbuf_free(struct pv_sendbuf *buf)
{
    free(buf->data);
    *buf = (struct pv_sendbuf){0};
}
