/* Two places for a disk's data, and a map that says which cluster is where: the engine of `linkedclone` and `snapshot`.
 *
 * Theory of operation
 * -------------------
 * A cluster's data is *old* until the cluster was written for the first time, and *new* from then on:
 *
 *                    old data (never written)            new data
 *     linkedclone    the base disk's own instance        downstream: the clone's own file
 *     snapshot       downstream: the disk as it was      the delta
 *
 * Which of the two a cluster is, one bit says in a pv_map (map.h: killed processes, power cuts).
 *
 *     read        a run of clusters of one kind goes where it is, as it came: no copy, no child. A request that spans both is split.
 *     write       all new: goes there. Else it is *allocating*: it goes to the new data, and when it has ended without an error the bits of
 *                 its clusters are set, before it is acknowledged. What it covers of its first and last cluster only in part is filled up
 *                 from the old data before (copy-up).
 *     zeroes      as a write. discard: to the new data; where that has nothing, nothing happens.
 *     flush       data first, then the map: pv_map_sync.
 *
 * The bit is set after the data is there, never before: a kill in between leaves the cluster old, as if the write (which nobody had
 * acknowledged) had not been.
 *
 * Two allocating writes may be to the same cluster. If both cover it whole their order does not matter. If one must copy up, it has the
 * cluster alone: it waits for those that came before, and those that come later wait for it. Writes to clusters that are new already know
 * nothing of this.
 *
 * Bounds: PV_COW_COPYUPS copy-ups at a time (others wait, holding nothing), PV_COW_PIECES children of a split request at a time.
 */
#ifndef PV_COW_H
#define PV_COW_H

#include "map.h"

#define PV_COW_COPYUPS 32
#define PV_COW_PIECES 8

enum pv_side { PV_OLD, PV_NEW };

struct pv_cow {
    struct pv_filter filter;
    struct pv_map *map;
    struct pv_target *target; /* of the side that is not downstream */
    enum pv_side below;       /* the side that is downstream */
    unsigned shift;           /* log2 of the cluster's size */
    uint64_t old_size;        /* behind it the old data is zeroes */
    struct pv_link active;    /* struct alloc, in the order in which they came */
    struct pv_link waiting;   /* struct pv_io */
    unsigned copyups;
    struct pv_task wake;
    uint64_t old_reads, new_reads, split_reads, allocated, copied_up;
};

/* What is written into a new map's head. */
struct pv_cow_layout {
    uint64_t cluster, old_size;
};

int pv_cow_create(const char *state, const char *kind, const struct pv_cow_layout *layout, uint64_t size, struct pv_fail *fail);
/* Opens the map, sets all of the struct up but the target. */
int pv_cow_open(struct pv_cow *cow, const char *state, const char *kind, enum pv_side below, struct pv_fail *fail);
void pv_cow_close(struct pv_filter *filter);
void pv_cow_attached(struct pv_filter *filter);
void pv_cow_detach(struct pv_filter *filter);
void pv_cow_request(struct pv_filter *filter, struct pv_io *io);
void pv_cow_completed(struct pv_filter *filter, struct pv_io *io);
void pv_cow_resized(struct pv_filter *filter, uint64_t size);
unsigned pv_cow_figures(const struct pv_filter *filter, struct pv_figure *out, unsigned max);
/* The setting `cluster`: a power of 2 from 4K to 1M. */
int pv_setting_cluster(const struct pv_settings *settings, uint64_t *out, struct pv_fail *fail);

/* ---- between cow.c and cow_write.c ---- */

void pv_cow_send(struct pv_cow *cow, struct pv_io *io, enum pv_side side);
void pv_cow_send_child(struct pv_cow *cow, struct pv_io *child, enum pv_side side);
/* Whether the cluster is new; *end: the first cluster behind it, at most `limit`, that is not of its kind. */
bool pv_cow_run(const struct pv_cow *cow, uint64_t cluster, uint64_t limit, uint64_t *end);
void pv_cow_write(struct pv_cow *cow, struct pv_io *io);
void pv_cow_write_init(struct pv_cow *cow);

#endif
