#include "virtqueue.h"

#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* All words shared with the guest are little-endian and naturally aligned; they are read and written whole. */
static uint16_t load16(const uint16_t *p, int order)
{
    return le16toh(__atomic_load_n(p, order));
}

static void store16(uint16_t *p, uint16_t value, int order)
{
    __atomic_store_n(p, htole16(value), order);
}

static uint16_t *used_event(const struct pv_vq *vq)
{
    return &vq->avail->ring[vq->num];
}

static uint16_t *avail_event(const struct pv_vq *vq)
{
    return (uint16_t *)&vq->used->ring[vq->num];
}

/* One fetch: the fence keeps the compiler from reading the guest's memory a second time, when it may have changed. */
static void fetch(void *to, const void *from, size_t len)
{
    memcpy(to, from, len);
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
}

static int broken(struct pv_vq *vq, const char *fault)
{
    vq->fault = fault;
    return -1;
}

bool pv_vq_map(struct pv_vq *vq, const struct pv_memtable *mem)
{
    uint64_t n = vq->num;

    pv_vq_unmap(vq);
    if (n == 0 || (vq->desc_addr & 15) || (vq->avail_addr & 1) || (vq->used_addr & 3))
        return false;
    void *desc = pv_mem_user(mem, vq->desc_addr, 16 * n);
    void *avail = pv_mem_user(mem, vq->avail_addr, 6 + 2 * n);
    void *used = pv_mem_user(mem, vq->used_addr, 6 + 8 * n);

    /* The region's place in this process must keep the alignment too: a region need not begin at a page. */
    if (!desc || !avail || !used || ((uintptr_t)desc & 15) || ((uintptr_t)avail & 1) || ((uintptr_t)used & 3))
        return false;
    vq->desc = desc;
    vq->avail = avail;
    vq->used = used;
    return true;
}

void pv_vq_unmap(struct pv_vq *vq)
{
    vq->desc = NULL;
    vq->avail = NULL;
    vq->used = NULL;
}

void pv_vq_start(struct pv_vq *vq, uint16_t base)
{
    vq->last_avail = base;
    vq->used_next = load16(&vq->used->idx, __ATOMIC_ACQUIRE);
    vq->published = vq->used_next;
    vq->fault = NULL;
}

struct walk {
    const struct pv_memtable *mem;
    struct pv_chain *chain;
    const char *fault;
};

/* Adds one buffer, split where it crosses from one memory region into the next. */
static int add_buffer(struct walk *w, uint64_t addr, uint64_t len, bool writable)
{
    struct pv_chain *c = w->chain;

    if (!writable && c->in_count > 0) {
        w->fault = "ring: readable descriptor after a writable one";
        return -1;
    }
    while (len > 0) {
        unsigned at = c->out_count + c->in_count;
        uint64_t part = len;
        void *base = pv_mem_guest(w->mem, addr, &part);

        if (!base) {
            w->fault = "ring: descriptor outside of guest memory";
            return -1;
        }
        if (at == PV_SEGMENTS_MAX) {
            w->fault = "ring: chain of too many segments";
            return -1;
        }
        c->iov[at] = (struct iovec){.iov_base = base, .iov_len = part};
        if (writable) {
            c->in_count++;
            c->in_len += part;
        } else {
            c->out_count++;
            c->out_len += part;
        }
        addr += part;
        len -= part;
    }
    return 0;
}

/* A table need not be 16-byte aligned, and it may lie across two regions: descriptors are copied bytewise. */
static bool read_indirect(const struct pv_memtable *mem, uint64_t addr, struct vring_desc *out)
{
    uint8_t *to = (uint8_t *)out;
    uint64_t left = sizeof(*out);

    while (left > 0) {
        uint64_t part = left;
        const void *from = pv_mem_guest(mem, addr, &part);

        if (!from)
            return false;
        fetch(to, from, part);
        to += part;
        addr += part;
        left -= part;
    }
    return true;
}

