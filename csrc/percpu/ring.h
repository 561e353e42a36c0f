/* Per-CPU rings: records of any length, written where the writer runs, read by anyone.
 *
 * Theory of operation
 * -------------------
 * Each area has a ring of its own: `head` (bytes ever reserved; writers), `tail` (bytes ever read; readers), data between them.
 *
 *      writer:  reserve (a sequence: header {RESERVED, my thread} and head)  ->  write the payload, wherever one runs by now
 *               ->  commit (one store into the header)
 *      reader:  header at tail is COMMITTED -> copy it, advance tail;   RESERVED -> wait, or skip it when its writer is dead
 *
 *      a record:  RESERVED --commit--> COMMITTED --read--> gone
 *                     `--its thread ended without a commit--> gone, counted in `abandoned`
 *
 * A record never wraps: where it does not fit before the end of the ring, a PAD fills the rest and the record starts at 0.
 *
 * Order: records of one thread, as long as it stays on one CPU, come out in its order; records of different CPUs have none.
 * Nothing is overwritten: a full ring refuses (0) and counts `dropped`.
 *
 * Writers never wait, with rseq (without: for each other, under a lock). Readers of one area wait for each other, for the time of one copy. A writer or
 * reader that is killed leaves the ring usable; a record that was being read then is read again.
 */
#ifndef PV_RING_H
#define PV_RING_H

#include "percpu.h"

#define PV_RING_HEADER 8
#define PV_RING_DROPPED 8    /* in the control item, beside head: records refused */
#define PV_RING_LOCK 72      /* of readers, beside tail */
#define PV_RING_ABANDONED 80 /* beside tail */

struct pv_ring {
    struct pv_ring_shape shape;
    struct pv_percpu *areas;
    pv_percpu_handle control, data; /* what another process opens it by */
};

/* `bytes` of data in each area: a power of two, 4096 at least. Errors of pv_percpu_alloc; EINVAL. */
int pv_ring_create(struct pv_percpu *areas, uint32_t bytes, struct pv_ring *out, int *err);
/* ESTALE: freed. EINVAL: these handles are no ring. */
int pv_ring_open(struct pv_percpu *areas, pv_percpu_handle control, pv_percpu_handle data, struct pv_ring *out, int *err);
/* No record may be reserved any more and none be read meanwhile. ESTALE: freed before. */
int pv_ring_free(struct pv_ring *ring, int *err);

/* Room for `bytes` of payload, 8-aligned, at *payload. 1; 0: full, or longer than half the ring; -1: freed. */
int pv_ring_reserve(const struct pv_ring *ring, uint32_t bytes, void **payload);
/* Any thread may commit; `bytes` at most what was reserved. After that the payload is the readers'. */
void pv_ring_commit(void *payload, uint32_t bytes);
int pv_ring_put(const struct pv_ring *ring, const void *data, uint32_t bytes); /* reserve, copy, commit; as reserve */

/* Takes the oldest record of one area. 1 with *bytes of it in `out`; 0: none is ready; -1: *err is EMSGSIZE (it has *bytes, more than `room`; it stays),
 * ESTALE, or EPROTO (another process damaged the ring: what it held is dropped). */
int pv_ring_read(const struct pv_ring *ring, uint32_t area, void *out, size_t room, size_t *bytes, int *err);

struct pv_ring_counts {
    uint64_t dropped, abandoned, waiting_bytes;
};
int pv_ring_count(const struct pv_ring *ring, struct pv_ring_counts *out, int *err); /* over all areas; ESTALE */

#endif
