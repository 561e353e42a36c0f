/* Counters of the data plane, per CPU: given to the compiler before its sources, which otherwise stay as they are. */
#ifndef PERCPU_USERS_H
#define PERCPU_USERS_H

#include <stdatomic.h>

#include "percpu/percpu.h"

/* A page of counters; a counter's address says which of them it is. */
extern struct pv_percpu_ref users_counts;

static inline void users_count(const void *counter, uint64_t n)
{
    struct pv_percpu_ref ref = {users_counts.base + ((uintptr_t)counter & 4088), users_counts.limit};

    pv_percpu_add(ref, (int64_t)n);
}

/* Each device's own functions are seen once, here, and stay behind their headers' guards. The fault server's is no inline function: the linker
 * puts another in its place. */
#ifdef COUNT_BLOCK
#include "blk/device.h"
#include "iofilter/rooms.h"
#define pv_blk_count(counter, n) users_count(counter, n)
#define pv_bump(counter, n) users_count(counter, n)
#endif
#ifdef COUNT_VSOCK
#include "vsock/device.h"
#define pv_count(counter, n) users_count(counter, n)
#endif

#endif