static int walk_indirect(struct walk *w, const struct vring_desc *table, uint32_t queue_size)
{
    uint64_t addr = le64toh(table->addr);
    uint32_t bytes = le32toh(table->len);
    uint32_t count = bytes / sizeof(struct vring_desc), i = 0;

    if (bytes == 0 || bytes % sizeof(struct vring_desc) || count > queue_size) {
        w->fault = "ring: indirect table of a bad size";
        return -1;
    }
    for (uint32_t steps = 0; steps < count; steps++) {
        struct vring_desc d;

        if (!read_indirect(w->mem, addr + (uint64_t)i * sizeof(d), &d)) {
            w->fault = "ring: indirect table outside of guest memory";
            return -1;
        }
        uint16_t flags = le16toh(d.flags);

        if (flags & VRING_DESC_F_INDIRECT) {
            w->fault = "ring: indirect table within an indirect table";
            return -1;
        }
        if (add_buffer(w, le64toh(d.addr), le32toh(d.len), flags & VRING_DESC_F_WRITE) < 0)
            return -1;
        if (!(flags & VRING_DESC_F_NEXT))
            return 0;
        i = le16toh(d.next);
        if (i >= count) {
            w->fault = "ring: indirect descriptor index out of range";
            return -1;
        }
    }
    w->fault = "ring: indirect chain is a loop";
    return -1;
}

static int walk_chain(struct walk *w, const struct pv_vq *vq, uint16_t head)
{
    uint32_t i = head;

    for (uint32_t steps = 0; steps < vq->num; steps++) {
        struct vring_desc d;

        if (i >= vq->num) {
            w->fault = "ring: descriptor index out of range";
            return -1;
        }
        fetch(&d, &vq->desc[i], sizeof(d));
        uint16_t flags = le16toh(d.flags);

        if (flags & VRING_DESC_F_INDIRECT) {
            if (flags & VRING_DESC_F_NEXT) {
                w->fault = "ring: indirect descriptor with a next one";
                return -1;
            }
            return walk_indirect(w, &d, vq->num);
        }
        if (add_buffer(w, le64toh(d.addr), le32toh(d.len), flags & VRING_DESC_F_WRITE) < 0)
            return -1;
        if (!(flags & VRING_DESC_F_NEXT))
            return 0;
        i = le16toh(d.next);
    }
    w->fault = "ring: chain is a loop";
    return -1;
}

int pv_vq_peek(struct pv_vq *vq, const struct pv_memtable *mem, unsigned ahead, struct pv_chain *chain)
{
    uint16_t available = (uint16_t)(load16(&vq->avail->idx, __ATOMIC_ACQUIRE) - vq->last_avail);
    struct walk w = {.mem = mem, .chain = chain};

    if (available > vq->num)
        return broken(vq, "ring: available index out of range");
    if (ahead >= available)
        return 0;
    chain->head = load16(&vq->avail->ring[(uint16_t)(vq->last_avail + ahead) % vq->num], __ATOMIC_RELAXED);
    chain->out_count = chain->in_count = 0;
    chain->out_len = chain->in_len = 0;
    if (walk_chain(&w, vq, chain->head) < 0)
        return broken(vq, w.fault);
    return 1;
}

void pv_vq_take(struct pv_vq *vq, const struct pv_chain *chain, uint32_t written)
{
    struct vring_used_elem *elem = &vq->used->ring[vq->used_next % vq->num];

    elem->id = htole32(chain->head);
    elem->len = htole32(written);
    vq->used_next++;
    vq->last_avail++;
}

/* ---- chains that are held ---------------------------------------------------------------------------------------- */

int pv_vq_hold(struct pv_vq *vq, struct pv_inflight_queue *inflight, int *err)
{
    int count;

    pv_vq_release(vq);
    vq->held = calloc(vq->num, sizeof(*vq->held));
    vq->batch = calloc(vq->num, sizeof(*vq->batch));
    vq->resume = calloc(vq->num, sizeof(*vq->resume));
    if (!vq->held || !vq->batch || !vq->resume) {
        pv_vq_release(vq);
        *err = ENOMEM;
        return -1;
    }
    if (!inflight)
        return 0;
    count = pv_inflight_recover(inflight, vq->num, vq->used_next, vq->resume);
    if (count < 0) {
        pv_vq_release(vq);
        *err = EINVAL;
        return -1;
    }
    vq->inflight = inflight;
    vq->resume_count = (unsigned)count;
    /* Every chain before last_avail is used or held; the front end may not know how many are held. */
    vq->last_avail = (uint16_t)(vq->used_next + (unsigned)count);
    return 0;
}

