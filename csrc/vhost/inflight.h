/* Which chains are in flight, written where another process finds it when this one was killed.
 *
 * The region is the front end's to keep: it asks for one (GET_INFLIGHT_FD), holds it over our death, and gives it to
 * our successor (SET_INFLIGHT_FD). Its layout for split rings is fixed by the vhost-user specification ("Inflight
 * I/O tracking"), so that even another implementation could go on from it.
 *
 * Theory of operation
 * -------------------
 * A chain is marked when it is taken, and unmarked after the used index shows it. Those are two stores, and a
 * process may die between them. So each chain that is about to be shown is first linked into a list
 * (last_batch_head, next), and `used_idx` is the used index up to which the marks were brought up to date:
 *
 *     used_idx == the ring's used index     the marks are right
 *     used_idx is behind by n               the first n of the list were shown: they are unmarked now
 *
 * A request in flight may have been carried out and not shown; its successor carries it out once more. For block
 * requests this is harmless, for none of them was acknowledged, and whoever has two of them in flight to one block has
 * no right to any order.
 *
 * The front end maps the region too and may write anything there: every number is checked when it is read.
 */
#ifndef PV_INFLIGHT_H
#define PV_INFLIGHT_H

#include <stddef.h>
#include <stdint.h>

struct pv_inflight_desc {
    uint8_t inflight;
    uint8_t padding[5];
    uint16_t next;
    uint64_t counter; /* order of taking */
};

struct pv_inflight_queue {
    uint64_t features;
    uint16_t version; /* 0: never used */
    uint16_t desc_num;
    uint16_t last_batch_head;
    uint16_t used_idx;
    struct pv_inflight_desc desc[];
};

struct pv_inflight {
    int fd; /* -1: none */
    void *map;
    size_t size;
    uint16_t queues, queue_size;
};

/* Makes a fresh region of zeroes for so many queues. Errors: what memfd_create, ftruncate and mmap may say. */
int pv_inflight_create(struct pv_inflight *region, uint16_t queues, uint16_t queue_size, int *err);

/* Maps a region of the front end's; takes fd over on success. Errors: EINVAL (too short for what it is said to hold, or
 * no file that keeps its length), and what mmap may say. */
int pv_inflight_map(struct pv_inflight *region, int fd, uint64_t size, uint64_t offset, uint16_t queues,
    uint16_t queue_size, int *err);
void pv_inflight_close(struct pv_inflight *region);

/* The part of a queue with num entries; NULL when the region has none for it. */
struct pv_inflight_queue *pv_inflight_queue(const struct pv_inflight *region, unsigned queue, uint32_t num);

/* Brings the marks up to date with a ring whose used index is used_idx, and writes what is in flight, oldest first, to
 * heads (room for num). How many; -1: the region is another ring's. */
int pv_inflight_recover(struct pv_inflight_queue *queue, uint32_t num, uint16_t used_idx, uint16_t *heads);

void pv_inflight_take(struct pv_inflight_queue *queue, uint16_t head);
void pv_inflight_put(struct pv_inflight_queue *queue, uint16_t head);

/* The used index went from `from` to `to`; batch[i % num] is the head of each. */
void pv_inflight_done(struct pv_inflight_queue *queue, const uint16_t *batch, uint32_t num, uint16_t from, uint16_t to);

#endif
