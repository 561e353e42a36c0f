#include "iov.h"

#include <string.h>

unsigned pv_iov_cut(const struct iovec *iov, unsigned count, uint64_t skip, uint64_t len, struct iovec *out,
    unsigned max)
{
    unsigned used = 0;

    for (unsigned i = 0; i < count && len && used < max; i++) {
        uint64_t here = iov[i].iov_len;

        if (skip >= here) {
            skip -= here;
            continue;
        }
        here -= skip;
        if (here > len)
            here = len;
        out[used].iov_base = (uint8_t *)iov[i].iov_base + skip;
        out[used++].iov_len = here;
        len -= here;
        skip = 0;
    }
    return used;
}

enum direction { COPY_OUT, COPY_IN, ZERO };

static uint64_t walk(const struct iovec *iov, unsigned count, uint64_t skip, uint8_t *flat, uint64_t len,
    enum direction way)
{
    uint64_t done = 0;

    for (unsigned i = 0; i < count && done < len; i++) {
        uint64_t here = iov[i].iov_len;
        uint8_t *base = iov[i].iov_base;

        if (skip >= here) {
            skip -= here;
            continue;
        }
        here -= skip;
        if (here > len - done)
            here = len - done;
        if (way == COPY_OUT)
            memcpy(flat + done, base + skip, here);
        else if (way == COPY_IN)
            memcpy(base + skip, flat + done, here);
        else
            memset(base + skip, 0, here);
        done += here;
        skip = 0;
    }
    return done;
}

uint64_t pv_iov_copy_out(const struct iovec *iov, unsigned count, uint64_t skip, void *to, uint64_t len)
{
    uint64_t done = walk(iov, count, skip, to, len, COPY_OUT);

    /* One fetch: what the caller checks is what it uses, though a guest may write there meanwhile. */
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
    return done;
}

uint64_t pv_iov_copy_in(const struct iovec *iov, unsigned count, uint64_t skip, const void *from, uint64_t len)
{
    return walk(iov, count, skip, (uint8_t *)from, len, COPY_IN);
}

void pv_iov_zero(const struct iovec *iov, unsigned count, uint64_t skip, uint64_t len)
{
    walk(iov, count, skip, NULL, len, ZERO);
}