void pv_vq_release(struct pv_vq *vq)
{
    free(vq->held);
    free(vq->batch);
    free(vq->resume);
    vq->held = NULL;
    vq->batch = vq->resume = NULL;
    vq->resume_next = vq->resume_count = 0;
    vq->inflight = NULL;
}

bool pv_vq_has_more(const struct pv_vq *vq)
{
    return vq->resume_next < vq->resume_count || load16(&vq->avail->idx, __ATOMIC_ACQUIRE) != vq->last_avail;
}

/* Copies the chain that begins at `head` and marks it held. */
static int hold_chain(struct pv_vq *vq, const struct pv_memtable *mem, uint16_t head, struct pv_chain *chain)
{
    struct walk w = {.mem = mem, .chain = chain};

    chain->head = head;
    chain->out_count = chain->in_count = 0;
    chain->out_len = chain->in_len = 0;
    if (head >= vq->num)
        return broken(vq, "ring: descriptor index out of range");
    if (vq->held[head])
        return broken(vq, "ring: a chain that is in flight was made available again");
    if (walk_chain(&w, vq, head) < 0)
        return broken(vq, w.fault);
    vq->held[head] = 1;
    return 1;
}

int pv_vq_pop(struct pv_vq *vq, const struct pv_memtable *mem, struct pv_chain *chain)
{
    if (vq->resume_next < vq->resume_count)
        return hold_chain(vq, mem, vq->resume[vq->resume_next++], chain);

    uint16_t available = (uint16_t)(load16(&vq->avail->idx, __ATOMIC_ACQUIRE) - vq->last_avail);

    if (available > vq->num)
        return broken(vq, "ring: available index out of range");
    if (available == 0)
        return 0;
    uint16_t head = load16(&vq->avail->ring[vq->last_avail % vq->num], __ATOMIC_RELAXED);

    if (hold_chain(vq, mem, head, chain) < 0)
        return -1;
    if (vq->inflight)
        pv_inflight_take(vq->inflight, head);
    vq->last_avail++;
    return 1;
}

void pv_vq_push(struct pv_vq *vq, uint16_t head, uint32_t written)
{
    struct vring_used_elem *elem = &vq->used->ring[vq->used_next % vq->num];

    elem->id = htole32(head);
    elem->len = htole32(written);
    vq->batch[vq->used_next % vq->num] = head;
    vq->held[head] = 0;
    if (vq->inflight)
        pv_inflight_put(vq->inflight, head);
    vq->used_next++;
}

/* ---- notifications ----------------------------------------------------------------------------------------------- */

bool pv_vq_publish(struct pv_vq *vq)
{
    uint16_t old = vq->published;

    if (vq->used_next == old)
        return false;
    store16(&vq->used->idx, vq->used_next, __ATOMIC_RELEASE);
    vq->published = vq->used_next;
    if (vq->inflight)
        pv_inflight_done(vq->inflight, vq->batch, vq->num, old, vq->used_next);
    /* The index must be visible before the guest's wish is read, or both sides could go to sleep. */
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (vq->event_idx)
        return vring_need_event(load16(used_event(vq), __ATOMIC_RELAXED), vq->used_next, old);
    return !(load16(&vq->avail->flags, __ATOMIC_RELAXED) & VRING_AVAIL_F_NO_INTERRUPT);
}

bool pv_vq_enable_kicks(struct pv_vq *vq)
{
    if (vq->event_idx)
        store16(avail_event(vq), vq->last_avail, __ATOMIC_RELAXED);
    else
        store16(&vq->used->flags, 0, __ATOMIC_RELAXED);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    return load16(&vq->avail->idx, __ATOMIC_ACQUIRE) != vq->last_avail;
}

void pv_vq_disable_kicks(struct pv_vq *vq)
{
    /* With EVENT_IDX an old avail_event is already behind: the guest kicks no more until the index passes it again. */
    if (!vq->event_idx)
        store16(&vq->used->flags, VRING_USED_F_NO_NOTIFY, __ATOMIC_RELAXED);
}
