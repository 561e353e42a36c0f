#include "iov.h"

#include <stdint.h>
#include <string.h>

size_t pv_iov_read(const struct iovec *iov, unsigned count, void *to, size_t len)
{
    size_t done = 0;

    for (unsigned i = 0; i < count && done < len; i++) {
        size_t part = iov[i].iov_len < len - done ? iov[i].iov_len : len - done;

        memcpy((uint8_t *)to + done, iov[i].iov_base, part);
        done += part;
    }
    /* One fetch: what the caller checks is what it uses, though the guest may write there meanwhile. */
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
    return done;
}

size_t pv_iov_write(const struct iovec *iov, unsigned count, const void *from, size_t len)
{
    size_t done = 0;

    for (unsigned i = 0; i < count && done < len; i++) {
        size_t part = iov[i].iov_len < len - done ? iov[i].iov_len : len - done;

        memcpy(iov[i].iov_base, (const uint8_t *)from + done, part);
        done += part;
    }
    return done;
}

unsigned pv_iov_slice(const struct iovec *iov, unsigned count, size_t skip, size_t len, struct iovec *out, unsigned max)
{
    unsigned n = 0;

    for (unsigned i = 0; i < count && len > 0 && n < max; i++) {
        if (skip >= iov[i].iov_len) {
            skip -= iov[i].iov_len;
            continue;
        }
        size_t part = iov[i].iov_len - skip;

        if (part > len)
            part = len;
        out[n++] = (struct iovec){.iov_base = (uint8_t *)iov[i].iov_base + skip, .iov_len = part};
        len -= part;
        skip = 0;
    }
    return n;
}
