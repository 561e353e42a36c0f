/* What the parts of the mirror share. Theory of operation: mirror.c. */
#ifndef PV_MIRROR_ROOMS_H
#define PV_MIRROR_ROOMS_H

#include "../common/bounce.h"
#include "../common/map.h"

#define REGION_SHIFT 16
#define REGION (1ull << REGION_SHIFT)
#define REGIONS_A_PAGE (PV_MAP_PAGE * 8)

enum state { IN_SYNC, LOST, RESYNC };

/* A request to the target; it outlives what it was made for, if that does not wait any longer. */
struct pv_mirror_sent {
    struct pv_link link; /* mirror.sent, in the order of their deadlines */
    struct pv_mirror *self;
    uint64_t deadline_ns, start, length; /* length 0: a flush */
    struct pv_chunk *chunk;              /* NULL: a flush, or given up */
    bool given_up, copy;                 /* copy: RESYNC's */
    struct iovec iov;
    uint8_t data[];
};

struct pv_mirror {
    struct pv_filter filter;
    struct pv_bounce bounce;
    struct pv_map *map;
    struct pv_target *target;
    enum state state;
    uint64_t retry_ns, patience_ns, covered;
    struct pv_link sent; /* struct pv_mirror_sent */
    struct pv_timer late;
    unsigned given_up;
    uint64_t regions;
    uint8_t *stale, *cleaning; /* a bit a region; cleaning: dirty when the flush began, not written to since */
    uint64_t stale_count, next; /* next: where RESYNC looks */
    struct pv_io copy;          /* the region that is copied */
    bool copying, copy_refused; /* refused: by the target */
    struct pv_timer timer;
    struct pv_task resync;
    struct pv_link flushes; /* struct pv_io: they go one after the other */
    bool flushing;
    unsigned flush_sides;
    int flush_error;
    struct pv_task next_flush;
    uint64_t lost, resynced, target_errors;
};

static inline bool pv_mirror_get_bit(const uint8_t *bits, uint64_t at)
{
    return bits[at / 8] >> (at % 8) & 1;
}

static inline void pv_mirror_put_bit(uint8_t *bits, uint64_t at, bool value)
{
    if (value)
        bits[at / 8] |= (uint8_t)(1u << at % 8);
    else
        bits[at / 8] &= (uint8_t)~(1u << at % 8);
}

/* mirror_bits.c */
bool pv_mirror_is_dirty(const struct pv_mirror *self, uint64_t region);
void pv_mirror_put_dirty(struct pv_mirror *self, uint64_t region, bool dirty); /* true: its page is backed */
void pv_mirror_put_stale(struct pv_mirror *self, uint64_t region, bool stale);
void pv_mirror_make_stale(struct pv_mirror *self, uint64_t start, uint64_t length); /* bytes */
void pv_mirror_all_dirty_is_stale(struct pv_mirror *self);
void pv_mirror_begin_cleaning(struct pv_mirror *self);
void pv_mirror_end_cleaning(struct pv_mirror *self);

/* mirror_target.c */
void pv_mirror_arm(struct pv_mirror *self, uint64_t wait_ns); /* the timer: the target is tried, RESYNC goes on */
void pv_mirror_target_failed(struct pv_mirror *self);
void pv_mirror_on_late(struct pv_timer *timer);
/* chunk NULL: a flush. ENOMEM: nothing was sent. The bytes are copied. */
int pv_mirror_send_to_target(struct pv_mirror *self, struct pv_chunk *chunk, bool copy);

/* mirror_resync.c */
void pv_mirror_resync(struct pv_task *task);
void pv_mirror_on_timer(struct pv_timer *timer);
void pv_mirror_copy_over(struct pv_mirror *self, int error);
int pv_mirror_deliver(struct pv_bounce *bounce, struct pv_chunk *chunk);

/* mirror_flush.c */
void pv_mirror_flush_side_over(struct pv_mirror *self);
void pv_mirror_flush_both(struct pv_task *task);

/* mirror.c */
void pv_mirror_side_over(struct pv_mirror *self, struct pv_chunk *chunk);

#endif
