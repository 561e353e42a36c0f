/* Scatter-gather lists: cutting a piece out of one without copying data, and copying out of one or into one. */
#ifndef PV_IOV_H
#define PV_IOV_H

#include <stdint.h>
#include <sys/uio.h>

/* The piece of `len` bytes that begins `skip` bytes into a list; returns its count, at most max (fewer bytes if that
 * cuts it). */
unsigned pv_iov_cut(const struct iovec *iov, unsigned count, uint64_t skip, uint64_t len, struct iovec *out,
    unsigned max);

/* All begin `skip` bytes into the list; those that copy return how many bytes there were, at most len. */
uint64_t pv_iov_copy_out(const struct iovec *iov, unsigned count, uint64_t skip, void *to, uint64_t len);
uint64_t pv_iov_copy_in(const struct iovec *iov, unsigned count, uint64_t skip, const void *from, uint64_t len);
void pv_iov_zero(const struct iovec *iov, unsigned count, uint64_t skip, uint64_t len);

#endif
