/* The device's side of one split virtqueue (virtio 1.2, section 2.7), with indirect descriptors and EVENT_IDX.
 *
 * Theory of operation
 * -------------------
 * There are two ways to work with a ring; a device keeps to one.
 *
 * Synchronous: the device *peeks* at available chains without taking them, does its work in the guest's memory, and
 * then *takes* a chain, which puts it in the used ring. Nothing is held between two turns of the event loop: every
 * chain before last_avail is used, so a ring may be stopped at any moment and its position is just one index.
 *
 * Asynchronous: the device *pops* a chain, holds it for as long as its work takes, and *pushes* it, in any order.
 * What is held is known by its head (`held`), which the guest cannot use a second time meanwhile; so no more chains
 * are held than the ring has entries. Where the front end lent a region for it (inflight.h), what is held is also
 * written there, and a later process pops it again before anything new.
 *
 * The guest may write to all of it at any time. So each descriptor is copied once and only the copy is looked at, an
 * index is never trusted to be in range, and a chain cannot be longer than the queue. What breaks a rule breaks the
 * ring: it is never looked at again until it is set up anew (`fault` says why, in a word or two).
 *
 * Used entries are written as chains are taken, but the index that shows them is published once per batch by
 * pv_vq_publish, which also says whether the guest wants an interrupt.
 */
#ifndef PV_VIRTQUEUE_H
#define PV_VIRTQUEUE_H

#include <linux/virtio_ring.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#include "inflight.h"
#include "memtable.h"

#define PV_SEGMENTS_MAX 132 /* most segments of one chain, after splitting at region boundaries */
#define PV_QUEUE_MAX 32768

struct pv_vq {
    /* As the front end configured it. */
    uint32_t num;
    uint64_t desc_addr, avail_addr, used_addr; /* user addresses */
    bool event_idx;

    /* Valid while mapped. */
    struct vring_desc *desc;
    struct vring_avail *avail;
    struct vring_used *used;

    uint16_t last_avail; /* next available entry to look at; free-running */
    uint16_t used_next;  /* next used entry to write; free-running */
    uint16_t published;  /* the used index that the guest sees */
    const char *fault;   /* NULL, or why the ring is broken */

    /* For pop and push; set up by pv_vq_hold. */
    uint8_t *held;     /* by head: popped and not pushed */
    uint16_t *batch;   /* heads pushed since the last publish, by place in the used ring */
    uint16_t *resume;  /* heads that an earlier process held, oldest first */
    unsigned resume_next, resume_count;
    struct pv_inflight_queue *inflight; /* NULL: the front end lent none */
};

struct pv_chain {
    uint16_t head;
    unsigned out_count; /* iov[0 .. out_count): the device reads */
    unsigned in_count;  /* iov[out_count .. out_count + in_count): the device writes */
    size_t out_len, in_len;
    struct iovec iov[PV_SEGMENTS_MAX];
};

/* Translates the ring's addresses; to be called after any of num, addresses or memory table changed. False: not all
 * mapped or misaligned. */
bool pv_vq_map(struct pv_vq *vq, const struct pv_memtable *mem);
void pv_vq_unmap(struct pv_vq *vq);

/* Begins at available index `base`. The ring must be mapped. */
void pv_vq_start(struct pv_vq *vq, uint16_t base);

/* Looks at the chain `ahead` places after the next one. 1: *chain is filled; 0: there is none; -1: the ring is broken
 * now. */
int pv_vq_peek(struct pv_vq *vq, const struct pv_memtable *mem, unsigned ahead, struct pv_chain *chain);

/* Takes the next chain and uses it, with `written` bytes written to it. It must have been peeked at. */
void pv_vq_take(struct pv_vq *vq, const struct pv_chain *chain, uint32_t written);

/* Prepares a started ring for pop and push. `inflight` (NULL: none) is this ring's part of the front end's region: what
 * it says was held is popped first, and decides where the ring goes on. Errors: ENOMEM, EINVAL (the region makes no
 * sense for this ring). */
int pv_vq_hold(struct pv_vq *vq, struct pv_inflight_queue *inflight, int *err);
void pv_vq_release(struct pv_vq *vq);

/* 1: *chain is the next chain, held from now on; 0: there is none; -1: the ring is broken now. */
int pv_vq_pop(struct pv_vq *vq, const struct pv_memtable *mem, struct pv_chain *chain);

/* Uses a held chain, with `written` bytes written to it. */
void pv_vq_push(struct pv_vq *vq, uint16_t head, uint32_t written);

/* Whether pv_vq_pop would find something, by one look at the index. */
bool pv_vq_has_more(const struct pv_vq *vq);

/* Shows the guest what was used since the last call. True: the guest wants an interrupt. */
bool pv_vq_publish(struct pv_vq *vq);

/* Asks the guest for a kick when it next adds a chain. True: one was added meanwhile, so no kick may come; look
 * again. */
bool pv_vq_enable_kicks(struct pv_vq *vq);
void pv_vq_disable_kicks(struct pv_vq *vq);

#endif
