/* The ring that all files of one loop share: what a turn gathers goes to the kernel in one system call.
 *
 * Where the kernel has no io_uring (or the process may not use it), a pool of threads does the same with blocking
 * calls: slower, and no part of the rest knows.
 *
 * Bounds: PV_RING_ENTRIES operations are with the kernel at once; more wait in a list and follow as those end.
 */
#ifndef PV_URING_H
#define PV_URING_H

#include <sys/uio.h>

#include "common/loop.h"

#define PV_RING_ENTRIES 256

enum pv_op_type { PV_OP_READ, PV_OP_WRITE, PV_OP_SYNC, PV_OP_PUNCH, PV_OP_ZERO };

/* One operation on a file. Lies in its owner until `done`, which is called on the loop. */
struct pv_op {
    enum pv_op_type type;
    int fd;
    bool durable; /* a write: RWF_DSYNC */
    uint64_t offset, length;
    const struct iovec *iov;
    unsigned iov_count;
    int result; /* bytes, or a negative errno */
    void (*done)(struct pv_op *op);
    struct pv_task task; /* the pool's */
    struct pv_link link;
};

/* The loop's ring, made when it is first asked for; each user puts it back. NULL: *err. `pool`: threads, even where
 * io_uring works (tests). */
struct pv_uring *pv_uring_get(struct pv_loop *loop, bool pool, int *err);
void pv_uring_put(struct pv_uring *uring); /* nothing of this user is under way */
void pv_uring_submit(struct pv_uring *uring, struct pv_op *op);
bool pv_uring_is_pool(const struct pv_uring *uring);

#endif
