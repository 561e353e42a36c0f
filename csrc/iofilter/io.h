/* An I/O request to a virtual disk: the one thing that front ends, filters and data hand to each other.
 *
 * Theory of operation
 * -------------------
 * A front end (a guest's virtqueue, an NBD connection, a program that holds a handle) fills in
 * a request and gives it
 * to the instance of its disk:
 *
 *     front end --pv_instance_submit--> filter 0 --> filter 1 --> ... --> data          downstream
 *     front end <------ done --------- filter 0 <-- filter 1 <-- ... <-- pv_io_end      upstream, the way it came
 *
 * A filter that gets a request does exactly one of these, at once or later:
 *
 *     pv_io_pass      to the next filter downstream; `completed` of this filter hears of the result, if it has one
 *     pv_io_end       the request is over, with this result; only the filters that passed it on hear of it
 *     pv_io_redirect  to the first filter of another disk's own instance; the result comes back as after pv_io_pass
 *     keep it         and later one of the above; pv_filter's `drain` asks for it
 *
 * To split or to copy a request, or to send other bytes than the submitter's, a filter makes children (pv_io_child),
 * each a request of its own with its own iovec and its own `done`, and ends the parent when they are over.
 *
 * Who owns what: the request and its iovec are the submitter's, and stay as they are until `done`. Nobody between the
 * submitter and the data changes iov, offset, length or type. Data is not copied: the segments of a guest's
 * request point into the guest's
 * memory. What they hold may change at any time under the reader's hands (the guest is hostile): whoever looks at
 * data twice (a checksum, a
 * cipher) copies first.
 *
 * Order: requests in flight are not ordered to one another, as with any disk. A flush covers the writes that had
 * *ended* when it
 * was submitted. A write with PV_IO_FUA is durable when it ends.
 *
 * Threads: an instance, its filters and its requests belong to one loop (common/loop.h) and are touched by its thread
 * alone. No filter takes a lock.
 * Ends are never recursive without bound: a request that ends inside `submit` calls `done` there, so a submitter that
 * submits from `done` counts its depth or defers.
 */
#ifndef PV_IO_H
#define PV_IO_H

#include <stdbool.h>
#include <stdint.h>
#include "common/iov.h"
#include "common/list.h"

#define PV_CHAIN_MAX 16               /* filters of one instance */
#define PV_IO_SEGMENTS 1024           /* most segments of a request: IOV_MAX */
#define PV_IO_LENGTH_MAX (64u << 20)  /* most bytes of a read or a write */
#define PV_SECTOR 512                 /* offsets and lengths are multiples of the disk's block size, at least this */

enum pv_io_type { PV_IO_READ, PV_IO_WRITE, PV_IO_FLUSH, PV_IO_DISCARD, PV_IO_WRITE_ZEROES, PV_IO_TYPES };

enum {
    PV_IO_FUA = 1,   /* write, write-zeroes: durable when it ends */
    PV_IO_UNMAP = 2, /* write-zeroes: the range may be given back to the file system */
};

struct pv_io;
struct pv_filter;
struct pv_instance;

/* What a filter may keep with a request between `request` and `completed`. */
struct pv_frame {
    uint64_t word;
    void *pointer;
};

struct pv_io {
    /* The submitter's. */
    enum pv_io_type type;
    uint32_t flags;
    uint64_t offset, length; /* bytes; both 0 for a flush */
    const struct iovec *iov; /* of a read or a write: length bytes in all; NULL otherwise */
    unsigned iov_count;
    void (*done)(struct pv_io *io); /* called once, on the loop; the request is the submitter's again */
    void *owner;

    int error; /* the result: 0 or a positive errno. Valid in `completed` and in `done`; `completed` may change it */

    /* The framework's. */
    struct pv_instance *instance;
    unsigned at;    /* the filter it is with; the chain's length: the data */
    unsigned entry; /* the filter it came in at */
    uint32_t heard; /* one bit a filter: it passed the request on and wants to hear */
    uint32_t hops;  /* redirects so far */
    struct pv_filter *child_of; /* NULL: no child */
    struct pv_frame frames[PV_CHAIN_MAX]; /* frames[i] is filter i's, all zero when the request comes to it */

    struct pv_link link; /* for whoever holds the request: a filter that defers it, the data, a quiet instance */
    void *private[2];    /* likewise */
};

/* Gives a request to a disk, at the filter `entry` (0: the first; count: straight to the data; a handle at filter f
 * enters at f + 1).
 * The framework checks it: one that reaches past the end, is misaligned, too long, or writes to a read-only disk ends
 * with EINVAL, ENOSPC or EROFS before any filter sees it. While the instance is quiet the request waits. */
void pv_instance_submit(struct pv_instance *instance, struct pv_io *io, unsigned entry);

/* For filters, on the request that they were given. */
void pv_io_pass(struct pv_filter *filter, struct pv_io *io);
void pv_io_end(struct pv_io *io, int error);

/* A request of the filter's own that goes on downstream of it. It comes zeroed, from a cache; NULL: no memory. The
 * filter fills it in, pv_child_pass sends it, `done` gets it back, pv_child_free returns it. `parent` (which may
 * be NULL: the filter's own work) is put in `owner`. */
struct pv_io *pv_io_child(struct pv_filter *filter, struct pv_io *parent);
void pv_child_pass(struct pv_filter *filter, struct pv_io *child);
void pv_child_free(struct pv_filter *filter, struct pv_io *child);

/* Where requests can be redirected to: another disk's instance, on this loop, on another thread's, or in another
 * process. */
struct pv_target;
void pv_io_redirect(struct pv_filter *filter, struct pv_io *io, struct pv_target *target);
/* A child may be sent to a target as well as downstream. */
void pv_child_redirect(struct pv_filter *filter, struct pv_io *child, struct pv_target *target);

#endif
