/* Bytes of the guest that a program of the host has not taken yet: a ring buffer that grows on demand up to a limit.
 *
 * Holds no memory while it is empty, which it is for as long as the program reads as fast as the guest writes.
 */
#ifndef PV_SENDBUF_H
#define PV_SENDBUF_H

#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

struct pv_sendbuf {
    uint8_t *data;
    size_t capacity;
    size_t start; /* of the oldest byte */
    size_t used;
};

/* Appends what iov lists. -1: out of memory, nothing was appended. The caller sees to it that used + len <= limit. */
int pv_sendbuf_append(struct pv_sendbuf *buf, const struct iovec *iov, unsigned count, size_t len, size_t limit);

/* The content as one or two pieces, oldest first. Returns how many. */
unsigned pv_sendbuf_iov(const struct pv_sendbuf *buf, struct iovec out[2]);

/* Drops the oldest len bytes. */
void pv_sendbuf_consume(struct pv_sendbuf *buf, size_t len);

void pv_sendbuf_free(struct pv_sendbuf *buf);

#endif
