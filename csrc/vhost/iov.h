/* Scatter-gather lists: copying a few bytes out of one or into one, and cutting a piece out of one without copying
 * data. */
#ifndef PV_IOV_H
#define PV_IOV_H

#include <stddef.h>
#include <sys/uio.h>

/* Both copy at most len bytes from the list's beginning and return how many. */
size_t pv_iov_read(const struct iovec *iov, unsigned count, void *to, size_t len);
size_t pv_iov_write(const struct iovec *iov, unsigned count, const void *from, size_t len);

/* Writes to out the list of `len` bytes that begin `skip` bytes into iov. Returns its count: at most `max`, fewer
 * bytes if that cuts it. */
unsigned pv_iov_slice(const struct iovec *iov, unsigned count, size_t skip, size_t len, struct iovec *out,
    unsigned max);

#endif
