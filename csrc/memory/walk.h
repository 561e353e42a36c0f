/* The page walk, inline: for the fault server and for whoever looks up by the million. See space.h for what it promises.
 *
 * Every level has a node: where nothing is mapped, a sentinel whose children are the sentinels below it, and whose leaf says "not
 * mapped". So a walk tests nothing on its way. A processor keeps as many walks in flight as fit its reorder buffer, and each walk
 * waits for memory most of its time: look-ups that do not depend on each other are as fast as the walk is short.
 */
#ifndef PV_WALK_H
#define PV_WALK_H

#include "space.h"

#define PV_WALK_FANOUT 512u
#define PV_WALK_LEVEL_BITS 9

struct pv_leaf {
    _Atomic(uint32_t) pfe[PV_WALK_FANOUT];
};

struct pv_inner {
    _Atomic(void *) child[PV_WALK_FANOUT];
};

/* What a walk reads: the head of a space. Constant while the space lives, so whoever looks up in a loop may hold a copy. */
struct pv_walk {
    const struct pv_pfdb *db;
    pv_pfe *slots; /* db's */
    struct pv_inner *root;
};

static inline unsigned pv_walk_index(uint64_t address, int level)
{
    return (unsigned)(address >> (PV_PAGE_SHIFT + PV_WALK_LEVEL_BITS * level)) & (PV_WALK_FANOUT - 1);
}

/* The leaf of an address below 2^48; the sentinel where there is none. */
static inline struct pv_leaf *pv_walk_leaf(const struct pv_walk *walk, uint64_t address)
{
    const struct pv_inner *node = walk->root;

    node = atomic_load_explicit(&node->child[pv_walk_index(address, 3)], memory_order_acquire);
    node = atomic_load_explicit(&node->child[pv_walk_index(address, 2)], memory_order_acquire);
    return atomic_load_explicit(&node->child[pv_walk_index(address, 1)], memory_order_acquire);
}

static inline int pv_walk_lookup(const struct pv_walk *walk, uint64_t address, struct pv_translation *out)
{
    uint32_t pfe, slot;

    if (address >> PV_SPACE_BITS)
        return 0;
    pfe = atomic_load_explicit(&pv_walk_leaf(walk, address)->pfe[pv_walk_index(address, 0)], memory_order_acquire);
    if (!pfe)
        return 0;
    slot = pv_pfe_vad(atomic_load_explicit(&walk->slots[pfe], memory_order_relaxed));
    out->vad = (const struct pv_vad *)(const void *)((const char *)walk->slots + (size_t)slot * sizeof(pv_pfe));
    out->pfe = pfe;
    out->page = pfe - slot - PV_VAD_SLOTS;
    return 1;
}

static inline const struct pv_walk *pv_space_walk(const struct pv_space *space) { return (const struct pv_walk *)space; }

#endif
